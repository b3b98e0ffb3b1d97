"""Muon: steps of momentum along its nearest orthogonal matrix (K. Jordan et al., "Muon: An optimizer for hidden
layers in neural networks", 2024), for the matrices inside the blocks; what is no such matrix is AdamW's.

Every direction of a weight then moves by about as much, which AdamW leaves to the gradient's few large ones: fewer
steps from scratch. The update's size is that of AdamW's, so that one rate serves both (Liu et al., arXiv 2502.16982).
"""

import torch

MOMENTUM = 0.95

# Of an odd polynomial that takes a singular value from (0, 1] to about 1, steeply: 0.7 to 1.2 after five rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5

# Root mean square of an update of AdamW (Liu et al., section 2.2).
_SIZE = 0.2


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns), each with its singular values replaced by numbers near 1, and its vectors kept.

    Newton-Schulz rounds in the dtype given, on the smaller of the two Gram matrices; 0 stays 0.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    smallest = torch.finfo(x.dtype).tiny
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(smallest)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x


@torch.no_grad()
def muon(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    stacked: int = 1,
) -> None:
    """One update, in place.

    Args:
        weight, gradient, momentum: (rows, columns), of one dtype, float32 or wider; momentum is 0 at first.
        learning_rate: that of an AdamW beside it.
        weight_decay: decoupled, as AdamW's.
        stacked: so many matrices lie one below the other in weight, as queries, keys and values do: each is made
            orthogonal by itself.

    On CUDA the rounds are bfloat16, which the polynomial forgives: it aims at "near 1" only.
    """
    momentum.lerp_(gradient, 1 - MOMENTUM)
    direction = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
    parts = direction.view(stacked, -1, direction.shape[-1])
    change = orthogonalized(parts.bfloat16() if parts.is_cuda else parts).to(weight.dtype)
    size = _SIZE * max(parts.shape[1:]) ** 0.5
    weight.mul_(1 - learning_rate * weight_decay).add_(change.reshape(weight.shape), alpha=-learning_rate * size)
