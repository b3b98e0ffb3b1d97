"""Attention of one query a row: lengths around every border, every tile and dtype, against float64."""

import numpy as np
import pytest
import torch
from kernel_cases import DOT_KINDS, HALF, KINDS, SINGLE, ids
from truth import check

from gpukernels import decode_attention
from gpukernels.kernels.attention import decode
from gpukernels.kernels.device import Gpu
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS
from gpukernels.verify.truth import bound, true_decode_attention

KEYS, SPLITS = 4, 3  # of a block, and of a row, in these tests
# Around a block, around a share of one block each, of two blocks each; the last is the capacity.
LENGTHS = [0, 1, 3, 4, 5, 8, 9, 11, 12, 13, 23, 24, 25, 37]
CAPACITY = LENGTHS[-1]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few keys, and as many multiprocessors as give each head SPLITS splits."""
    monkeypatch.setattr(decode, "_HEAD_TILES", {1024: (KEYS, 4)})
    monkeypatch.setattr(decode, "_GROUP_TILES", {1024: (16, 4)})  # 16: what a matrix product needs at least


@pytest.fixture
def splits(monkeypatch):
    def of(programs, splits=SPLITS):
        monkeypatch.setattr(decode, "gpu", lambda: Gpu(80, programs * splits + programs - 1))

    return of


def arrays(kind, heads, kv_heads, width, lengths=LENGTHS, capacity=CAPACITY):
    batch = len(lengths)
    given = kind.draws(
        q=(batch, heads, width), k=(batch, kv_heads, capacity, width), v=(batch, kv_heads, capacity, width)
    )
    given = {"q": given["q"], "k": given["k"].transpose(1, 2), "v": given["v"].transpose(1, 2)}
    for row, length in enumerate(lengths):
        given["k"][row, length:] = given["v"][row, length:] = torch.nan
    return given | {"lengths": kind.ints(lengths)}


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("window", [None, 1, 5, 13, 99])
def test_every_length_and_window(kind, window, splits):
    splits(2)
    check("decode_attention", arrays(kind, 2, 2, 16), window=window)


GROUPS = {"pairs": (4, 2), "of three": (3, 1), "a whole product": (16, 1), "more than a product": (19, 1)}


@pytest.mark.parametrize("kind", [kind for kind in DOT_KINDS if kind != SINGLE], ids=ids)
@pytest.mark.parametrize("group", GROUPS)
def test_heads_that_share_keys(kind, group, splits):
    heads, kv_heads = GROUPS[group]
    splits(kv_heads * -(-heads // kv_heads // 16))
    given = arrays(kind, heads, kv_heads, 16, [0, 1, 16, 17, 70], 70)
    check("decode_attention", given)
    check("decode_attention", given, window=18)


def test_heads_that_share_keys_in_float32(splits):
    splits(4)
    given = arrays(SINGLE, 4, 2, 16, [0, 4, 37])
    check("decode_attention", given)
    check("decode_attention", given, window=5)


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("width", [1, 15, 17, 32, 64, 80, 96, 128, 256])
def test_every_width(heads, width, splits):
    splits(1)
    for kind in (HALF, SINGLE):
        check("decode_attention", arrays(kind, *heads, width, [19, 4], 19))


@pytest.mark.parametrize("name", ["_HEAD_TILES", "_GROUP_TILES"])
def test_with_the_tiles_as_they_are(name, monkeypatch, splits):
    monkeypatch.undo()
    heads = (2, 2) if name == "_HEAD_TILES" else (4, 2)
    for width in (64, 128, 256):
        splits(2)
        keys = decode._tile(getattr(decode, name), 2 * width)[0]
        lengths = [keys - 1, keys, keys + 1, 3 * keys + 1]
        check("decode_attention", arrays(HALF, *heads, width, lengths, lengths[-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["own keys", "shared keys"])
def test_any_strides(layout, heads, splits):
    splits(2)
    given = arrays(HALF, *heads, 24, [37, 0, 5])
    lengths = given.pop("lengths")
    check("decode_attention", {key: LAYOUTS[layout](x) for key, x in given.items()} | {"lengths": lengths})
    wide = lengths.new_full((6,), 10**6)
    wide[::2] = lengths
    check("decode_attention", given | {"lengths": wide[::2]})


@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_lengths_of_either_type_and_none_at_all(integer, splits):
    splits(2)
    given = arrays(SINGLE, 2, 2, 16, [37, 4])
    check("decode_attention", given | {"lengths": SINGLE.ints([37, 4], integer)})
    for batch, capacity in ((0, 5), (2, 0)):
        given = arrays(SINGLE, 2, 2, 16, [0] * batch, capacity)
        check("decode_attention", given | {"lengths": SINGLE.ints([0] * batch, integer)})


@pytest.mark.parametrize(("heads", "kind"), [((2, 2), HALF), ((4, 2), HALF), ((2, 2), SINGLE)])
def test_a_row_depends_on_nothing_but_itself(heads, kind, splits):
    """The same bits: again, alone, in a cache of another capacity, and whatever lies behind it."""
    splits(heads[0])
    lengths = [0, 3, 20, CAPACITY]
    given = arrays(kind, *heads, 24, lengths)
    together = decode_attention(**given)
    assert torch.equal(decode_attention(**given), together)
    for row, length in enumerate(lengths):
        alone = {name: x[row : row + 1] for name, x in given.items()}
        assert torch.equal(decode_attention(**alone)[0], together[row])
        short = {name: alone[name][:, :length].clone() for name in ("k", "v")}
        assert torch.equal(decode_attention(**alone | short)[0], together[row])


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["own keys", "shared keys"])
def test_large_values_in_float16(heads, splits):
    splits(2)
    given = arrays(HALF, *heads, 64, [37, 20])
    for name in ("q", "k"):  # scores of 2**30 overflow float16; as sums of powers of two they are exact
        given[name] = torch.where(given[name] > 0, 4096.0, -4096.0).half()
    given["v"] = (given["v"].nan_to_num().sign() * 6e4).half()
    out = decode_attention(**given).double()
    assert out.isfinite().all()
    given["v"] = given["v"].nan_to_num()
    truth = true_decode_attention(*(host(given[name]) for name in ("q", "k", "v", "lengths"))).value
    assert (abs(host(out) - truth) <= bound("float16", 37, 6e4)).all()


def test_scores_that_are_not_finite_are_not_hidden(splits):
    splits(2)
    given = arrays(SINGLE, 2, 2, 16, [37, 37, 37])
    given["k"][0, 20] = torch.nan
    given["k"][1, :37] = torch.where(given["q"][1] > 0, -torch.inf, torch.inf)  # every score: -inf
    out = decode_attention(**given)
    assert out[:2].isnan().all()
    assert out[2].isfinite().all()


@pytest.mark.parametrize("splits_of_head", [1, 2, 8])
def test_any_number_of_splits(splits_of_head, splits):
    splits(2, splits_of_head)
    check("decode_attention", arrays(SINGLE, 2, 2, 16))


def test_the_number_of_splits_comes_from_heads_and_device(monkeypatch):
    seen = []
    kernel = decode._decode_head_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, SPLITS, **options):
                seen.append((grid, SPLITS))
                return kernel[grid](*arguments, SPLITS=SPLITS, **options)

            return launch

    monkeypatch.setattr(decode, "_decode_head_kernel", Spy())
    monkeypatch.setattr(decode, "gpu", lambda: Gpu(90, 7))
    for lengths, capacity in (([3], 40), ([3, 9], 40), ([3], 5)):
        decode_attention(**arrays(SINGLE, 2, 2, 16, lengths, capacity))
    assert seen == [((2, 3), 3), ((4, 3), 3), ((2, 2), 3)]
    assert np.prod(seen[0][0]) <= 7
