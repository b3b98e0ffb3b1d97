"""Casts between checkpoint formats and parameters, and what they lose: torch and float64 judge."""

import numpy as np
import pytest
import torch

from gpukernels.cast import FORMATS, Losses, cast, count_losses, round_to, widen_float16
from gpukernels.cast.host import CHUNK

BITS = np.arange(2**16, dtype=np.uint16)
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2**16])
@pytest.mark.parametrize("mask", [0xFFFF, 0xBFFF], ids=["all", "finite"])  # a chunk with an infinity goes another way
def test_widen_float16_for_every_bit_pattern(size, mask):
    bits, out = np.roll(BITS, -size)[:size] & np.uint16(mask), np.full(size, 9, np.float32)
    widen_float16(bits.view(np.float16), out)
    want = torch.from_numpy(bits.view(np.int16)).view(torch.float16).float().numpy()
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(np.signbit(out)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


def float32_samples():
    """Any bit patterns, and what lies at and beside the middle between two float16 numbers."""
    numbers = BITS[:0x7C01].view(np.float16).astype(np.float32)
    numbers[-1] = 2**16  # the number that would follow the largest
    middles = (numbers[:-1] + numbers[1:]) / 2
    beside = [np.nextafter(middles, np.float32(to)) for to in (0, 1e9)]
    random = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32).view(np.float32)
    return np.concatenate([random, middles, -middles, *beside])


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_cast_for_every_pair_of_formats(format, dtype, transposed):
    """torch judges: its conversions round to nearest, ties to even, and become infinite from 65520 on."""
    source = float32_samples() if format == "F32" else BITS.view(FORMATS[format])
    values = torch.from_numpy(source.view(np.int32 if format == "F32" else np.int16)).view(TORCH[format]).reshape(-1, 2)
    want = values.to(getattr(torch, dtype))
    out = np.empty(tuple(values.shape[:: -1 if transposed else 1]), dtype)
    out = out.T if transposed else out
    cast(source, format, out)
    np.testing.assert_array_equal(out, want.numpy())


def samples(format: str) -> np.ndarray:
    return float32_samples() if format == "F32" else BITS.view(FORMATS[format])


def tensor(source: np.ndarray, format: str) -> torch.Tensor:
    return torch.from_numpy(source.view(np.int32 if format == "F32" else np.int16)).view(TORCH[format])


def losses_by_torch(source: np.ndarray, format: str, dtype: str) -> Losses:
    """The counts from torch's own conversion, and the error in float64."""
    x = tensor(source, format)
    y = x.to(getattr(torch, dtype))
    finite, kinds = x.isfinite(), torch.finfo(y.dtype)
    wide, result = x.double(), y.double()
    normal = finite & y.isfinite() & (wide.abs() >= kinds.smallest_normal)
    error = ((result - wide).abs() / wide.abs())[normal]
    becomes = (
        (result != 0) & (result.abs() < kinds.smallest_normal) & (wide.abs() >= torch.finfo(x.dtype).smallest_normal)
    )
    return Losses(
        x.numel(),
        int((~finite).sum()),
        int((finite & y.isinf()).sum()),
        int((finite & (wide != 0) & (result == 0)).sum()),
        int((finite & becomes).sum()),
        float(np.float32(error.max())) if error.numel() else 0.0,
    )


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_losses_are_those_of_torchs_conversions(format, dtype):
    source = samples(format)
    assert source.size > CHUNK
    assert count_losses(source, format, dtype) == losses_by_torch(source, format, dtype)
    # Value by value too, so that no two mistakes cancel.
    for part in np.array_split(source, 97):
        assert count_losses(part, format, dtype) == losses_by_torch(part, format, dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "kind"),
    [
        (65519.996, "float16", None),
        (65520.0, "float16", "overflowed"),
        (-1e30, "float16", "overflowed"),
        (2.0**-25, "float16", "underflowed"),
        (-1e-45, "float16", "underflowed"),
        (2.0**-24, "float16", "subnormal"),
        (2.0**-14 * (1 - 2.0**-11), "float16", None),  # a tie that becomes the smallest normal number
        (float(np.nextafter(np.float32(2.0**-14 * (1 - 2.0**-11)), np.float32(0))), "float16", "subnormal"),
        (2.0**-14, "float16", None),
        (0.0, "float16", None),
        (np.nan, "float16", "nonfinite"),
        (-np.inf, "bfloat16", "nonfinite"),
        (3.4e38, "bfloat16", "overflowed"),
        (1e-41, "bfloat16", "underflowed"),  # 2^-134 and below; float32's smallest number is 2^-149
        (1e38, "bfloat16", None),
        (3.4e38, "float32", None),
    ],
)
def test_a_value_is_counted_as_what_becomes_of_it(value, dtype, kind):
    found = count_losses(np.array([1.0, value, -2.0], np.float32), "F32", dtype)
    counts = {"nonfinite": 0, "overflowed": 0, "underflowed": 0, "subnormal": 0} | ({kind: 1} if kind else {})
    assert {name: getattr(found, name) for name in counts} == counts
    assert found.any == (kind is not None)
    assert found.values == 3


def test_losses_of_nothing_and_of_parts():
    assert count_losses(np.empty((0, 7), np.float32), "F32", "float16") == Losses()
    source = float32_samples()
    parts = [count_losses(part, "F32", "float16") for part in (source[:1000], source[1000:])]
    assert parts[0] + parts[1] == count_losses(source, "F32", "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_in_place_is_torchs_way_there_and_back(dtype):
    values = float32_samples()
    want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    round_to(values, dtype)
    np.testing.assert_array_equal(values, want)
    np.testing.assert_array_equal(np.signbit(values)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])
