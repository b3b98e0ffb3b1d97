"""Steps of training through the kernels, forward, backward and update: each is plain torch's in float64."""

import contextlib

import finetuning
import pytest
import torch
from finetuning import documents, trainer
from kernel_cases import DEVICE

import gpukernels
import model
from gpukernels import torch_ops
from gpukernels.verify.truth import UNIT
from model.finetune.optimizer import clipping

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny", n_layer=1)


@contextlib.contextmanager
def kernels_only():
    """No plain op may stand in for a kernel."""
    with pytest.MonkeyPatch.context() as patched:
        for name in set(gpukernels.__all__) & set(vars(torch_ops)):
            patched.setattr(torch_ops, name, lambda *args, **options: pytest.fail("plain torch ran"))
        yield


def pair(folder, dtype, **options):
    """A run by the kernels and one of the same weights in float64, whose passes are as large."""
    lm = model.load(folder, device=torch.device(DEVICE), dtype="float32")
    options = {"batch_size": 1, "accumulate": 2, "weight_decay": 0.1, "clip": 0.5, **options}
    return [trainer(lm, documents(16, longest=30), dtype=each, **options) for each in (dtype, torch.float64)]


def update(run, step: int) -> tuple[float, torch.Tensor]:
    """One step as the trainer makes it, with every length of a sum and every buffer; the loss and the gradient."""
    total, targets = run.gradient(step)
    gradient = run.optimizer.whole.clone()
    norm = run.optimizer.norm().item() / run.scale.value
    run.optimizer.step(1e-2, clipping(norm, run.settings.clip) / run.scale.value)
    return total.item() / targets, gradient / run.scale.value


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_steps_are_plain_torchs(folder, recompute):
    run, truth = pair(folder, torch.float32, recompute=recompute)
    assert (run.train.windows.documents != run.train.windows.documents[:, :1]).any()
    # As in test_model.py: a layer of six ops and the head, forward and back, each a few roundings and sums of up to
    # 192 terms; by the largest values of an array, within a norm's amplification, 8 here.
    limit = 8 * (2 * 7 * 4 + 7 * 192**0.5) * UNIT["float32"]
    for step in range(STEPS):
        # From the same weights and moments: what a step does, not what rounding grows to.
        for mine, theirs in zip(run.optimizer.buffers().values(), truth.optimizer.buffers().values(), strict=True):
            theirs.copy_(mine)
        with kernels_only():
            loss, gradient = update(run, step)
        true_loss, true_gradient = update(truth, step)
        assert abs(loss - true_loss) <= limit * abs(true_loss)
        for name in run.optimizer.places:
            mine, theirs = (r.optimizer.view(g, name) for r, g in ((run, gradient), (truth, true_gradient)))
            assert (mine.double() - theirs).abs().max() <= limit * max(1e-2, theirs.abs().max())
        # Each weight moves by the rate times a ratio of moments, which is off by what the gradient is, relatively:
        # where the gradient is nothing but rounding, by all of it.
        moved = run.optimizer.parameter.double() - truth.optimizer.parameter
        size = true_gradient.abs()
        relative = limit * max(1e-2, size.max()) / size.clamp(min=1e-30)
        assert (moved.abs() <= 1e-2 * (2 * relative).clamp(max=4) + 4 * UNIT["float32"] * (1 + moved.abs())).all()


def test_float16_moves_the_exact_weights_by_its_own_gradient(folder):
    """What the loss scale and the clipping leave of a float16 gradient, in float64, and one update of it."""
    run, truth = pair(folder, torch.float16)
    assert run.scale.value > 1
    before = run.optimizer.master.double()
    truth.optimizer.set(before)
    with kernels_only():
        loss, gradient = update(run, 0)
    true_loss = truth.gradient(0)[0].item() / truth.train.targets(truth.train.of_step(0))
    assert gradient.isfinite().all()
    truth.optimizer.gradient.copy_(gradient)
    truth.optimizer.step(1e-2, clipping(gradient.double().norm().item(), 0.5))
    exact = truth.optimizer.parameter
    # A dozen operations of float32, and the gradient's norm: the moments' ratio is 1 at most to begin with.
    assert (run.optimizer.master - exact).abs().max() <= 64 * UNIT["float32"] * (1 + exact.abs().max())
    assert torch.equal(run.optimizer.parameter, run.optimizer.master.half())
    assert not torch.equal(run.optimizer.master.double(), before)
    # The forward pass alone: 6 ops and the head, 4 roundings each, of values that a norm amplifies as above.
    assert abs(loss - true_loss) <= 8 * 7 * 4 * UNIT["float16"] * true_loss
