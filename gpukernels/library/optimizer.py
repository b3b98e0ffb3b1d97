"""`adamw` as a torch op that changes its arguments."""

import torch

from gpukernels import torch_ops
from gpukernels.kernels import optimizer as kernels
from gpukernels.library.registry import define


def _changed(parameter, first_moment, second_moment, master):
    """Tells autograd, which looks away below the dispatcher."""
    arrays = (parameter, first_moment, second_moment, master)
    torch.autograd.graph.increment_version([x for x in arrays if x is not None and not x.is_inference()])


def _launch(parameter, gradient, first_moment, second_moment, master, *rest):
    kernels.adamw(parameter, gradient, first_moment, second_moment, master, *rest)
    _changed(parameter, first_moment, second_moment, master)


def _plain(
    parameter,
    gradient,
    first_moment,
    second_moment,
    master,
    step,
    learning_rate,
    gradient_scale,
    beta1,
    beta2,
    eps,
    weight_decay,
    decayed,
):
    torch_ops.adamw(
        parameter,
        gradient,
        first_moment,
        second_moment,
        step=step,
        learning_rate=learning_rate,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        decayed=decayed,
        master=master,
        gradient_scale=gradient_scale,
    )
    _changed(parameter, first_moment, second_moment, master)


_adamw = define(
    "adamw(Tensor(a!) parameter, Tensor gradient, Tensor(b!) first_moment, Tensor(c!) second_moment, "
    "Tensor(d!)? master, Tensor step, Tensor learning_rate, Tensor? gradient_scale, float beta1, float beta2, "
    "float eps, float weight_decay, int decayed) -> ()",
    launch=_launch,
    plain=_plain,
    fake=lambda *arguments: None,
)


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
    arrays = (parameter, gradient, first_moment, second_moment, master, step, learning_rate, gradient_scale)
    arrays = (None if x is None else x.detach() for x in arrays)
    _adamw(*arrays, *betas, eps, weight_decay, parameter.shape[0] if decayed is None else decayed)
