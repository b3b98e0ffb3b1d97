"""Rotary positions as `config.json` describes them: which frequencies turn the pairs of a head, and what scales them.

The kinds and their keys are those of transformers' `modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpukernels.numbers import finite
from model.contract import Rule, is_int, shown, switch
from model.errors import printable

_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """Rotary positions, in the names of `rope_parameters`.

    Attributes:
        rope_type: "default"; "linear", every frequency over `factor` (Chen et al., arXiv 2306.15595); "llama3", the
            low ones over `factor`, the high ones as they are, those between blended (Dubey et al., arXiv 2407.21783);
            "yarn", the same by how often a pair turns within the original context, and attention sharpened (Peng et
            al., arXiv 2309.00071); "dynamic", where other frequencies begin behind the model's last position, so
            none here.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of llama3. A wavelength of more than
            original / low is a low frequency, one of less than original / high a high one.
        beta_fast, beta_slow, truncate: of yarn. Pairs of more turns than beta_fast (default 32) within the original
            context keep their frequency, those of fewer than beta_slow (1) have it over `factor`; truncate (default
            true) takes whole pairs.
        attention_factor, mscale, mscale_all_dim: of yarn; see `scale`.
    """

    rope_theta: float = _THETA
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def frequencies(self, width: int) -> np.ndarray | None:
        """(width / 2,) float32, each operation rounded as transformers' are; None for the default ones."""
        if self.rope_type in ("default", "dynamic"):
            return None
        exponents = (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)).astype(np.float64)
        turns = np.power(float(np.float32(self.rope_theta)), exponents).astype(np.float32)
        plain, factor = np.float32(1) / turns, np.float32(self.factor)
        if self.rope_type == "linear":
            return plain / factor
        if self.rope_type == "yarn":
            share = self._ramp(width)
            kept = 1 - share
            return np.float32(1) / (factor * turns) * (1 - kept) + plain * kept
        original = self.original_max_position_embeddings
        wavelength = np.float32(2 * math.pi) / plain
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        smooth = (np.float32(original) / wavelength - low) / (high - low)
        blended = (1 - smooth) * plain / factor + smooth * plain
        long, short = original / self.low_freq_factor, original / self.high_freq_factor
        return np.where(wavelength > long, plain / factor, np.where(wavelength < short, plain, blended))

    def _ramp(self, width: int) -> np.ndarray:
        """(width / 2,) of yarn: 0 where a frequency stays, 1 where it is over `factor`."""

        def pair(turns: float) -> float:
            """The one that turns so often within the original context."""
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(wavelength) / (2 * math.log(self.rope_theta))

        first, last = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        if first == last:
            last += 0.001  # as transformers has it
        places = np.arange(width // 2, dtype=np.float32)
        return np.clip((places - np.float32(first)) / np.float32(last - first), 0, 1).astype(np.float32)

    @property
    def scale(self) -> float:
        """What queries and keys are multiplied by beside being turned."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharper(self.mscale) / self._sharper(self.mscale_all_dim)
        return self._sharper(1.0)

    def _sharper(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


def _number(value: Any) -> str | None:
    return None if finite(value) and value > 0 else "a number above 0"


def _count(value: Any) -> str | None:
    return None if is_int(value) and finite(value) and value > 0 else "a whole number above 0"


def _factor(value: Any) -> str | None:
    return None if value is None or (finite(value) and value > 0) else "a number above 0, or null"


def _optional(value: Any) -> str | None:
    return None if value is None or (finite(value) and value >= 0) else "a number from 0, which is none, or null"


#: By kind, the keys beside rope_theta and what they must be.
_KINDS: dict[str, dict[str, Rule]] = {
    "default": {},
    "linear": {"factor": _number},
    "dynamic": {"factor": _number},
    "llama3": {
        "factor": _number,
        "low_freq_factor": _number,
        "high_freq_factor": _number,
        "original_max_position_embeddings": _count,
    },
    "yarn": {
        "factor": _number,
        "original_max_position_embeddings": _count,
        "attention_factor": _factor,
        "beta_fast": _optional,
        "beta_slow": _optional,
        "mscale": _optional,
        "mscale_all_dim": _optional,
        "truncate": switch,
    },
}
_ORIGINAL = "original_max_position_embeddings"

#: The keys of a config.json that `read` reads.
KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL)


def read(values: Mapping[str, Any], positions: int, name: str) -> tuple[Rope, list[str], list[str]]:
    """The rotary positions of a model of so many positions, old and new: transformers 5 has all in `rope_parameters`,
    older ones `rope_theta` beside `rope_scaling`, whose "type" is its "rope_type".

    And what is wrong with them; and, where nothing is, a notice of keys that go unused, if there are any.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(key) or {}
    if not isinstance(given, dict):
        return Rope(), [f"{name}: {key} must be an object or null, got {shown(given)}"], []
    found = {"rope_theta": values.get("rope_theta", _THETA), "rope_type": given.get("type", "default"), **given}
    kind = found["rope_type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        wanted = f"one of {', '.join(_KINDS)}, which are computed here"
        return Rope(), [f"{name}: rope_type of {key} must be {wanted}, got {shown(kind)}"], []
    rules = _KINDS[kind]
    if _ORIGINAL in rules:
        found = {_ORIGINAL: positions, **found}
        if _ORIGINAL in values:  # beside them it comes first
            found[_ORIGINAL] = values[_ORIGINAL]
    problems = _problems(found, kind, name)
    turned = found.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if turned != 1.0:
        problems.insert(0, f"{name}: partial_rotary_factor={shown(turned)} is refused: heads are turned whole")
    if problems:
        return Rope(), problems, []
    fields = {each: found[each] for each in ("rope_theta", "rope_type", *rules) if each in found}
    unused = sorted(given.keys() - rules.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor"})
    notice = f"{name}: keys of {key} that {kind} rotary positions do not use: {', '.join(unused)}"
    return Rope(**fields), [], [printable(notice)] if unused else []


def _problems(found: Mapping[str, Any], kind: str, name: str) -> list[str]:
    problems = []
    for key, rule in {"rope_theta": _number, **_KINDS[kind]}.items():
        if key not in found and rule in (_factor, _optional, switch):
            continue
        if wanted := rule(found.get(key)):
            got = shown(found[key]) if key in found else "nothing"
            problems.append(f"{name}: {key} of {kind} rotary positions must be {wanted}, got {got}")
    if problems:
        return problems
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        high, low = shown(found["high_freq_factor"]), shown(found["low_freq_factor"])
        return [f"{name}: high_freq_factor must be more than low_freq_factor={low}, got {high}"]
    if kind == "yarn" and found["rope_theta"] == 1:
        return [f"{name}: rope_theta of yarn rotary positions must not be 1: all pairs would turn alike"]
    return []
