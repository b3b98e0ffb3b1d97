"""Every op on the user's own device, against float64, in units of the error that it may have.

    for verdict in verify("layer_norm", "float16", torch.device("cuda")):
        print(verdict.way, verdict.worst, verdict.case)

The truths are in `truth` (and `truth_loss`, `truth_optimizer`), the bound too; gradients are torch's of the
plain ops in float64.
"""

from gpukernels.verify.parallel import gather
from gpukernels.verify.run import DTYPES, OPS, Verdict, dtypes_of, verify

__all__ = ["DTYPES", "OPS", "Verdict", "dtypes_of", "gather", "verify"]
