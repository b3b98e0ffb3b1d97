"""What the forward passes of all architectures do alike."""

from collections.abc import Callable, Mapping

from gpukernels import linear


def onto_stream(p: Mapping, name: str, y, x, drop: Callable | None):
    """x + y W^T + b, the product of layer `name` added to the residual stream; `drop` is applied to what is added."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    return linear(y, weight, bias, residual=x) if drop is None else x + drop(linear(y, weight, bias))


def output_matrix(root: Mapping) -> str:
    """The name of the matrix that makes logits: one of its own, or the token table."""
    return "head.weight" if "head.weight" in root else "tokens.weight"
