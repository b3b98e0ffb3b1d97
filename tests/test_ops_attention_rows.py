"""Plain torch's attention of one row after the other, on the CPU: what it must do as all rows at once did."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gpukernels import attention, cached_attention


def arrays(new: int = 3) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, and the lengths of two rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 8, generator=generator) for n, heads in ((new, 4), (9, 2), (9, 2)))
    return q, k, v, torch.tensor([9, 5])


@pytest.mark.parametrize("window", [None, 2])
def test_another_default_device_changes_nothing(window):
    q, k, v, lengths = arrays()
    wanted = attention(q, k, v, lengths=lengths, window=window)
    with torch.device("meta"):
        found = attention(q, k, v, lengths=lengths, window=window)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_traces_see_lengths_that_have_no_values():
    q, k, v, lengths = arrays()
    wanted = attention(q, k, v, lengths=lengths)
    each = torch.func.vmap(lambda q, k, v, n: attention(q[None], k[None], v[None], lengths=n[None])[0])
    torch.testing.assert_close(each(q, k, v, lengths), wanted)
    _, slope = torch.func.jvp(lambda v: attention(q, k, v, lengths=lengths), (v,), (v,))  # linear in v
    torch.testing.assert_close(slope, wanted)
    traced = torch.jit.trace(lambda *each: attention(*each[:3], lengths=each[3]), (q, k, v, lengths), check_trace=False)
    other = torch.tensor([4, 9])
    torch.testing.assert_close(traced(q, k, v, other), attention(q, k, v, lengths=other))
    with FakeTensorMode() as mode:
        q, k, v, lengths = (mode.from_tensor(each) for each in (q, k, v, lengths))
        assert attention(q, k, v, lengths=lengths).shape == q.shape


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("first", [10, 12, 20, -3])
def test_positions_beyond_the_cache_are_not_written(first, new):
    q, k, v, _ = arrays(new)
    lengths, keys, values, written = torch.tensor([first, 5]), -k, -v, (-k, -v)
    found = cached_attention(q, k[:, :new], v[:, :new], *written, lengths)
    for position in range(first - new, first):
        if 0 <= position < 9:
            keys[0, position], values[0, position] = k[0, position - first + new], v[0, position - first + new]
    keys[1, 5 - new : 5], values[1, 5 - new : 5] = k[1, :new], v[1, :new]
    assert torch.equal(written[0], keys)
    assert torch.equal(written[1], values)
    # With a gradient all rows are computed at once.
    wanted = attention(q.requires_grad_(), keys, values, lengths=lengths)
    torch.testing.assert_close(found, wanted.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 2])
def test_an_infinite_key_is_seen_by_those_alone_whom_nothing_hides_it_from(window, dtype):
    """Behind some queries, and in front of the window of others; and the row beside it keeps its bits."""
    q, k, v = (array.to(dtype) for array in arrays(5)[:3])
    lengths = torch.tensor([9, 8])
    plain = attention(q, k, v, lengths=lengths, window=window)
    k[0, 6] = torch.inf
    found = attention(q, k, v, lengths=lengths, window=window)
    seen = [False, False, True, True, window is None]
    assert found[0].isnan().flatten(1).any(1).tolist() == seen
    torch.testing.assert_close(found[0, :2], plain[0, :2], rtol=1e-2, atol=1e-2)
    assert torch.equal(found[1], plain[1])
