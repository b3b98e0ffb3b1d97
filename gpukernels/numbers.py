"""What counts as a number, for ops and for `model`."""

import math
from typing import Any

import numpy as np


def whole(value: Any) -> bool:
    """Whether `value` is an integer, of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, of Python or NumPy; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
