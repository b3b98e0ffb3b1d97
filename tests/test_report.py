"""Rows of a compile report: occupancy by published figures, budgets that are broken on purpose, and the counts."""

from types import SimpleNamespace

import pytest
import torch
from workloads import meta

import gpukernels
from gpukernels.compile_report import CHIPS, GPUS, cost, gather, occupancy, record, roofline, rows
from gpukernels.compile_report.binary import widths
from gpukernels.compile_report.disassembly import listing
from gpukernels.compile_report.report import EXCEPTIONS, _broken, _wide

#: (capability, registers, bytes of shared memory, warps) -> blocks, and what there is no more of.
KNOWN = [
    # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers, blocks of 128 and of 320 threads, on a
    # multiprocessor of 64 warps and 65,536 registers: 75 % and 63 %.
    ((80, 37, 0, 4), (12, "registers")),
    ((80, 37, 0, 10), (4, "registers")),
    # 64 warps of 32 registers are all registers; of more, half as many blocks of 1024 threads.
    ((90, 32, 0, 32), (2, "registers")),
    ((90, 33, 0, 32), (1, "registers")),
    # 1536 threads a multiprocessor on sm_89: one block of 1024.
    ((89, 32, 0, 32), (1, "warps")),
    # As many registers as there are: 8 warps.
    ((80, 255, 0, 4), (2, "registers")),
    ((80, 255, 0, 8), (1, "registers")),
    # 164, 100 and 228 KiB a multiprocessor, of which every block costs one more than it asks for.
    ((80, 32, 81 << 10, 4), (2, "shared memory")),
    ((80, 32, (81 << 10) + 1, 4), (1, "shared memory")),
    ((89, 32, 99 << 10, 4), (1, "shared memory")),
    ((90, 32, 113 << 10, 4), (2, "shared memory")),
    ((100, 32, 227 << 10, 4), (1, "shared memory")),
    # Small blocks run out of places.
    ((80, 16, 0, 1), (32, "blocks")),
    ((89, 16, 0, 1), (24, "blocks")),
]


@pytest.mark.parametrize(("kernel", "want"), KNOWN)
def test_occupancy(kernel, want):
    capability, registers, shared_memory, num_warps = kernel
    needs = {"registers": registers, "shared_memory": shared_memory, "num_warps": num_warps}
    blocks, limit = want
    assert occupancy(CHIPS[capability], **needs) == (blocks, blocks * num_warps, limit)


CODE = [
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64]",
    "@!P0 LDG.E.U16 R4, desc[UR4][R2.64]",
    "HMMA.16816.F32 R4, R8, R10, R4",
    "@P1 BRA 0x130",
    "@!P0 BRA 0x170",
    "@P1 BRA 0x110",
    "STG.E desc[UR4][R2.64], R4",
    "UTMASTG.2D [UR4], [UR6]",
    "BRA 0x190",  # what stands behind the end leads to itself
]


def test_machine_code_is_read():
    found = listing(CODE, first=0x10)
    assert found["listing"][:3] == ["LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.U16"]
    assert found["loops"] == [(3, 4), (1, 6)]
    assert widths(found["listing"]) == {"tma": 1, "16": 2, "4": 1, "2": 1}


def kernel(name="_product_kernel", rows=32, **changed):
    """A launch of a kernel that keeps every budget, but for what is changed."""
    good = {"spilled_bytes": 0, "shared_memory": 1024, "tensor_cores": {"HMMA.16816": 4}}
    good |= {"listing": ["LDG.E.128"], "loops": []}
    return SimpleNamespace(kernel=name, arguments={"BLOCK_M": rows}, compiled=SimpleNamespace(**(good | changed)))


HALVES = SimpleNamespace(tensor_cores=True)


def test_budgets_are_not_for_nothing():
    assert _broken(kernel(), HALVES, 80, 1, 8) == _broken(kernel(), HALVES, 80, 2, 4) == {}
    assert _broken(kernel(), HALVES, 80, 1, 4) == {"residency": "1 block of 4 warps a multiprocessor"}
    assert _broken(kernel(spilled_bytes=16), HALVES, 80, 2, 8) == {}
    assert _broken(kernel(spilled_bytes=24), HALVES, 80, 2, 8) == {"spill": "spills 24 bytes a thread"}
    assert "shared memory" in _broken(kernel(shared_memory=100 << 10), HALVES, 89, 2, 8)
    assert "tensor cores" in _broken(kernel(tensor_cores={}), HALVES, 80, 2, 8)
    assert not _broken(kernel(tensor_cores={}), SimpleNamespace(tensor_cores=False), 80, 2, 8)
    assert _broken(kernel("_attention_forward_kernel"), HALVES, 90, 2, 8) == {}
    large = kernel("_attention_forward_kernel", rows=64)
    assert _broken(large, HALVES, 80, 2, 8) == {}
    assert _broken(large, HALVES, 90, 2, 8) == {"tensor cores": "has no HGMMA instruction"}
    assert _broken(large, HALVES, 100, 2, 8) == {"tensor cores": "has no UTCHMMA instruction"}
    assert "width" in _broken(kernel(listing=["LDG.E.64"]), HALVES, 80, 2, 8)


def test_data_of_single_elements_in_a_loop_is_not_wide():
    def wide(*loops):
        return _wide(SimpleNamespace(loops=[list(each) for each in loops], listing=["LDG.E.128"]))

    assert wide(["LDG.E.128", "LDG.E.U16"])
    assert wide(["LDG.E.128"], ["LDG.E.U16"] * 9)  # masked, behind the whole blocks
    assert not wide(["LDG.E.128"] + ["LDG.E.U16"] * 8)
    assert not wide(["LDG.E.U16"], ["LDG.E.128"])
    assert not wide(["LDG.E.64"])


def test_a_row_sums_its_launches():
    x, small, weight = meta(1024, 768, grad=False), meta(64, 768, grad=False), meta(768, grad=False)

    def twice():
        gpukernels.rms_norm(x, weight)
        gpukernels.rms_norm(small, weight)

    launches = record(twice, capability=80)
    (row,) = rows(launches, 80)
    costs = [cost(launch) for launch in launches]
    assert (row.kernel, row.launches, row.constants) == ("_norm_forward_kernel", 2, "4x256, PIECES=3, WHOLE=3")
    assert row.grid == launches[0].grid
    assert row.read == 2 * (1024 + 64 + 2) * 768
    assert row.written == sum(each.written for each in costs)
    assert row.roofline == {name: sum(roofline(each, gpu) for each in costs) for name, gpu in GPUS.items()}
    assert row.loads.keys() >= {"16"}
    assert not row.problems


def test_exceptions_name_kernels_and_budgets():
    for (name, budget), reason in EXCEPTIONS.items():
        assert name.endswith("_kernel")
        assert budget in ("spill", "shared memory", "tensor cores", "width", "residency")
        assert reason


def norm(width):
    gpukernels.rms_norm(meta(64, width, dtype=torch.float32, grad=False), meta(width, dtype=torch.float32, grad=False))


def one_norm():
    norm(100)


def another_norm():
    norm(200)


def test_several_processes_find_what_one_does():
    functions = {"one": one_norm, "another": another_norm}
    alone = {name: found for name, _, found in gather(functions, [80], processes=1)}
    assert alone.keys() == functions.keys()
    assert {name: found for name, _, found in gather(functions, [80], processes=2)} == alone
