"""Which parameters train: chosen by patterns on their names and by layers, and shown as a table.

Names are those of `lm.parameters`: `tokens.weight`, `positions.weight`, `blocks.0.qkv.weight`, ...,
`norm.weight`, and `head.weight` where the head is not tied. In a pattern `*` stands for anything, dots too.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from rich.table import Table

from model.errors import ModelError

_LAYERED = re.compile(r"blocks\.(\d+)\.(.+)")
_RANGE = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?")


def select(
    names: Iterable[str],
    freeze: Sequence[str] = (),
    unfreeze: Sequence[str] = (),
    layers: str | range | None = None,
) -> set[str]:
    """The names of the parameters that train.

    Args:
        names: all that there are.
        freeze: patterns of names that do not train.
        unfreeze: patterns of names that train although `freeze` or `layers` would not let them.
        layers: of the blocks, only these train, and nothing outside the blocks: "4", "2-5" with both
            ends, "8-" to the last, or a `range`. None: all.

    Raises ModelError for a pattern that matches nothing, with the names that it may have meant, for layers
    that are not there, and where nothing would train.
    """
    names = list(names)
    chosen = set(names)
    if layers is not None:
        wanted = _layers(layers, 1 + max((int(each[1]) for each in map(_LAYERED.fullmatch, names) if each), default=-1))
        chosen = {name for name in names if (layered := _LAYERED.fullmatch(name)) and int(layered[1]) in wanted}
    for pattern in freeze:
        chosen -= matching(names, pattern)
    for pattern in unfreeze:
        chosen |= matching(names, pattern)
    if not chosen:
        raise ModelError("nothing would train: every parameter is frozen")
    return chosen


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """The names that a pattern matches; ModelError if there is none."""
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        # One name for all layers: the error should not list the same six times.
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
        close = difflib.get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), kinds, n=3, cutoff=0.4) or list(kinds)
        raise ModelError(f"{pattern!r} matches nothing; there is {', '.join(close)}")
    return found


def table(sizes: Mapping[str, int], chosen: set[str], *, tied: bool = False) -> Table:
    """What trains and what does not: one row for each kind of parameter, with its layers.

    Args:
        sizes: how many numbers each parameter has.
        chosen: the names of those that train.
        tied: `tokens.weight` is the output matrix too, which its row then says.
    """
    rows: dict[str, list[str]] = {}
    for name in sizes:
        layered = _LAYERED.fullmatch(name)
        rows.setdefault(f"blocks.*.{layered[2]}" if layered else name, []).append(name)
    total, trained = sum(sizes.values()), sum(sizes[name] for name in chosen)
    shown = Table(show_footer=True)
    share = f"{trained / total:.2%}" if total else ""
    heads = (("parameters", "all"), ("train", ""), ("numbers", f"{total:,}"), ("of them train", f"{trained:,}"))
    for head, foot in (*heads, ("share", share)):
        shown.add_column(head, foot, justify="left" if head in ("parameters", "train") else "right")
    for kind, members in rows.items():
        size, part = sum(sizes[name] for name in members), sum(sizes[name] for name in members if name in chosen)
        label = f"{kind} (and the output)" if tied and kind == "tokens.weight" else kind
        shown.add_row(label, _which(members, chosen), f"{size:,}", f"{part:,}", f"{part / size:.0%}" if size else "")
    return shown


def _layers(layers: str | range, count: int) -> range:
    if isinstance(layers, str):
        found = _RANGE.fullmatch(layers.strip())
        if not found:
            raise ModelError(f'layers must be like "4", "2-5" or "8-", got {layers!r}')
        first, last = int(found[1]), count - 1 if found[2] else found[1]
        layers = range(first, int(found[3] or last) + 1)
    if not layers or min(layers) < 0 or max(layers) >= count:
        shown = f"{layers[0]}-{layers[-1]}" if layers else "none"
        raise ModelError(f"layers must be from 0 to {count - 1}, the model's last, got {shown}")
    return layers


def _which(members: Sequence[str], chosen: set[str]) -> str:
    """Whether these train: yes, no, or in which layers ("0-3, 5")."""
    inside = [name in chosen for name in members]
    if all(inside) or not any(inside):
        return "yes" if inside[0] else "no"
    layers = [int(_LAYERED.fullmatch(name)[1]) for name, member in zip(members, inside, strict=True) if member]
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
