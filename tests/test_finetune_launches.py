"""A step of training as it is launched on a GPU, and the memory that it takes: GPT-2 124M, 16 x 1024, bfloat16.

On tensors without data: nothing is computed, and nothing compiled.
"""

import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from gpukernels.compile_report.recording import stand_in
from gpukernels.library.registry import LAUNCHERS
from model import PRESETS
from model.architecture import architecture
from model.device import TorchDevice
from model.finetune.batches import Batches
from model.finetune.distributed import World
from model.finetune.memory import training_needs
from model.finetune.modules import Network
from model.finetune.packing import Windows
from model.finetune.settings import Settings
from model.finetune.train import Trainer
from model.memory import weight_bytes
from model.parameters import Parameters

CONFIG, BATCH = PRESETS["gpt2"], 16
LARGE = 2**20  # elements: a weight or an activation, and no bias


class Watched(TorchDispatchMode):
    """Launchers in place of our ops; counts torch's own launches on large arrays, and the bytes alive at most."""

    def __init__(self):
        super().__init__()
        self.large, self.alive, self.now, self.most = Counter(), {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gpukernels":
            with self:
                return LAUNCHERS[op._schema.name.removeprefix("gpukernels::")](*args)
        found = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("aten::").partition(".")[0]
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns)
        sizes = [x.numel() for x in (*tensors_of(args), *tensors_of(found))]
        # Where there is no data, a copy of many arrays is made of copies.
        if not views and not name.startswith(("empty", "copy_")) and max(sizes, default=0) >= LARGE:
            self.large[name] += 1
        for x in tensors_of(found):
            self._keep(x.untyped_storage())
        return found

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # as torch's allocator rounds
        if key in self.alive:
            return

        def freed(_):
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def tensors_of(values):
    values = values if isinstance(values, list | tuple) else [values]
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_of(each)


@pytest.fixture(scope="module")
def step():
    return steps(CONFIG, BATCH, "bfloat16")


def steps(config, batch: int, dtype: str, context: int = 1024, **options) -> tuple[list[str], Watched]:
    """The names of our kernels in a step, in order, and what was watched of torch's."""
    kernels: list[str] = []
    tokens = np.zeros((2 * batch, context), np.int32)
    windows = Windows(tokens, tokens, tokens + np.arange(context, dtype=np.int32), tokens)
    settings = Settings.of(options)
    none = Windows(*(each[:0] for each in windows))
    with pytest.MonkeyPatch.context() as patched, stand_in(90), Watched() as watched:
        patched.setattr(JITFunction, "run", lambda kernel, *_, **options: kernels.append(kernel.fn.__name__))
        parameters = Parameters(architecture(config).slots(config), TorchDevice("meta"), dtype)
        run = Trainer(
            Network(parameters, config, recompute=settings.recompute),
            *(Batches(each, batch, 1, 0, World()) for each in (windows, none)),
            settings,
            world=World(),
            started={},
        )
        for number in range(2):  # the second as all that follow
            kernels.clear()
            watched.large.clear()
            run.gradient(number)
            run.optimizer.norm()
            run.optimizer.step(1e-4, 0.5)
    return kernels, watched


def test_torch_launches_next_to_nothing_of_its_own_on_weights_and_activations(step):
    """Products, norms, residual connections and their gradients are in kernels of ours, whole."""
    _, watched = step
    # The gradients into the optimizer's buffer and their norm, and the sum of the token table's two.
    assert watched.large == {"_foreach_copy_": 1, "linalg_vector_norm": 1, "add": 1}


def test_launches_of_a_step(step):
    kernels, _ = step
    forward = {"_norm_forward_kernel": 2, "_product_descriptor_kernel": 4, "_attention_forward_kernel": 1}
    # dx and dweight of four products; of three the bias alone, of one the activation too. A split sum has another.
    backward = {"_norm_backward_kernel": 2, "_product_descriptor_kernel": 8, "_activation_backward_kernel": 4}
    backward |= {"_attention_delta_kernel": 1, "_attention_backward_keys_kernel": 1}
    backward |= {"_attention_backward_queries_kernel": 1}
    found, layer = Counter(kernels), Counter(forward) + Counter(backward)
    outside = found - Counter({name: CONFIG.n_layer * count for name, count in layer.items()})
    sums = outside.pop("_add_partials_kernel")
    assert 2 + 4 <= sums / CONFIG.n_layer <= 2 + 4 + 4 + 1
    chunks = 4
    assert outside == {
        "_embedding_forward_kernel": 1,
        "_embedding_backward_kernel": 2,
        "_norm_forward_kernel": 1,
        "_norm_backward_kernel": 1,
        "_product_descriptor_kernel": 3 * chunks,
        "_cross_entropy_kernel": chunks,
        "_total_kernel": 1,
        "_scale_kernel": 2,
        "_adamw_kernel": 1,
    }


def test_memory_of_a_step(step):
    """Weights twice (the loaded model keeps its own), a gradient, and in float32 weights and two moments: 2.24 GB.

    The rest is what the backward pass needs, and a chunk of logits.
    """
    _, watched = step
    assert watched.most <= 7.8e9


LLAMA = replace(PRESETS["tinyllama-1.1b"], num_hidden_layers=3)


@pytest.mark.parametrize(
    ("config", "batch", "dtype", "options"),
    [
        (CONFIG, 16, "bfloat16", {}),
        (CONFIG, 16, "float16", {"recompute": True}),
        (replace(CONFIG, n_layer=4), 3, "float32", {}),
        (LLAMA, 8, "bfloat16", {}),
    ],
    ids=["gpt2", "recomputed", "float32", "llama"],
)
def test_memory_is_predicted_within_a_tenth(step, config, batch, dtype, options):
    """Beside the model, what a run is refused for where it does not fit."""
    watched = step[1] if (config, batch, options) == (CONFIG, BATCH, {}) else steps(config, batch, dtype, **options)[1]
    slots = {slot.name: slot for slot in architecture(config).slots(config)}
    head = "head.weight" in slots
    needs = training_needs(
        config,
        Settings.of(options),
        list(slots),
        head=head,
        dtype=dtype,
        copied=False,
        tokens=1024 * batch,
        on_gpu=True,
    )
    assert sum(needs.values()) + weight_bytes(config, dtype) == pytest.approx(watched.most, rel=0.1)
