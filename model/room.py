"""What memory is free, and the refusal of what will not fit: before anything is allocated, with the numbers."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from model.device import Device
from model.errors import OutOfMemoryError
from model.memory import human

_ROOT = Path("/")


def available(device: Device) -> int | None:
    """Bytes that can still be had: of the GPU, or of this machine and its container's limit. None: nobody says."""
    free = device.free_bytes()
    if free is not None:
        return free
    found = [each for each in (_machine(_ROOT), *_cgroups(_ROOT)) if each is not None]
    return min(found, default=None)


def require(device: Device, needs: Mapping[str, int], what: str, remedy: str) -> None:
    """Refuses `what` where its needs, bytes by what they are for, are more than is free.

    Raises:
        OutOfMemoryError: with every number, and the remedy.
    """
    free, wanted = available(device), sum(needs.values())
    if free is None or wanted <= free:
        return
    parts = ", ".join(f"{human(nbytes)} {name}" for name, nbytes in needs.items() if nbytes)
    where = f"{human(free)} are free on {device.name}"
    raise OutOfMemoryError(f"{what} will not fit: it takes {human(wanted)} ({parts}), and {where}; {remedy}")


@contextlib.contextmanager
def room_for(device: Device, needs: Mapping[str, int], what: str, remedy: str) -> Iterator[None]:
    """`require`, and while this lasts, memory that runs out all the same is `explained`."""
    require(device, needs, what, remedy)
    with explained(device, needs, what, remedy):
        yield


@contextlib.contextmanager
def explained(device: Device, needs: Mapping[str, int], what: str, remedy: str) -> Iterator[None]:
    """Says what was predicted, what is free and what to reduce where memory runs out all the same."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault, OutOfMemoryError) or not _ran_out(fault):
            raise
        free, predicted = available(device), f"{human(sum(needs.values()))} were predicted"
        left = "" if free is None else f", and {human(free)} are free on {device.name} now"
        raise OutOfMemoryError(f"{what} ran out of memory: {predicted}{left}; {remedy}") from fault


def _ran_out(fault: Exception) -> bool:
    """NumPy has MemoryError; torch and CuPy a name of their own; CUDA and torch's allocator on the CPU a text."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True
    text = str(fault).lower()
    return isinstance(fault, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _machine(root: Path) -> int | None:
    """Linux' own estimate of what can be had without swapping."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroups(root: Path) -> Iterator[int]:
    """What the limits of this process' control groups leave, from its own up to the root."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder, *names)
            if left is not None:
                yield left
            if folder == base:
                break


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not most.isdecimal() or not used.isdecimal():  # "max", or there is no such group
        return None
    # Pages of files count as used, and are given up when somebody else asks.
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return max(0, int(most) - int(used) + int(stat.get(reclaimable, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
