"""What a model loses when its weights are cast to fewer bits: value by value, and in its logits."""

from dataclasses import dataclass

import numpy as np

from gpukernels.cast import Losses, round_to
from model.architecture import architecture
from model.config import Config
from model.device import Device, NumpyDevice
from model.load import Filled, Plan, fill
from model.memory import weight_bytes
from model.parameters import Parameters
from model.room import room_for

DTYPES = ("float16", "bfloat16")

_TOKENS = 64  # of the fixed text whose logits are compared, or as many as there are positions


@dataclass(frozen=True)
class LogitChange:
    """How far logits (T, V) of the cast model are from those of the float32 one, over the same tokens.

    Attributes:
        tokens: T.
        absolute: the largest difference of two logits; None where one of the cast model's is not finite.
        relative: `absolute` by the largest magnitude of a float32 logit.
        same_choice: the share of positions whose likeliest token is the same.
        nonfinite: logits of the cast model that are infinite or NaN.
    """

    tokens: int
    absolute: float | None
    relative: float | None
    same_choice: float
    nonfinite: int


@dataclass(frozen=True)
class Audit:
    """What a cast of every weight to `dtype` loses.

    Attributes:
        losses: by the tensors' names in the checkpoint, in file order.
        logits: None where the float32 model's own logits are not finite: then there is nothing to compare.
        runs: one sentence on what computed the logits.
    """

    dtype: str
    losses: dict[str, Losses]
    logits: LogitChange | None
    runs: str
    filled: Filled

    @property
    def total(self) -> Losses:
        return sum(self.losses.values(), Losses())


def audit(planned: Plan, device: Device, dtype: str) -> Audit:
    """Loads the model in float32 and in `dtype`, one after the other, counts, and compares.

    On NumPy, which computes in float32 whatever the weights are stored as, the float32 weights are rounded
    in place: one model in memory, and bfloat16 too.

    Args:
        dtype: "float16" or "bfloat16".
    """
    needs = {"weights": weight_bytes(planned.config, "float32", head=planned.own_head)}
    with room_for(device, needs, "the audit, which compares with float32,", "audit where there is more memory"):
        return _audit(planned, device, dtype)


def _audit(planned: Plan, device: Device, dtype: str) -> Audit:
    ids = np.random.default_rng(0).integers(0, planned.config.vocab_size, min(_TOKENS, planned.config.n_positions))
    if isinstance(device, NumpyDevice):
        filled = fill(planned, device, "float32", audit=dtype)
        before = _logits(filled.parameters, planned.config, ids)
        for array in filled.parameters.values():
            round_to(array, dtype)
        runs = f"NumPy in float32, weights rounded to {dtype}"
    else:
        before = _logits(fill(planned, device, "float32").parameters, planned.config, ids)
        filled = fill(planned, device, dtype, audit=dtype)
        runs = f"torch on {device.name}, weights and activations in {dtype}"
    after = _logits(filled.parameters, planned.config, ids)
    return Audit(dtype, filled.losses, _compared(before, after), runs, filled)


def _logits(parameters: Parameters, config: Config, ids: np.ndarray) -> np.ndarray:
    device = parameters.device
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite are what is looked for
        model = architecture(config)
        positions = device.indices(np.arange(len(ids))[None])
        x = model.hidden_states(parameters, config, device.indices(ids[None]), positions)
        return device.to_host(model.unembed(parameters, config, x))[0]


def _compared(before: np.ndarray, after: np.ndarray) -> LogitChange | None:
    if not np.isfinite(before).all():
        return None
    nonfinite = int(after.size - np.isfinite(after).sum())
    same = float((before.argmax(-1) == after.argmax(-1)).mean())
    if nonfinite:
        return LogitChange(len(before), None, None, same, nonfinite)
    absolute = float(np.abs(after - before).max())
    largest = float(np.abs(before).max())
    return LogitChange(len(before), absolute, absolute / largest if largest else 0.0, same, 0)
