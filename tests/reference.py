"""Random checkpoints written by transformers, and what transformers computes from them.

The judge runs a checkpoint twice: in float32, as a user of transformers would, and in float64, which
stands for the truth. Logits agree if they are within max(1e-4, 2 d) of both, d being the largest
distance between the two.
"""

import copy
import functools
import json
import math
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import reference_llama
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

#: What `model.load` is given for each of the two paths on the CPU.
PATHS = {"numpy": "cpu", "torch": torch.device("cpu")}

FLOOR = 1e-4
NEW_TOKENS = 64

# Two candidates may each be off by the floor in each of two runs: well above what that can turn round.
_MARGIN = 10 * FLOOR

_BASE = {
    "vocab_size": 97,
    "n_positions": 80,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": None,
    "eos_token_id": None,
}

_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
_HEADS = ((1, 11), (5, 3), (7, 5), (32, 2), (64, 2), (65, 4), (80, 2), (128, 2))  # width, number
_BY_LAYER = {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}

#: What the embedded model reads: its kind of English.
TEXT = """And it came to pass in the evening, when the work of the field was done, that the men of the
village sat down by the well, and the eldest among them spake, saying, Hear now, my sons, and keep that
which I tell you. A certain man had three servants, and he gave unto each of them a vineyard. The first
digged deep and planted, and the LORD blessed the vineyard, and it brought forth fruit in its season. The
second said in his heart, The rain will come, and wherefore should I rise before the sun? And thorns grew
up where the vines had been. But the third went from house to house, and asked of every man that which he
knew, and in the seventh year there was none like unto his vineyard, from the river even unto the sea."""

#: Configurations by name: what differs from `_BASE`.
CONFIGS: dict[str, dict] = {
    "default": {},
    **{f"activation {name}": {"activation_function": name} for name in _ACTIVATIONS},
    "epsilon 1e-3": {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    "epsilon 1e-6": {"layer_norm_epsilon": 1e-6, "tie_word_embeddings": False},
    "inner 37": {"n_inner": 37},
    "inner 193": {"n_inner": 193},
    "unscaled": {"scale_attn_weights": False},
    "by layer": _BY_LAYER,
    "unscaled by layer": {"scale_attn_weights": False, **_BY_LAYER},
    "upcast": {"reorder_and_upcast_attn": True},
    "upcast by layer": {"reorder_and_upcast_attn": True, **_BY_LAYER},
    "dropout": {"attn_pdrop": 0.25, "resid_pdrop": 0.375, "embd_pdrop": 0.125},
    "untied": {"tie_word_embeddings": False},
    "untied odd": {"tie_word_embeddings": False, "vocab_size": 131, "n_embd": 35, "n_head": 7, "n_inner": 101},
    "1 position": {"n_positions": 1},
    "7 positions": {"n_positions": 7},
    # More than the blocks of queries, scores and elements that the NumPy path cuts its work into.
    "301 positions": {"n_positions": 301, "n_layer": 1},
    **{f"heads of {width}": {"n_embd": width * heads, "n_head": heads} for width, heads in _HEADS},
    # Matrices of more than the 4 MiB that are read, cast and written at a time, and no multiple of it.
    "large matrices": {"n_embd": 516, "n_head": 4, "n_layer": 1, "vocab_size": 2053},
    "vocabulary 131": {"vocab_size": 131},
    "1 layer": {"n_layer": 1},
    "5 layers": {"n_layer": 5},
    "1 head": {"n_head": 1, "n_embd": 29},
    **reference_llama.CONFIGS,
}

#: The nearest configuration with the same weights that a runtime which overlooked a key would compute.
OVERLOOKED: dict[str, dict] = {
    **reference_llama.OVERLOOKED,
    **{
        f"activation {name}": {"activation_function": "gelu" if name.startswith("gelu_") else "gelu_new"}
        for name in _ACTIVATIONS
    },
    **{name: {"layer_norm_epsilon": 1e-5} for name in ("epsilon 1e-3", "epsilon 1e-6")},
    "unscaled": {"scale_attn_weights": True},
    **{
        name: {"scale_attn_by_inverse_layer_idx": False}
        for name in ("by layer", "unscaled by layer", "upcast by layer")
    },
}


def build(name: str, **changes) -> transformers.PreTrainedModel:
    """The model of a configuration, with weights in which no mistake can hide.

    transformers' own start (0.02, biases 0, norms 1) leaves every score and logit near 0. Here a product
    returns about 1.5 times the size of what it is given (deviation 1.5 / sqrt(fan in); over sqrt(2 L) where
    it joins the residual stream), so that scores and logits are a few units wide; every bias and norm
    counts, and positions outweigh tokens, which keeps greedy paths from running in circles. Tables that are
    not the head too are near GPT-2's 0.02: an epsilon shows only beside small variances.
    """
    if name in reference_llama.CONFIGS:
        return reference_llama.build(name, **changes)
    config = transformers.GPT2Config(**{**_BASE, **CONFIGS[name], **changes})
    built = transformers.GPT2LMHeadModel(config).eval()
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    head = 1.5 / math.sqrt(config.n_embd)
    tokens, positions = (head, 1.5) if config.tie_word_embeddings else (0.02, 0.06)
    spreads = {"transformer.wte.weight": tokens, "transformer.wpe.weight": positions, "lm_head.weight": head}
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (".ln_" in key and key.endswith("weight")))
                continue
            # Products are stored (in, out).
            spread = spreads.get(key, 1.5 / math.sqrt(parameter.shape[0]))
            parameter.copy_(noise * spread / (math.sqrt(2 * config.n_layer) if "c_proj" in key else 1))
    return built


def from_pretrained(folder: Path, **options) -> transformers.PreTrainedModel:
    """The checkpoint as transformers loads it, in float32.

    transformers honours `reorder_and_upcast_attn` in its eager attention only.
    """
    if read_config(folder).get("reorder_and_upcast_attn"):
        options["attn_implementation"] = "eager"
    options.setdefault("dtype", torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def rewrite(source: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """`source`'s config beside other tensors."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_prefixed(source: Path, folder: Path, prefix: str = "") -> None:
    """Every name with this prefix in place of `transformer.`."""
    weights = {key.removeprefix("transformer."): value for key, value in read_weights(source).items()}
    rewrite(source, folder, {prefix + key: value for key, value in weights.items()})


def write_sharded(source: Path, folder: Path) -> None:
    from_pretrained(source).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert (folder / "model.safetensors.index.json").is_file()


def write_with_buffers(source: Path, folder: Path) -> None:
    """With the causal masks that old versions of transformers saved."""
    weights, size = read_weights(source), read_config(source)["n_positions"]
    for layer in range(read_config(source)["n_layer"]):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, size, size, dtype=torch.uint8).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(source, folder, weights)


def write_with_head(source: Path, folder: Path) -> None:
    """With the token table once more, as the head that it is."""
    weights = read_weights(source)
    rewrite(source, folder, {"lm_head.weight": weights["transformer.wte.weight"].clone()} | weights)


def write_with_aliases(source: Path, folder: Path) -> None:
    """With the names of sizes that transformers has in common for all models."""
    rewrite(source, folder, read_weights(source))
    values = read_config(folder)
    for alias, key in transformers.GPT2Config.attribute_map.items():
        values[alias] = values.pop(key)
    (folder / "config.json").write_text(json.dumps(values))


def write_by_safetensors(source: Path, folder: Path) -> None:
    """As `save_model` does, which keeps one name of a tied pair: the head's."""
    rewrite(source, folder, {})
    save_model(from_pretrained(source), str(folder / "model.safetensors"))
    tied = read_config(source)["tie_word_embeddings"]
    assert ("transformer.wte.weight" not in read_weights(folder)) == tied


WRITERS = (
    write_sharded,
    write_prefixed,
    write_with_buffers,
    write_with_head,
    write_with_aliases,
    write_by_safetensors,
)


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Bit for bit, and tied alike."""
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@dataclass(frozen=True)
class Expected:
    """The judge's logits (B, T, V) for ids (B, T)."""

    ids: np.ndarray
    truth: np.ndarray  # float64
    theirs: np.ndarray  # float32

    @functools.cached_property
    def bound(self) -> float:
        return max(FLOOR, 2 * float(np.abs(self.theirs - self.truth).max()))

    def check(self, logits: np.ndarray) -> None:
        """Asserts that logits for all of the ids agree, at every position."""
        assert logits.dtype == np.float32
        close(logits, self.truth, self.bound, "float64")
        close(logits, self.theirs, self.bound, "transformers")


def close(logits: np.ndarray, reference: np.ndarray, bound: float, kind: str = "the reference") -> None:
    """Asserts equal shapes and |logits - reference| <= bound; NaN is close to nothing."""
    assert logits.shape == reference.shape
    error = np.abs(logits - reference)
    # NumPy's maximum is NaN where there is one.
    where = tuple(map(int, np.unravel_index(np.argmax(error), error.shape)))
    assert error[where] <= bound, f"{error[where]:.3g} from {kind} at {where}, allowed: {bound:.3g}"


class Judge:
    """transformers, running one checkpoint in float32 and in float64."""

    def __init__(
        self, folder: Path, *, weights: transformers.PreTrainedModel | None = None, text: list[int] | None = None
    ):
        """
        Args:
            weights: the model to run, where it is not what transformers makes of the folder.
            text: the ids that windows are cut from; None: random ids.
        """
        self.folder, self._text = folder, text
        self.float32 = from_pretrained(folder) if weights is None else weights
        self.config = self.float32.config
        self.float64 = copy.deepcopy(self.float32).double()
        self.float64.set_attn_implementation("eager")
        # What casts to float32 would be a step down here.
        reference_llama.widen(self.float64)
        for block in self.float64.transformer.h if isinstance(self.config, transformers.GPT2Config) else ():
            block.attn.reorder_and_upcast_attn = False
        self.expected = functools.cache(lambda batch, new: self.run(self.draw(batch, new)))
        self.greedy = functools.cache(self._greedy)

    @property
    def positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Shapes (B, T): one row and three, of one token, of half the positions, and of all."""
        most = self.positions
        return sorted({(1, 1), (3, 1), (1, (most + 1) // 2), (3, most)})

    def draw(self, batch: int, new: int, seed: int = 0) -> np.ndarray:
        """Ids (batch, new): random ones, or windows of the text."""
        random = np.random.default_rng([seed, batch, new])
        if self._text is None:
            return random.integers(0, self.config.vocab_size, (batch, new))
        starts = random.integers(0, len(self._text), batch)
        return np.stack([np.resize(np.roll(self._text, -start), new) for start in starts])

    def run(self, ids: np.ndarray) -> Expected:
        given = torch.from_numpy(ids)
        with torch.no_grad():
            return Expected(ids, self.float64(given).logits.numpy(), self.float32(given).logits.numpy())

    def generate(self, prompt: list[int], new: int = NEW_TOKENS) -> list[int]:
        """The tokens that transformers' greedy generation adds."""
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "use_cache": True}
        return self.float32.generate(ids, do_sample=False, max_new_tokens=new, **options)[0, len(prompt) :].tolist()

    def _greedy(self, length: int) -> tuple[list[int], list[int]]:
        """A prompt of this length and the tokens that must follow it, by transformers and by float64.

        The first of some prompts whose path rounding cannot turn: at every step float64's best token leads
        the second by `_MARGIN`. And it must not be too dull to tell anything: 8 different tokens or more.
        """
        new = min(NEW_TOKENS, self.positions - length)
        for seed in range(40):
            prompt = self.draw(1, length, seed)[0].tolist()
            path = self.generate(prompt, new)
            truth = self.run(np.array([prompt + path])).truth[0, length - 1 : -1]
            second, best = np.partition(truth, -2)[:, -2:].T
            if (best - second > _MARGIN).all() and len(set(path)) >= min(new, 8):
                assert path == truth.argmax(-1).tolist()
                return prompt, path
        raise AssertionError(f"none of 40 prompts of {length} tokens has a path with a margin of {_MARGIN}")
