"""The libraries and dtypes that a test of an op runs over."""

import pytest
from truth import Kind

from gpukernels.verify.truth import UNIT

KINDS = [Kind("numpy", dtype) for dtype in UNIT if dtype != "bfloat16"] + [Kind("torch", dtype) for dtype in UNIT]
every_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)
numpy_kinds = pytest.mark.parametrize("kind", KINDS[:3], ids="-".join)
both = pytest.mark.parametrize("library", ["numpy", "torch"])
