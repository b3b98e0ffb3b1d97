"""What a recording comes to: a row for every kernel it launched, and the budgets that rows keep."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gpukernels.compile_report.binary import Compiled, widths
from gpukernels.compile_report.chips import CHIPS, occupancy
from gpukernels.compile_report.cost import Cost, cost
from gpukernels.compile_report.disassembly import read_together
from gpukernels.compile_report.recording import Launch
from gpukernels.gpus import GPUS, roofline


class Row(NamedTuple):
    """One kernel as it was compiled once, and all launches of it."""

    kernel: str
    capability: int
    constants: str  # the tile, and what else the code was made for
    launches: int
    grid: tuple[int, int, int]  # of the largest launch
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_memory: int  # bytes of a block
    shared_memory_limit: int
    num_warps: int  # of a block
    num_stages: int
    resident_blocks: int  # of a multiprocessor
    resident_warps: int
    resident_limit: str  # what there is no more of
    tensor_cores: Mapping[str, int]  # instructions by kind and shape
    loads: Mapping[str, int]  # from global memory, by bytes of a thread, or "tma"
    stores: Mapping[str, int]
    read: int  # bytes that all launches have to read
    written: int
    flops: int
    roofline: Mapping[str, float]  # seconds that all launches take at least, by GPU
    problems: tuple[str, ...]  # budgets that are broken
    excused: tuple[str, ...]  # budgets that would be, and why they may


def rows(launches: Iterable[Launch], capability: int) -> list[Row]:
    """One row for each machine code, in the order of its first launch."""
    groups: dict[bytes, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.compiled.cubin, []).append(launch)
    read_together(groups, capability)
    return [_row(group, capability) for group in groups.values()]


def _row(group: list[Launch], capability: int) -> Row:
    costs = [cost(launch) for launch in group]
    compiled, chip = group[0].compiled, CHIPS[capability]
    needs = {"registers": compiled.registers, "shared_memory": compiled.shared_memory, "num_warps": compiled.num_warps}
    resident = occupancy(chip, **needs)
    found = _broken(group[0], costs[0], capability, resident.blocks, resident.warps)
    reasons = {name: reason for (kernel, name), reason in EXCEPTIONS.items() if kernel == group[0].kernel}
    return Row(
        kernel=group[0].kernel,
        capability=capability,
        constants=_constants(group[0]),
        launches=len(group),
        grid=max((launch.grid for launch in group), key=lambda grid: grid[0] * grid[1] * grid[2]),
        spilled_bytes=compiled.spilled_bytes,
        shared_memory_limit=chip.shared_memory,
        num_stages=compiled.num_stages,
        resident_blocks=resident.blocks,
        resident_warps=resident.warps,
        resident_limit=resident.limit,
        tensor_cores=compiled.tensor_cores,
        loads=compiled.loads,
        stores=compiled.stores,
        read=sum(each.read for each in costs),
        written=sum(each.written for each in costs),
        flops=sum(each.flops for each in costs),
        roofline={name: sum(roofline(each, gpu) for each in costs) for name, gpu in GPUS.items()},
        problems=tuple(text for name, text in found.items() if name not in reasons),
        excused=tuple(f"{text}: {reasons[name]}" for name, text in found.items() if name in reasons),
        **needs,
    )


def _constants(launch: Launch) -> str:
    """ "128x256x64, ACTIVATION=gelu": the blocks, and flags that are on."""
    named = {name: launch.arguments[name] for name in launch.constants}
    blocks = "x".join(str(value) for name, value in named.items() if name.startswith("BLOCK"))
    others = [
        name if value is True else f"{name}={value}"
        for name, value in named.items()
        if not name.startswith("BLOCK") and value not in (None, False)
    ]
    return ", ".join([blocks] * bool(blocks) + others)


# Budgets

SPILL = 16  # bytes of a thread: a few registers' worth, which the first-level cache absorbs
BLOCKS, WARPS = 2, 8  # of a multiprocessor: one of the two, so that something runs while something waits

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS = {
    "_attention_backward_keys_kernel",
    "_attention_backward_queries_kernel",
    "_attention_forward_kernel",
    "_decode_group_kernel",
    "_few_rows_kernel",
    "_persistent_step_kernel",
    "_product_descriptor_kernel",
    "_product_kernel",
}
#: From as many rows of a tile on, those of sm_90 and sm_100 are wgmma's and tcgen05's.
LARGE = 64

#: (kernel, budget): why the budget may be broken.
EXCEPTIONS = {
    ("_rope_kernel", "spill"): "the product with 2/pi, in integers, of an angle above 105615, in CUDA's sine and "
    "cosine",
    ("_rope_kernel", "width"): "the one loop is CUDA's reduction of a large angle, which reads a table of 2/pi",
    ("_persistent_step_kernel", "width"): "the first of its loops polls a counter of 8 bytes",
    ("_product_descriptor_kernel", "residency"): "five stages of loads in flight take the shared memory that a second "
    "block would; by probes on an H100, 2026-11-22, at 0.88 to 0.97 of cuBLAS's speed",
}


def _broken(launch: Launch, each: Cost, capability: int, blocks: int, warps: int) -> dict[str, str]:
    """The budgets that a kernel does not keep, by name, in words."""
    compiled, found = launch.compiled, {}
    if compiled.spilled_bytes > SPILL:
        found["spill"] = f"spills {compiled.spilled_bytes} bytes a thread"
    if compiled.shared_memory > CHIPS[capability].shared_memory:
        found["shared memory"] = f"needs {compiled.shared_memory} bytes of shared memory"
    if launch.kernel in PRODUCTS and each.tensor_cores:
        large = launch.arguments.get("BLOCK_M", 0) >= LARGE
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(capability, "") if large else ""
        if not any(name.startswith(wanted) for name in compiled.tensor_cores):
            found["tensor cores"] = f"has no {wanted or 'tensor-core'} instruction"
    if not _wide(compiled):
        found["width"] = "its inner loop moves little 16 bytes at a time"
    if blocks < BLOCKS and warps < WARPS:
        found["residency"] = f"{blocks} block of {warps} warps a multiprocessor"
    return found


def _wide(compiled: Compiled) -> bool:
    """Data moves 16 bytes at a time in the first loop that touches global memory, or in all code if none does.

    Whole blocks come first in a kernel, and masked ones last. Beside the data there may be a row's statistics,
    of 4 or 8 bytes; single 16-bit elements are data that were not vectorised.
    """
    loops = [found for found in map(widths, compiled.loops) if found]
    accesses = loops[0] if loops else widths(compiled.listing)
    if "tma" in accesses:
        return True
    moved = {int(width): int(width) * times for width, times in accesses.items()}
    single = sum(size for width, size in moved.items() if width < 4)
    return max(moved) >= 16 and (not loops or 4 * single <= sum(moved.values()))
