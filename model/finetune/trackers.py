"""Where else the records of a run go: TensorBoard, Weights & Biases, or an object of the user's own."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from model.errors import ModelError


class Tracker(Protocol):
    """What is told every record of a run."""

    def log(self, record: dict[str, Any]) -> None:
        """A line of the log: `kind`, `step`, and numbers; None stands for one that is not finite."""

    def close(self) -> None:
        """The run is over, or has failed."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder; a resumed run drops what lies behind its first step."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def log(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases named after the folder, a new one for a resumed run.

    Its own variables (WANDB_PROJECT, WANDB_MODE) decide the rest.
    """

    def __init__(self, folder: Path, done: int):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(name=folder.resolve().name, dir=str(folder))

    def log(self, record: dict[str, Any]) -> None:
        # Not the library's own step, which must grow: an evaluation comes with the step before it.
        self._run.log({"step": record["step"], **_numbers(record)})

    def close(self) -> None:
        self._run.finish()


#: By name: what makes the tracker, and the package that it needs.
TRACKERS = {"tensorboard": (TensorBoard, "tensorboard"), "wandb": (WeightsAndBiases, "wandb")}


def check_trackers(names: Sequence[str | Tracker]) -> None:
    """ModelError for a name that is none, and for a tracker whose package is not installed."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ModelError(f"trackers must be a list of names and objects, got {names!r}")
    for name in names:
        if not isinstance(name, str):
            if not all(callable(getattr(name, method, None)) for method in ("log", "close")):
                raise ModelError(f"a tracker must be a name, or an object with log and close, got {name!r}")
            continue
        if name not in TRACKERS:
            raise ModelError(f"a tracker must be one of {', '.join(TRACKERS)}, got {name!r}")
        package = TRACKERS[name][1]
        if not installed(package):
            raise ModelError(f"{name} is not installed: pip install {package}")


def make_trackers(names: Sequence[str | Tracker], folder: Path | None, *, done: int) -> list[Tracker]:
    """The trackers of a run, by name or as they are; nothing is made where one of them is not there."""
    check_trackers(names)
    if folder is None and any(isinstance(name, str) for name in names):
        raise ModelError("a tracker by name writes into the run's folder: give one (out)")
    return [TRACKERS[name][0](folder, done) if isinstance(name, str) else name for name in names]


def installed(package: str) -> bool:
    return find_spec(package) is not None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, each under the kind of it: "step/loss"."""
    kind = {"step": "train", "evaluation": "validation"}[record["kind"]]
    return {
        f"{kind}/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
