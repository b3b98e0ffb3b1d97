"""What is worked out once for Triton's interpreter: no size of a block is taken that Triton itself refuses."""

import numpy as np
import pytest

tl = pytest.importorskip("triton.language")


def test_a_size_that_triton_refuses_is_refused_behind_one_that_equals_it(monkeypatch):
    from gpukernels.verify.interpreter import _shaped_once

    monkeypatch.setattr(tl.block_type, "__init__", _shaped_once(tl.block_type.__init__))
    first = tl.block_type(tl.float32, [tl.constexpr(2)])
    again = tl.block_type(tl.float32, [2])
    assert (again, again.numel, again.name) == (first, first.numel, first.name)
    for size in (2.0, np.int64(2)):
        with pytest.raises((TypeError, AttributeError)):
            tl.block_type(tl.float32, [size])
