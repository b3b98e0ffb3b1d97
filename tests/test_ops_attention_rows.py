"""Plain torch's attention of one row after the other, on the CPU: what it must do as all rows at once did."""

import pytest
import torch

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
