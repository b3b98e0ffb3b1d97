"""What a checkpoint calls its tensors, without what wrappers put in front."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

#: The output matrix, as transformers calls it in every architecture.
HEAD = "lm_head.weight"


@dataclass
class NameMap:
    """What a checkpoint's tensor names come to: the base name of each, without wrappers' prefixes."""

    names: dict[str, str] = field(default_factory=dict)  # base name -> name in the file
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def map_names(names: Iterable[str], prefix: str, buffer: re.Pattern) -> NameMap:
    """Strips an architecture's own `prefix` and, with a notice, those of torch's wrappers; drops buffers."""
    result, wrappers = NameMap(), set()
    for name in names:
        base = name
        while base.startswith(("module.", "_orig_mod.", prefix)):
            first, base = base.split(".", 1)
            if first + "." != prefix:
                wrappers.add(first + ".")
        if buffer.fullmatch(base):
            continue
        if base in result.names:
            result.problems.append(f"tensor {base} is there twice, as {result.names[base]} and {name}")
        result.names[base] = name
    if wrappers:
        result.notices.append(f"tensor names: the prefix {' and '.join(sorted(wrappers))} of a wrapper was removed")
    return result
