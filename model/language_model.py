"""`LanguageModel`: a loaded model and everything that can be asked of it."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model import gpt2
from model.adapter import merge, read_adapter
from model.check import vocabulary_notices
from model.config import PRESETS, GPT2Config, generation_eos
from model.decoder import Decoder
from model.device import choose_device, choose_dtype
from model.errors import ConfigError, ContextError, LoadNotice, ModelError
from model.generate import Generation, Row, run
from model.graph import GraphDecoder, can_capture
from model.load import fill, fill_random, locate, plan
from model.parameters import Parameters
from model.request import Request, check_ids, read_request, require_count, require_tokenizer
from model.sampling import Sampling
from model.save import save
from model.tokenizer import Tokenizer


def load(
    source: str | Path,
    *,
    device: Any = "auto",
    dtype: Any = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    refresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> "LanguageModel":
    """Loads a GPT-2 checkpoint in Hugging Face layout.

    Args:
        source: a folder, a `.safetensors` file beside its `config.json`, "tiny-gpt2" (the embedded
            model), or a name on the Hub ("gpt2", "openai-community/gpt2-xl"). What is on disk comes
            first; a name that is in the Hub's cache asks no network.
        device: "cpu" (NumPy), "cuda", "cuda:1", "auto" (CUDA where it works, else NumPy), or a
            `torch.device` ("cpu" there is plain torch).
        dtype: of the weights: "float32", "float16", "bfloat16" (torch devices), or "auto": float32 on
            the CPU; on CUDA float16, or bfloat16 where the checkpoint has it. On NumPy, float16 halves
            the memory and is widened block by block as it is used, which is slower.
        revision: a branch, tag or commit of the Hub's repository.
        cache_dir, local_files_only, token: as in `huggingface_hub`.
        refresh: ask the Hub for a newer commit although the model is in the cache.
        progress: called with the bytes read and the bytes to read.

    Returns:
        The model. What its user should know is in `notices`, and issued as `LoadNotice` warnings.

    Raises:
        ModelError: one of its kinds, with a sentence for every problem found. Nothing has been
            allocated then, unless reading itself failed.

    Memory: each tensor is read straight into its place; the peak is the weights and one 4 MiB buffer.
    """
    place = choose_device(device)
    choose_dtype(dtype, place)
    path = locate(
        source,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        refresh=refresh,
    )
    planned = plan(path)
    tokenizer = Tokenizer.from_folder(planned.folder)
    eos = generation_eos(planned.folder)
    parameters, overflows = fill(planned, place, choose_dtype(dtype, place, planned.stored), progress)
    notices = planned.notices + overflows
    if tokenizer is not None:
        notices += vocabulary_notices(tokenizer, planned.config.vocab_size)
    for notice in notices:
        warnings.warn(notice, LoadNotice, stacklevel=2)
    return LanguageModel(
        planned.config,
        parameters,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        values=planned.values,
        folder=planned.folder,
        notices=notices,
    )


def from_config(
    config: str | GPT2Config, *, seed: int = 0, device: Any = "auto", dtype: Any = "auto"
) -> "LanguageModel":
    """A model with random weights: a preset's name ("gpt2-xl") or a config; no files, no network.

    The weights are drawn as GPT-2's were: N(0, 0.02), residual projections over sqrt(2 L). It has no
    tokenizer: prompts are token ids.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ConfigError(f"{config!r} is not a preset: there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    place = choose_device(device)
    dtype = choose_dtype(dtype, place)
    parameters = fill_random(gpt2.slots(config), config, place, dtype, seed)
    return LanguageModel(config, parameters)


class LanguageModel:
    """A model on its device. Made by `model.load` and `model.from_config`.

    Attributes:
        config: shape and arithmetic.
        parameters: the weights by name; assigning checks shape and dtype and copies.
        tokenizer: or None where the checkpoint has none.
        eos_token_ids: the ids that end a text.
        notices: what was remarkable about the checkpoint.
    """

    def __init__(
        self,
        config: GPT2Config,
        parameters: Parameters,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] | None = None,
        values: dict | None = None,
        folder: Path | None = None,
        notices: Sequence[str] = (),
    ):
        self.config, self.parameters, self.tokenizer = config, parameters, tokenizer
        self.eos_token_ids = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.notices = list(notices)
        self._values, self._folder = values or {}, folder
        self._idle: GraphDecoder | None = None

    def logits(self, ids: Any) -> np.ndarray:
        """The logits behind every token.

        Args:
            ids: (T,) or (B, T) token ids: a list, or an array of NumPy or torch. T is at most
                `config.n_positions`.

        Returns:
            (B, T, V) float32, on the host; B is 1 for one sequence.

        Raises:
            ModelError: ids of another shape or outside the vocabulary.
            ContextError: more tokens than positions.
        """
        ids = check_ids(ids, self.config.vocab_size)
        if ids.ndim == 1:
            ids = ids[None]
        if ids.ndim != 2:
            raise ModelError(f"ids must be (T,) or (B, T), got {ids.shape}")
        new = ids.shape[1]
        if new > self.config.n_positions:
            raise ContextError(f"ids have {new} tokens, but the model has {self.config.n_positions} positions")
        device = self.parameters.device
        positions = device.indices(np.broadcast_to(np.arange(new), ids.shape))
        x = gpt2.hidden_states(self.parameters, self.config, device.indices(ids), positions)
        return device.to_host(gpt2.unembed(self.parameters, self.config, x))

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        overflow: str = "error",
        batch_size: int = 8,
    ) -> Generation | list[Generation]:
        """Continues one prompt or several.

        Args:
            prompt: a string, a list of strings, token ids, or a list of lists of them. The empty
                string starts from the model's bos token.
            max_new_tokens: how many tokens may follow; None: as many as there are positions.
            temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. The default
                temperature 0 is greedy.
            stop: text that ends a row; it is not part of the result.
            seed: fixes the draws. Row i draws from stream i of one seed; with a list, one seed for each
                row, each draws from stream 0 of its own, as it would alone. None: a new one.
            n: rows for each prompt, one after the other in the result.
            overflow: what happens where the positions end: "error" (before anything is computed),
                "truncate_left" (the prompt loses its beginning), "slide" (the older half is forgotten
                and the rest computed anew, again and again).
            batch_size: rows computed together; they do not change one another's tokens.

        Returns:
            A `Generation`; a list of them, prompt by prompt, for several prompts or n > 1.

        Raises:
            ModelError: an argument that cannot be, a prompt without a tokenizer.
            ContextError: a prompt that does not fit.
        """
        request = self._request(
            prompt,
            Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            n=n,
            overflow=overflow,
        )
        require_count("batch_size", batch_size)
        for _ in self._run(request, batch_size):
            pass
        results = [row.result() for row in request.rows]
        return results[0] if request.single else results

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        overflow: str = "error",
    ) -> "Stream":
        """Continues one prompt, text as it comes: an iterator of pieces that join to `generate`'s text.

        The arguments are those of `generate`, and are checked before the first piece is asked for.
        After the last piece `result` holds the `Generation`.
        """
        request = self._request(
            prompt,
            Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            n=1,
            overflow=overflow,
        )
        if not request.single:
            raise ModelError("stream takes one prompt; use generate for several")
        require_tokenizer(self.tokenizer, "text")
        return Stream(request.rows[0], self._run(request, 1))

    def finetune(
        self,
        dataset: Any,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        validation_data: Any = None,
        trackers: Sequence[Any] = (),
        console: Any = None,
        **options: Any,
    ) -> Any:
        """Trains the model on a text; the model then has the best weights, or without validation the last.

        Args:
            dataset: a `.txt`, `.jsonl` or `.npy` file, a list of strings, or token ids: see
                `model.finetune.data.read_documents`.
            out: a folder that is new, for the model in Hugging Face layout, `log.jsonl`, a plot of the losses,
                and the checkpoints while the run goes on. None: nothing is written.
            resume: go on with the run in `out`. It must have been started alike; on the CPU the result is bit
                for bit that of a run that was never stopped.
            validation_data: as `dataset`; None: a share of the documents, `validation`.
            trackers: "tensorboard", "wandb", or objects: see `model.finetune.trackers`.
            console: a `rich.console.Console` for the table and the progress; default standard error.
            options: `epochs`, `batch_size`, `learning_rate` and the others of `model.finetune.settings.Settings`.

        Returns:
            A `model.finetune.train.Result`. Ctrl-C and SIGTERM end the run behind the step that runs, with a
            checkpoint.

        Raises:
            ModelError: of one of its kinds, before training starts where it can be known.

        A model on NumPy trains in plain torch on the CPU, one on CUDA by the kernels. `torchrun` starts several
        processes, which share each batch. A seed gives the same run bit for bit on the CPU.
        """
        if importlib.util.find_spec("torch") is None:
            raise ModelError("fine-tuning needs torch: pip install 'gpukernels[train]'")
        from model.finetune.run import finetune

        return finetune(
            self,
            dataset,
            out=out,
            resume=resume,
            validation_data=validation_data,
            trackers=trackers,
            console=console,
            **options,
        )

    def save(self, target: str | Path) -> None:
        """Writes the model in Hugging Face layout, for transformers, vLLM, or `model.load`.

        Args:
            target: a folder (made if it is not there), or a `.safetensors` file.

        Each file is written under a temporary name and renamed when it is whole. See `model.save`.
        """
        save(
            Path(target),
            self.config,
            self.parameters,
            values=self._values,
            tokenizer=self.tokenizer,
            folder=self._folder,
        )

    def load_adapter(self, folder: str | Path) -> None:
        """Adds a LoRA adapter in PEFT's layout to the weights, in place; to be without it, load the model again.

        Raises CheckpointError for one that is damaged, does not fit, or asks for what is not computed here.
        """
        merge(self.parameters, read_adapter(Path(folder), self.config))

    def _run(self, request: Request, batch_size: int) -> Iterator[tuple[Row, str]]:
        rows, limits = request.rows, request.limits
        slots = min(batch_size, len(rows))
        if slots == 0:
            return
        slides = limits.overflow == "slide"
        capacity = limits.positions if slides else max(row.positions_needed for row in rows)
        decoder = self._decoder(slots, capacity)
        try:
            yield from run(decoder, rows, slots=slots, limits=limits)
        finally:
            self._give_back(decoder)

    def _decoder(self, rows: int, capacity: int) -> Decoder:
        # What the tokenizer has no text for is padding of the table: never chosen.
        known = min(self.config.vocab_size, self.tokenizer.size) if self.tokenizer else self.config.vocab_size
        if not can_capture(self.parameters, self.config):
            return Decoder(self.parameters, self.config, rows=rows, capacity=capacity, vocabulary=known)
        # One with its graphs is kept from call to call; a call beside another has its own.
        idle, self._idle = self._idle, None
        if idle is not None and idle.rows >= rows:
            return idle
        positions = self.config.n_positions
        return GraphDecoder(self.parameters, self.config, rows=rows, capacity=positions, vocabulary=known)

    def _give_back(self, decoder: Decoder) -> None:
        for row in range(decoder.rows):
            if decoder.lengths[row]:
                decoder.release(row)
        if isinstance(decoder, GraphDecoder):
            self._idle = decoder

    def _request(self, prompt: Any, sampling: Sampling, **options: Any) -> Request:
        return read_request(prompt, self.config, self.tokenizer, eos=self.eos_token_ids, sampling=sampling, **options)


class Stream:
    """Pieces of text as they come; `result` after the last."""

    def __init__(self, row: Row, events: Iterator[tuple[Row, str]]):
        self._row, self._events = row, events

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _, piece in self._events:
            if piece:
                return piece
        raise StopIteration

    @property
    def result(self) -> Generation:
        """The whole; what there is so far, before the end."""
        return self._row.result()
