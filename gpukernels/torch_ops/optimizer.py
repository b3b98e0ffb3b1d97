"""Optimizers: in place, one whole array at a time."""

import math

import torch


@torch.no_grad()
def adamw(
    parameter,
    gradient,
    first_moment,
    second_moment,
    *,
    step,
    learning_rate,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decayed=None,
    master=None,
    gradient_scale=None,
):
    compute = first_moment.dtype
    g = gradient.to(compute)
    if gradient_scale is not None:
        g = g * gradient_scale
    first_moment.lerp_(g, 1 - betas[0])
    second_moment.lerp_(g.square(), 1 - betas[1])
    exact = parameter if master is None else master
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    correction1, correction2 = (-torch.expm1(step.to(compute) * log) for log in logs)
    # In place wherever an array is ours: on the CPU the memory of a result is half of what it costs.
    root = (second_moment / correction2).sqrt_().add_(eps)
    change = (first_moment / correction1).div_(root)
    if weight_decay:
        change[:decayed].add_(exact[:decayed], alpha=weight_decay)
    exact.sub_(change.mul_(learning_rate))
    if master is not None:
        parameter.copy_(master)
