"""What counts as a number, for ops and for `model`."""

import math
import sys
from typing import Any

import numpy as np


def whole(value: Any) -> bool:
    """Whether `value` is an integer, of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, of Python or NumPy; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    # Compared, as torch.compile can trace, where `math.isfinite` of a number that changes would break the graph.
    if isinstance(value, int | np.integer):
        return -sys.float_info.max <= value <= sys.float_info.max
    return -math.inf < value < math.inf
