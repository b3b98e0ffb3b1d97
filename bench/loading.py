"""The runtimes that `bench.memory` loads, each in a process of its own, and what they are asked there."""

import contextlib
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

import model


class Loader(ABC):
    """One model, loaded a few times: how long, how much, and what it answers.

    Memory on the CPU is the growth of resident memory over the imports. transformers maps the file, and what is
    mapped is there only when it has been read: so the model is loaded and answers 8 tokens before it counts as
    there.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        self._folder, self._device, self._dtype = folder, device, dtype
        self._prepare()
        self._meter = _meter(device)

    def load(self, ids: list[int], rounds: int) -> dict[str, Any]:
        """Seconds to the loaded model and to its first logits, the quickest of the rounds; then bytes, and the logits.

        Bytes are those of the first round, at the most while it was loaded or answered, and in the end: later ones
        find memory that the first has left behind.
        """
        first = self._once(ids)
        rest = [self._once(ids) for _ in range(rounds - 1)]
        quickest = {name: min(each[name] for each in (first, *rest)) for name in ("seconds", "seconds_to_logits")}
        return first | quickest

    def _once(self, ids: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        loaded = self._load()
        self._meter.wait()
        seconds = time.perf_counter() - start
        logits = self._logits(loaded, ids)
        ready = time.perf_counter() - start
        held, peak = self._meter.now(), self._meter.peak()
        return {"seconds": seconds, "seconds_to_logits": ready, "peak": peak, "held": held, "logits": logits}

    def _prepare(self) -> None:  # noqa: B027 (there may be nothing to prepare)
        """Everything that is not the model: imports, and the device's context."""

    @abstractmethod
    def _load(self) -> Any:
        """The model."""

    @abstractmethod
    def _logits(self, loaded: Any, ids: list[int]) -> np.ndarray:
        """(T, V) of one prompt."""


class Ours(Loader):
    def _prepare(self) -> None:
        # The embedded model: what is compiled or imported at the first use is there when the clock starts.
        model.load("tiny-gpt2", device=self._device, dtype=self._dtype).logits([1, 2, 3])

    def _load(self) -> Any:
        return model.load(self._folder, device=self._device, dtype=self._dtype)

    def _logits(self, loaded: Any, ids: list[int]) -> np.ndarray:
        return loaded.logits(ids)[0]


class Transformers(Loader):
    """`from_pretrained` and, on CUDA, `.to`, which needs nothing beside transformers."""

    def _prepare(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

        self._torch, self._auto = torch, AutoModelForCausalLM
        small = GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, bos_token_id=0, eos_token_id=0)
        ).to(self._device)
        with torch.no_grad():
            small(torch.tensor([[1, 2, 3]], device=self._device))

    def _load(self) -> Any:
        dtype = getattr(self._torch, self._dtype)
        return self._auto.from_pretrained(self._folder, dtype=dtype).eval().to(self._device)

    def _logits(self, loaded: Any, ids: list[int]) -> np.ndarray:
        with self._torch.no_grad():
            found = loaded(self._torch.tensor([ids], device=self._device)).logits
        return found[0].float().cpu().numpy()


def _meter(device: str) -> Any:
    return _Gpu(device) if device.startswith("cuda") else _Resident()


class _Resident:
    """Growth of resident memory, the peak's from now on where the system can forget the one before."""

    def __init__(self):
        with contextlib.suppress(OSError):  # the peak of the imports stays then, far below a model's
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def now(self) -> int:
        return self._read("VmRSS") - self._before

    def peak(self) -> int:
        return self._read("VmHWM") - self._before

    def wait(self) -> None:
        pass

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


class _Gpu:
    """What torch's allocator has handed out on the device."""

    def __init__(self, device: str):
        import torch

        self._cuda, self._device = torch.cuda, device
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(device)
        self._before = self._cuda.memory_allocated(device)

    def now(self) -> int:
        return self._cuda.memory_allocated(self._device) - self._before

    def peak(self) -> int:
        return self._cuda.max_memory_allocated(self._device) - self._before

    def wait(self) -> None:
        self._cuda.synchronize(self._device)
