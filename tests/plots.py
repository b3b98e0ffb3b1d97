"""Plots where matplotlib is installed, and what stands in their place where it is not."""

import sys
from importlib.util import find_spec

import pytest

MATPLOTLIB = find_spec("matplotlib") is not None

#: What a page has for each plot.
PLOT = "<svg" if MATPLOTLIB else "(No plot, as matplotlib is not installed"

needs_matplotlib = pytest.mark.skipif(not MATPLOTLIB, reason="draws with matplotlib")


@pytest.fixture
def no_matplotlib(monkeypatch):
    """A machine without it."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
