"""The losses of a run as a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpukernels.numbers import finite


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the training loss of every step, its running mean, and the validation losses, as a PNG.

    Nothing is drawn where no step has a loss. Needs matplotlib.
    """
    train = _points(records, "step", "loss")
    validation = _points(records, "evaluation", "validation_loss")
    if not len(train):
        return
    from matplotlib.figure import Figure  # without pyplot: no window, and no state that outlives the call

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*train.T, color="#9ecae1", linewidth=0.8, label="training, each step")
    width = max(1, len(train) // 50)
    if width > 1:
        axes.plot(train[width - 1 :, 0], _running_mean(train[:, 1], width), color="#3182bd",
                  label=f"training, mean of {width} steps")  # fmt: skip
    if len(validation):
        axes.plot(*validation.T, color="#e6550d", marker="o", markersize=3, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _points(records: Sequence[dict[str, Any]], kind: str, key: str) -> np.ndarray:
    """(n, 2) of step and value, those without a number left out."""
    found = [(each["step"], each[key]) for each in records if each["kind"] == kind and finite(each.get(key))]
    return np.array(found, np.float64).reshape(-1, 2)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[width:] - sums[:-width]) / width
