"""Calls that an op must refuse, in which words, and how they are made for either library."""

from collections.abc import Callable

import numpy as np
import pytest
from truth import Kind

import gpukernels
from gpukernels import numpy_ops, torch_ops

NO_FLOAT, NO_INT = "must be a floating-point array", "must be int32 or int64"


def makers(library: str) -> tuple[Callable, Callable]:
    """f(*shape) makes floats and i(*values) integers, of the library's."""

    def f(*shape, dtype="float32"):
        return Kind(library, dtype).array(np.ones(shape))

    return f, lambda *values, dtype="int32": Kind(library, dtype).array(values)


def refuses(call: Callable, error: type[Exception], message: str) -> None:
    """The call raises just this error with just this message."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message


@pytest.fixture
def computing_nothing(monkeypatch):
    """Whatever an op calls to compute fails."""

    def computed(*arrays, **options):
        raise AssertionError("this was computed")

    for module in (numpy_ops, torch_ops):
        for name in set(gpukernels.__all__) & set(vars(module)):
            monkeypatch.setattr(module, name, computed)
