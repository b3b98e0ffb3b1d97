"""Low-rank adapters of a model's products, in the file layout of PEFT: written, read, merged into weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: W + scale b a, with a (rank, in)
and b (out, rank). A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors are float32
under the names of transformers' modules; `peft.PeftModel.from_pretrained` loads it, and theirs load here.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpukernels.cast import FORMATS, count_losses
from gpukernels.numbers import finite
from model.architecture import architecture
from model.checkpoint import TensorEntry, read_header, read_tensor
from model.config import Config
from model.device import NumpyDevice
from model.errors import CheckpointError, overflow_notice
from model.files import read_json
from model.parameters import Parameters, Slot
from model.save import replace_file, write_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_MOST = 2**20  # the rank of an adapter: no weight has more rows
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Keys of PEFT's that do not change what an adapter computes; every other must be off.
# fmt: off
_INERT = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", # read below
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout",
    "megatron_core", "qalora_group_size",
))
# fmt: on


class LowRank(NamedTuple):
    """What is added to one weight: scale b a."""

    a: np.ndarray  # (rank, in) float32
    b: np.ndarray  # (out, rank) float32
    scale: float

    @property
    def delta(self) -> np.ndarray:
        """(out, in) float32."""
        return np.float32(self.scale) * (self.b @ self.a)


def products(config: Config) -> dict[str, Slot]:
    """The weights that an adapter can be of, by the layer's name ("blocks.0.qkv")."""
    slots = architecture(config).slots(config)
    return {slot.name.removesuffix(".weight"): slot for slot in slots if slot.layered and len(slot.shape) == 2}


def scale_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """What b a is multiplied by: alpha / rank, or alpha / sqrt(rank) as in Kalajdzievski, arXiv 2312.03732."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def write_adapter(
    folder: Path,
    config: Config,
    adapters: Mapping[str, LowRank],
    *,
    alpha: float,
    rank_stabilized: bool = False,
    base: str | None = None,
) -> None:
    """Writes adapters, by the layer's name, of one rank.

    Args:
        folder: made if it is not there. Each file is whole before it has its name; the weights come last.
        base: the name or folder of the model that they adapt, for those who load them; None: it has none.

    Raises CheckpointError where the folder cannot be written.
    """
    slots, prefix = products(config), architecture(config).PREFIX
    modules = {name: slots[name].source.removesuffix(".weight") for name in adapters}  # h.0.attn.c_attn
    kinds = sorted({module.split(".", 2)[2] for module in modules.values()})
    whole = len(modules) == len(kinds) * config.n_layer
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": len(next(iter(adapters.values())).a),
        "lora_alpha": alpha,
        "use_rslora": rank_stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(slots[name].transposed for name in adapters),  # transformers' Conv1D keeps (in, out)
        "init_lora_weights": True,
        "inference_mode": True,
        # Of all layers by the end of the name; else each by the whole of it.
        "target_modules": kinds if whole else [f"{prefix}{module}" for module in modules.values()],
    }
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{_PREFIX}{prefix}{modules[name]}.lora_A.weight"] = adapter.a
        tensors[f"{_PREFIX}{prefix}{modules[name]}.lora_B.weight"] = adapter.b
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        write_tensors(path, shapes, tensors.__getitem__, "float32", NumpyDevice())

    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2) + "\n"
        replace_file(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))
        replace_file(folder / WEIGHTS_NAME, write)
    except OSError as fault:
        raise CheckpointError(f"{fault.filename or folder}: cannot be written: {fault.strerror or fault}") from None


def read_adapter(folder: Path, config: Config) -> dict[str, LowRank]:
    """The adapters in a folder of PEFT's layout, by the layer's name.

    Raises CheckpointError where a file is missing or damaged, where an option of PEFT's asks for what is not
    computed here, and for tensors that do not fit the model.
    """
    scale, rank = _read_config(folder / CONFIG_NAME)
    weights, slots = folder / WEIGHTS_NAME, {slot.source: name for name, slot in products(config).items()}
    prefix = architecture(config).PREFIX
    found: dict[str, dict[str, TensorEntry]] = {}
    problems = []
    for entry in read_header(weights):
        match = _TENSOR.fullmatch(entry.name)
        name = slots.get(f"{match[1].removeprefix(prefix)}.weight") if match else None
        if name is None:
            problems.append(f"{weights}: tensor {entry.name} is of no product of this model")
            continue
        out, width = products(config)[name].shape
        shape = (rank, width) if match[2] == "A" else (out, rank)
        if entry.shape != shape or entry.dtype not in FORMATS:
            wanted = f"{shape} of {', '.join(FORMATS)}"
            problems.append(f"{weights}: tensor {entry.name} is {entry.dtype} {entry.shape}, wanted {wanted}")
        found.setdefault(name, {})[match[2]] = entry
    problems += [f"{weights}: {name} has one of its two tensors only" for name, each in found.items() if len(each) < 2]
    if not found and not problems:
        problems.append(f"{weights}: there is no adapter in it")
    if problems:
        raise CheckpointError(problems)
    return {name: LowRank(read_tensor(each["A"]), read_tensor(each["B"]), scale) for name, each in found.items()}


def merge(parameters: Parameters, adapters: Mapping[str, LowRank]) -> list[str]:
    """Adds adapters to the weights in place; each sum is made in float32 and rounded once.

    Returns a sentence for every weight of which values became infinite.
    """
    notices, device = [], parameters.device
    for name, adapter in adapters.items():
        weight = parameters[f"{name}.weight"]
        total = (device.to_host(weight) + adapter.delta).reshape(-1)
        device.cast(total, "F32", weight)
        overflowed = count_losses(total, "F32", parameters.dtype).overflowed
        if overflowed:
            notices.append(overflow_notice(f"{name}.weight", overflowed, parameters.dtype))
    return notices


def _read_config(path: Path) -> tuple[float, int]:
    """Scale and rank."""
    values = read_json(path, CheckpointError)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type must be LORA, got {values.get('peft_type')!r}")
    problems = [
        f"{path}: {key}={json.dumps(value)} is not computed here"
        for key, value in values.items()
        if (key not in _INERT and value) or (key == "bias" and value not in (None, "none"))
    ]
    # Others than these change the weights of the model itself before they train.
    if values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        problems.append(f"{path}: init_lora_weights={values['init_lora_weights']!r} is not computed here")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MOST:
        problems.append(f"{path}: r must be a whole number from 1 to {_MOST}, got {rank!r}")
    if not finite(alpha):
        problems.append(f"{path}: lora_alpha must be a number, got {alpha!r}")
    if problems:
        raise CheckpointError(problems)
    return scale_of(rank, alpha, bool(values.get("use_rslora"))), rank
