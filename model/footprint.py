"""The memory that a model really takes, measured in a process of its own, beside what was predicted.

On the CPU it is the growth of resident memory over the imports, on a GPU what torch's allocator and the driver
say. The process loads the model, prefills every row to the context less a few tokens, and decodes those.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.config import Config, read_config
from model.device import Device, choose_device
from model.errors import ModelError, OutOfMemoryError
from model.load import fill, plan
from model.memory import Ledger, human
from model.room import available, require

_STEPS = 4  # tokens that are decoded, where there is room for so many


@dataclass(frozen=True)
class Footprint:
    """Bytes that were measured; None where there is nothing to tell one from another.

    Attributes:
        loading: the most while the weights were loaded.
        weights: what is left of that.
        kv_cache: on CUDA; with the decoder's other arrays, a few bytes a row.
        beside_weights: the most while generating, less the weights.
        slack: on CUDA, what torch's allocator had taken beyond what it was asked for.
        cuda_context: on CUDA, what the GPU had used beyond that: by CUDA, by the code of kernels, and by other
            processes.
        peak: the most at any time; on CUDA with slack, without the context.
        load_bytes, load_seconds: of reading files; None for random weights.
    """

    loading: int
    weights: int
    kv_cache: int | None
    beside_weights: int
    slack: int | None
    cuda_context: int | None
    peak: int
    load_bytes: int | None = None
    load_seconds: float | None = None


@dataclass(frozen=True)
class MemoryReport:
    """Predicted and measured side by side.

    Attributes:
        available: bytes that are free on the device now; None where nobody says.
    """

    predicted: Ledger
    measured: Footprint | None
    available: int | None


def report(lm: Any, predicted: Ledger, *, measure: bool) -> MemoryReport:
    """`LanguageModel.memory`."""
    found = None
    if measure:
        config = replace(lm.config, tie_word_embeddings="head.weight" not in lm.parameters)
        found = footprint(config, lm.parameters.device, predicted)
    return MemoryReport(predicted, found, available(lm.parameters.device))


def footprint(source: Path | Config, device: Device, predicted: Ledger) -> Footprint:
    """Measures in a new process what `predicted` is about.

    Args:
        source: of the weights, a folder or file; or a config, for random weights. No tokenizer is loaded.

    Raises:
        OutOfMemoryError: it would not fit, or did not.
        ModelError: what else the process said, or that this system cannot be asked.
    """
    needs = {"weights": predicted.weights, **predicted.needs}
    require(device, needs, "measuring", "measure a smaller batch or context, or use --no-measure")
    if predicted.place != "cuda" and not Path("/proc/self/status").exists():
        raise ModelError("resident memory is read from /proc, which this system has not: it cannot be measured")
    task = {
        "source": None if isinstance(source, Config) else str(source),
        "config": source.to_json() if isinstance(source, Config) else None,
        # By its number: the one that is current in a new process may be another.
        "device": {"numpy": "cpu", "torch": "torch"}.get(predicted.place) or str(device.device),
        **{name: getattr(predicted, name) for name in ("dtype", "batch", "context")},
    }
    package = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", "from model.footprint import main; main()", json.dumps(task)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        raise OutOfMemoryError(
            f"the process that measures was killed by signal {-done.returncode}, as it is where memory runs out; "
            f"{human(predicted.peak)} were predicted"
        )
    answer = json.loads(done.stdout) if done.returncode == 0 else {"problems": [done.stderr.strip()[-800:]]}
    if "problems" in answer:
        raise ModelError(answer["problems"])
    return Footprint(**answer)


def main() -> None:
    """The new process: one task as JSON, one answer."""
    try:
        answer = asdict(_measured(**json.loads(sys.argv[1])))
    except ModelError as fault:
        answer = {"problems": fault.problems}
    print(json.dumps(answer))


def _measured(
    *, source: str | None, config: dict | None, device: str, dtype: str, batch: int, context: int
) -> Footprint:
    import numpy.random  # noqa: F401 (what random weights import is no part of a model)

    import model

    place = device
    if device == "torch":
        import torch

        place = torch.device("cpu")
    meter = _Gpu(choose_device(place)) if device.startswith("cuda") else _Resident()
    if source is None:
        lm = model.from_config(read_config(config)[0], device=place, dtype=dtype)
    else:
        planned = plan(Path(source))
        filled = fill(planned, choose_device(place), dtype)
        lm = model.LanguageModel(planned.config, filled.parameters, filled=filled)
    lm.eos_token_ids = ()
    weights, loading = meter.now(), meter.peak()
    new = max(1, min(_STEPS, context - 1))
    tokens = range(max(1, context - new))
    prompts = [[(row + token) % lm.config.vocab_size for token in tokens] for row in range(batch)]  # each computed
    lm.generate(prompts, max_new_tokens=new, batch_size=batch)
    peak = max(meter.peak(), loading)
    return Footprint(
        loading=loading,
        weights=weights,
        beside_weights=peak - weights,
        peak=peak,
        load_bytes=None if lm.filled is None else lm.filled.nbytes,
        load_seconds=None if lm.filled is None else lm.filled.seconds,
        **meter.rest(weights),
    )


class _Resident:
    """The growth of this process' resident memory."""

    def __init__(self):
        self._before = self._read("VmRSS")

    def now(self) -> int:
        return self._read("VmRSS") - self._before

    def peak(self) -> int:
        return self._read("VmHWM") - self._before

    def rest(self, weights: int) -> dict[str, None]:
        return dict.fromkeys(("kv_cache", "slack", "cuda_context"))

    @staticmethod
    def _read(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


class _Gpu:
    """What torch's allocator has handed out, and what it has taken from the driver."""

    def __init__(self, device: Any):
        import torch

        self._cuda, self._device = torch.cuda, device.device
        self._cuda.init()
        self._cuda.reset_peak_memory_stats(self._device)

    def now(self) -> int:
        return self._cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return self._cuda.max_memory_reserved(self._device)

    def rest(self, weights: int) -> dict[str, int]:
        free, total = self._cuda.mem_get_info(self._device)
        return {
            "kv_cache": self._cuda.memory_allocated(self._device) - weights,  # the decoder is kept
            "slack": self._cuda.max_memory_reserved(self._device) - self._cuda.max_memory_allocated(self._device),
            "cuda_context": total - free - self._cuda.memory_reserved(self._device),
        }
