"""The runtimes that `bench.generate` compares on a GPU, each by one call: prompts in, greedy tokens out.

All have the same random weights, drawn on the device in the process of each: transformers' are copied from ours,
plain torch's are the very same tensors. Everything runs on CPU tensors too, uncaptured.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.torch_decoder import TorchDecoder, again, cuda_graph
from model.architecture import architecture
from model.config import Config
from model.decoder import Decoder
from model.device import NumpyDevice, TorchDevice
from model.forward import output_matrix
from model.generate import Limits, Row, run
from model.language_model import LanguageModel
from model.names import HEAD
from model.parameters import Parameters
from model.persistent import PersistentDecoder, why_not_persistent
from model.sampling import Sampling

OURS, EAGER, PERSISTENT = "ours, captured", "ours, eager", "ours, persistent"
TRANSFORMERS, COMPILED = "transformers eager", "transformers static + compile"
GRAPH = "torch + CUDA graph"
NUMPY, JUDGE = "ours, NumPy float32", "judge"

#: How far two ways of adding up a float16 step may be from each other, of the largest logit: a rounding for each
#: of a dozen layers. With bfloat16's eight times wider roundings it is two.
STEP_ERROR = 2.0**-7

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


def random_model(config: Config, device: torch.device, dtype: str, seed: int = 0) -> LanguageModel:
    """Weights drawn on the device, large enough that a text does not only repeat its last token."""
    parameters = Parameters(architecture(config).slots(config), TorchDevice(device), dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, array in parameters.items():
        if array.ndim == 2:
            array.normal_(0, array.shape[1] ** -0.5 if name.startswith("blocks.") else 0.02, generator=generator)
        else:
            array.fill_(float(name.endswith(".weight")))
    return LanguageModel(config, parameters, eos_token_ids=())


class Ours:
    """`LanguageModel.generate`, as a user calls it."""

    def __init__(self, lm: LanguageModel):
        self._lm = lm

    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        found = self._lm.generate([list(each) for each in prompts], max_new_tokens=new, batch_size=len(prompts))
        return [each.tokens for each in found]


class OursEager:
    """The same loop over the decoder that launches op by op, or over another one."""

    def __init__(self, lm: LanguageModel, decoder: Callable[..., Decoder] = Decoder):
        self._lm, self._decoder, self._decoders = lm, decoder, {}

    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        config, slots = self._lm.config, len(prompts)
        if slots not in self._decoders:
            made = self._decoder(self._lm.parameters, config, rows=slots, capacity=config.n_positions)
            self._decoders = {slots: made}
        limits = Limits(config.n_positions, frozenset(), "error", new)
        options = {"limits": limits, "sampling": Sampling(), "seed": 0, "stops": (), "tokenizer": None}
        rows = [Row(list(prompt), stream=stream, **options) for stream, prompt in enumerate(prompts)]
        for _ in run(self._decoders[slots], rows, slots=slots, limits=limits):
            pass
        return [row.tokens for row in rows]


class Transformers:
    """transformers' `generate`; static: its static cache, for which it compiles the step by itself on CUDA."""

    def __init__(self, lm: LanguageModel, dtype: torch.dtype, *, static: bool = False):
        import transformers

        config, device = lm.config, lm.parameters["tokens.weight"].device
        values = config.to_json() | {"bos_token_id": None, "eos_token_id": None}
        theirs = transformers.AutoConfig.for_model(**values)
        with torch.device(device):
            self._model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype).eval()
        self._model.load_state_dict(dict(_theirs(lm)))
        self._device = device
        self._options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if static:
            self._options |= {"cache_implementation": "static"}
            if hasattr(transformers.GenerationConfig(), "max_cache_len"):
                self._options |= {"max_cache_len": config.n_positions}  # one size, compiled once

    @torch.no_grad()
    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor([list(each) for each in prompts], device=self._device)
        mask = torch.ones_like(ids)
        found = self._model.generate(ids, attention_mask=mask, max_new_tokens=new, **self._options)
        return found[:, ids.shape[1] :].tolist()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self._model(torch.tensor([list(ids)], device=self._device)).logits[0].float().cpu().numpy()


def _theirs(lm: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Our weights by transformers' names, as it lays them out."""
    prefix, parameters = architecture(lm.config).PREFIX, lm.parameters
    for name, array in parameters.items():
        slot = parameters.slots[name]
        if slot.source != HEAD:
            yield prefix + slot.source, array.T if slot.transposed else array
    yield HEAD, parameters[output_matrix(parameters.root)]


class TorchGraph:
    """`TorchDecoder`; one for each number of rows and each length, captured before it is timed."""

    def __init__(self, lm: LanguageModel):
        self._lm, self._made = lm, {}
        self._capture = cuda_graph if lm.parameters.device.name.startswith("cuda") else again

    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        rows, capacity = len(prompts), -(-(len(prompts[0]) + max(new, 64)) // 64) * 64
        if (rows, capacity) not in self._made:
            config, weights = self._lm.config, self._lm.parameters
            decoder = TorchDecoder(weights, config, rows=rows, capacity=capacity, capture=self._capture)
            self._made = {(rows, capacity): decoder}
        return self._made[rows, capacity].generate(prompts, new)


class OursPersistent(OursEager):
    """The loop over the decoder whose step is one launch, in a CUDA graph of its own.

    Before its first answer for so many prompts, a step's logits are compared with the eager step's.
    """

    def __init__(self, lm: LanguageModel, **options: Any):
        """options: of the decoder, beside rows and capacity."""
        super().__init__(lm, partial(PersistentDecoder, **options))

    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts) not in self._decoders:
            error = self.step_error(prompts)
            if not error <= STEP_ERROR:
                raise RuntimeError(f"a step's logits are {error:.1e} of the largest from the eager step's")
        return super().__call__(prompts, new)

    def step_error(self, prompts: Prompts, steps: int = 4) -> float:
        """How far logits are from the eager step's in the worst of a few steps, as a share of the largest one."""
        lm, rows, worst = self._lm, len(prompts), 0.0
        options = {"rows": rows, "capacity": lm.config.n_positions}
        eager, ours = (make(lm.parameters, lm.config, **options) for make in (Decoder, self._decoder))
        for row, prompt in enumerate(prompts):
            eager.start(row, list(prompt), Sampling())
        for _ in range(steps):
            # From the same state, whatever token the last step chose.
            ours.lengths = list(eager.lengths)
            for mine, other in ((ours.cache, eager.cache), (ours, eager)):
                for name, array in vars(mine).items():
                    if isinstance(array, torch.Tensor):
                        array.copy_(getattr(other, name))
            logits = eager._logits(rows, eager.capacity).float()
            eager.step(rows)()
            ours.step(rows)()
            difference = (ours.step_logits(rows).float() - logits).abs().max() / logits.abs().max()
            worst = max(worst, float(difference))
        return worst


def on_numpy(lm: LanguageModel) -> Generate:
    """The same weights on the host."""
    parameters = Parameters(lm.parameters.slots.values(), NumpyDevice(), "float32")
    for name, array in lm.parameters.items():
        parameters[name] = array.float().cpu().numpy()
    return Ours(LanguageModel(lm.config, parameters, eos_token_ids=()))


def judge(lm: LanguageModel) -> Transformers:
    """transformers in float32, with the same weights."""
    return Transformers(lm, torch.float32)


def _persistent(lm: LanguageModel) -> Generate:
    if why := why_not_persistent(lm.parameters, lm.config):
        raise RuntimeError(why)
    return OursPersistent(lm)


#: What makes each of a model.
RUNTIMES: dict[str, Callable[[LanguageModel], Generate]] = {
    OURS: Ours,
    EAGER: OursEager,
    PERSISTENT: _persistent,
    GRAPH: TorchGraph,
    TRANSFORMERS: lambda lm: Transformers(lm, lm.parameters["tokens.weight"].dtype),
    COMPILED: lambda lm: Transformers(lm, lm.parameters["tokens.weight"].dtype, static=True),
    NUMPY: on_numpy,
    JUDGE: judge,
}


def chosen(device: str, *, compiled: bool, persistent: bool = False) -> list[str]:
    """The runtimes that can be compared here; transformers' need it to be installed."""
    from bench.providers import installed

    cuda, theirs = device.startswith("cuda"), installed("transformers")  # elsewhere nothing is captured
    wanted = {OURS: cuda, PERSISTENT: cuda and persistent, TRANSFORMERS: theirs, COMPILED: theirs and compiled}
    return [name for name in (OURS, EAGER, GRAPH, PERSISTENT, TRANSFORMERS, COMPILED) if wanted.get(name, True)]


class Runtime:
    """One of `RUNTIMES` with random weights of its own, the same in every process."""

    def __init__(self, name: str, config: Config, device: str, dtype: str):
        lm = random_model(config, torch.device(device), dtype)
        self._run = RUNTIMES[name](lm)
        self._warm_up = lm.warm_up if name == OURS else None

    def warm_up(self, batch: int) -> dict[str, Any]:
        """The seconds, or the fault: the answers may still come."""
        if self._warm_up is None:
            return {}
        try:
            return {"warm_up_seconds": self._warm_up(batch)}
        except Exception as fault:
            return {"warm_up_fault": said(fault)}

    def generate(self, prompts: Prompts, new: int) -> list[list[int]]:
        return self._run(prompts, new)

    def regret(self, prompts: Prompts, answers: Prompts) -> float:
        """Of the judge: how far below the best logit a chosen token's is, at worst, as a share of the largest."""
        worst = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = self._run.logits([*prompt, *answer])[len(prompt) - 1 : -1]
            behind = logits.max(1) - logits[np.arange(len(answer)), answer]
            worst = max(worst, float((behind / np.abs(logits).max(1)).max()))
        return worst


def said(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}".splitlines()[0]
