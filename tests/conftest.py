"""One thread for every test process, the checkout on its path, and the fixtures that several files share."""

import os
from pathlib import Path

# Before NumPy is imported. OpenBLAS's and OpenMP's threads wait for one another by spinning: beside any
# other load a small product then takes a hundred times as long, and no test here is large.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# What a test starts in another folder finds this checkout too, where nothing is installed.
paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)

from command import refused, run  # noqa: E402, F401
from hub_model import hub, impatient  # noqa: E402, F401
from plots import no_matplotlib  # noqa: E402, F401
from refusals import computing_nothing  # noqa: E402, F401
