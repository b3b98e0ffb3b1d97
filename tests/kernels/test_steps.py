"""The kernels of a decode step: a cache that is written, partials of many programs, dependent launch."""

import contextlib

import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, HALF, KINDS, SINGLE, ids
from truth_steps import Steps, check_cached_attention

import gpukernels
from gpukernels.kernels.attention import decode
from gpukernels.kernels.device import INTERPRETING, Gpu, gpu
from gpukernels.launches import dependent_launches

HEADS = {"own keys": (2, 2), "shared keys": (4, 2), "more than a product": (19, 1)}


@pytest.fixture(params=[False, True], ids=["in order", "dependent"])
def launches(request):
    """Launched one after the other, or as a decode step launches them, where the GPU can."""
    if not request.param:
        return contextlib.nullcontext
    if not INTERPRETING and gpu().capability < 90:
        pytest.skip("this GPU has no dependent launch")
    return dependent_launches


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few keys; 3 splits for 2 programs, and fewer for more."""
    monkeypatch.setattr(decode, "_HEAD_TILES", {1024: (4, 4)})
    monkeypatch.setattr(decode, "_GROUP_TILES", {1024: (16, 4)})
    monkeypatch.setattr(decode, "gpu", lambda: Gpu(gpu().capability, 7))


@pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 6])
def test_a_token(kind, heads, window, launches, small_blocks):
    # Around a block and a share of 4 and of 16 keys; a row that is not in use; a full cache.
    lengths = [0, 1, 2, 4, 5, 12, 13, 16, 17, 25, 32, 33, 48, 49, 50]
    options = {"batch": len(lengths), "heads": HEADS[heads], "width": 24, "capacity": 50, "window": window}
    with launches():
        check_cached_attention(kind, lengths=lengths, **options)


@pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
@pytest.mark.parametrize("width", [5, 64, 256])
def test_a_prompt(kind, width):
    for new, queries, lengths in ((70, 70, [70, 71, 90]), (19, 1, [19, 3, 0])):
        check_cached_attention(kind, new=new, queries=queries, width=width, capacity=90, lengths=lengths, window=33)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["own keys", "shared keys"])
@pytest.mark.parametrize(("new", "lengths"), [(1, [50, 1, 33]), (20, [20, 50, 33])])
def test_slices_of_one_product_are_not_copied(heads, new, lengths, launches, monkeypatch):
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.ndim) or contiguous(x))
    with launches():
        for window in (None, 6):
            check_cached_attention(
                HALF, heads=heads, new=new, width=24, capacity=50, lengths=lengths, window=window, packed=True
            )
    assert set(copied) <= {1}  # lengths


def test_heads_that_are_wider_than_the_kernels_run_plain_torch():
    check_cached_attention(SINGLE, new=3, width=257, lengths=[9, 3, 5])


def test_arrivals_are_zeros_again(small_blocks):
    arrivals = torch.zeros((3, 4), dtype=torch.int32, device=DEVICE)
    for heads in ((4, 2), (4, 4)):
        check_cached_attention(HALF, heads=heads, capacity=50, lengths=[50, 0, 33], arrivals=arrivals)
        assert not arrivals.any()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["own keys", "shared keys"])
def test_a_row_depends_on_nothing_but_itself(heads, launches, small_blocks):
    """The same bits alone, in another cache."""
    lengths, width, capacity = [1, 20, 37, 0, 48], 24, 48
    rows = len(lengths)
    q, k, v = (HALF.draw(rows, 1, heads[i > 0], width, seed=i) for i in range(3))
    caches = [HALF.draw(rows, capacity, heads[1], width, seed=i) for i in (3, 4)]
    arguments = (q, k, v, *caches, HALF.ints(lengths))
    with launches():
        together = gpukernels.cached_attention(*(each.clone() for each in arguments))
        for row in range(rows):
            alone = [each[row : row + 1].clone() for each in arguments]
            alone[3:5] = (each[:, : max(1, lengths[row])].clone() for each in alone[3:5])
            assert torch.equal(gpukernels.cached_attention(*alone)[0], together[row])


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("drawing", [False, True])
def test_sample_embed(kind, drawing):
    Steps(kind, drawing=drawing).check()
    Steps(kind, drawing=drawing, positions=False).check()


def test_sample_embed_of_a_wide_model(monkeypatch):
    monkeypatch.setattr(Steps, "WIDTH", 1300)
    Steps(SINGLE, drawing=True).check()


def test_sampling_is_the_same_in_every_implementation():
    for seed in range(4):
        kernel = Steps(SINGLE, drawing=True, seed=seed).check()
        plain = Steps(SINGLE._replace(arrays="numpy"), drawing=True, seed=seed).check()
        assert (kernel == plain).all()
