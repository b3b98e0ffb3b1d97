"""Plain torch's attention of one row after the other, on the CPU: what it must do as all rows at once did."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gpukernels import attention


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
