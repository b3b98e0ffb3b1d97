"""The runtimes that `bench.generate` compares, each behind the same three calls."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import model


class Ours:
    """This package: NumPy for `device="cpu"`, plain torch on the CPU for `"torch"`."""

    def __init__(self, folder: Path, device: str, dtype: str):
        if device == "torch":
            import torch

            device = torch.device("cpu")
        self.lm = model.load(folder, device=device, dtype=dtype)
        self.lm.eos_token_ids = ()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(T, V) of one prompt."""
        return self.lm.logits(ids)[0]

    def generate(self, ids: Sequence[int], new: int) -> list[int]:
        """The greedy continuation, exactly `new` tokens."""
        return self.lm.generate(ids, max_new_tokens=new).tokens

    def prefill(self, ids: Sequence[int]) -> None:
        """The prompt and one token: what a user waits for first."""
        self.generate(ids, 1)


class Transformers:
    """transformers in float32; `compiled` is torch.compile with its static cache."""

    def __init__(self, folder: Path, compiled: bool = False):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if compiled:
            self.lm.forward = torch.compile(self.lm.forward)
            self._options["cache_implementation"] = "static"

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        with self._torch.no_grad():
            return self.lm(self._torch.tensor([list(ids)])).logits[0].numpy()

    def generate(self, ids: Sequence[int], new: int) -> list[int]:
        with self._torch.no_grad():
            found = self.lm.generate(self._torch.tensor([list(ids)]), max_new_tokens=new, **self._options)
        return found[0, len(ids) :].tolist()

    def prefill(self, ids: Sequence[int]) -> None:
        # As little as it can be asked to do: the logits of the last position only, as ours unembeds one row.
        with self._torch.no_grad():
            self.lm(self._torch.tensor([list(ids)]), logits_to_keep=1, use_cache=True).logits.argmax(-1)


class CTranslate2:
    """CTranslate2 in float32, converted from the same files."""

    def __init__(self, folder: Path, scratch: Path):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        size = model.load(folder, device="cpu", dtype="float16").config.vocab_size

        class Vocabulary:
            """Stands for the tokenizer that a random model has not: token i is called ti."""

            bos_token = eos_token = unk_token = "t0"

            def get_vocab(self) -> dict[str, int]:
                return {f"t{number}": number for number in range(size)}

        class Converter(TransformersConverter):
            def load_tokenizer(self, *arguments, **options):
                return Vocabulary()

        target = scratch / "ctranslate2"
        Converter(str(folder)).convert(str(target), quantization="float32")
        self._generator = ctranslate2.Generator(str(target), device="cpu", compute_type="float32")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(self._generator.forward_batch([[f"t{each}" for each in ids]]))[0]

    def generate(self, ids: Sequence[int], new: int) -> list[int]:
        found = self._generator.generate_batch(
            [[f"t{each}" for each in ids]],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return found[0].sequences_ids[0]

    def prefill(self, ids: Sequence[int]) -> None:
        self.generate(ids, 1)


def installed(name: str) -> bool:
    return find_spec(name) is not None
