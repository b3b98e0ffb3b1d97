"""What counts as a number, for ops and for `model`."""

from typing import Any

import numpy as np


def whole(value: Any) -> bool:
    """Whether `value` is an integer, of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
