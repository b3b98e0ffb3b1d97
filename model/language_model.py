"""`LanguageModel`: a loaded model and everything that can be asked of it. `model.loading` makes them."""

import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.adapter import merge, read_adapter
from model.architecture import architecture
from model.config import Config
from model.decoder import Decoder
from model.device import Device
from model.errors import CheckpointError, ContextError, LoadNotice, ModelError
from model.files import as_path
from model.generate import Generation, Limits, Row, run
from model.graph import GraphDecoder, can_capture, captured_capacity
from model.load import Filled
from model.memory import Ledger, logits_needs, place_of, predict
from model.parameters import Parameters
from model.persistent import graph_decoder
from model.request import Request, check_ids, read_request, require_count, require_tokenizer
from model.room import explained, require, room_for
from model.sampling import Sampling
from model.save import save
from model.stream import Batch, Stream
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.footprint import MemoryReport


class LanguageModel:
    """A model on its device. Made by `model.load` and `model.from_config`.

    Attributes:
        config: shape and arithmetic.
        positions: how many tokens a row may have, prompt and answer: the model's own limit, or a lower one.
        parameters: the weights by name; assigning checks shape and dtype and copies.
        tokenizer: or None where the checkpoint has none.
        eos_token_ids: the ids that end a text.
        notices: what was remarkable about the checkpoint.
        filled: how the weights were read: bytes, seconds, GB/s, and what the cast of each tensor lost; None
            where they were not read from files.
    """

    def __init__(
        self,
        config: Config,
        parameters: Parameters,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] | None = None,
        values: dict | None = None,
        folder: Path | None = None,
        notices: Sequence[str] = (),
        filled: Filled | None = None,
        positions: int | None = None,
    ):
        self.config, self.parameters, self.tokenizer = config, parameters, tokenizer
        self.eos_token_ids = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.notices, self.filled = list(notices), filled
        self.positions = config.n_positions if positions is None else positions
        self._values, self._folder = values or {}, folder
        self._base = folder  # whose weights these are; None once they have changed
        self._idle: GraphDecoder | None = None

    def logits(self, ids: Any) -> np.ndarray:
        """The logits behind every token.

        Args:
            ids: (T,) or (B, T) token ids: a list, or an array of NumPy or torch. T is at most
                `positions`.

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
        if new > self.positions:
            raise ContextError(f"ids have {new} tokens, but the model has {self.positions} positions")
        device = self.parameters.device
        needs = logits_needs(self.config, self.parameters.dtype, place_of(device), *ids.shape)
        with room_for(device, needs, f"logits of {ids.shape[0]} x {new} tokens", "give fewer rows, or shorter ones"):
            positions = device.indices(np.broadcast_to(np.arange(new), ids.shape))
            model = architecture(self.config)
            x = model.hidden_states(self.parameters, self.config, device.indices(ids), positions)
            return device.to_host(model.unembed(self.parameters, self.config, x))

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
            n: rows for each prompt, one after the other in the result; those that start together compute it once.
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
        batch_size = require_count("batch_size", batch_size)
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
    ) -> Stream:
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
            A `model.finetune.train.Result`. Ctrl-C and SIGTERM end the run behind the step that runs, or the
            batch of an evaluation, with a checkpoint.

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

    def batch(self, batch_size: int = 8) -> Batch:
        """Several prompts at once, which join and leave while others run; text as it comes from any of them.

            with lm.batch(8) as batch:
                first = batch.add("In the beginning", max_new_tokens=40)
                for entry, piece in batch:
                    print(entry is first, repr(piece))
                    if entry.done and more:
                        batch.add(more.pop(), temperature=0.8, seed=1)

        Args:
            batch_size: how many run together; others wait. Their keys and values are allocated here, for all
                `positions`.
        """
        batch_size = require_count("batch_size", batch_size)
        room = partial(explained, *self._room(batch_size, self.positions))
        with room():
            decoder = self._decoder(batch_size, self.positions)
        return Batch(self._row, decoder, Limits(self.positions, frozenset()), self._give_back, batch_size, room)

    def warm_up(self, batch_size: int = 1) -> float:
        """Compiles and captures what so many rows need on CUDA, for all calls to come; the seconds that it took.

        Without it the first calls do so as they need it. Elsewhere there is nothing to do.
        """
        batch_size = require_count("batch_size", batch_size)
        if not can_capture(self.parameters, self.config):
            return 0.0
        with explained(*self._room(batch_size, 1)):
            decoder, started = self._decoder(batch_size, 1), time.perf_counter()
            decoder.warm_up()
        self._give_back(decoder)
        return time.perf_counter() - started

    def _row(self, prompt: Any, **options: Any) -> Row:
        return self.stream(prompt, **options).row

    def save(self, target: str | Path) -> None:
        """Writes the model in Hugging Face layout, for transformers, vLLM, or `model.load`.

        Args:
            target: a folder (made if it is not there), or a `.safetensors` file.

        Each file is written under a temporary name and renamed when it is whole. See `model.save`.
        """
        save(
            as_path("target", target, CheckpointError),
            self.config,
            self.parameters,
            values=self._values,
            tokenizer=self.tokenizer,
            folder=self._folder,
        )

    def memory(self, *, batch: int = 1, context: int | None = None, measure: bool = False) -> "MemoryReport":
        """What generating takes: predicted, measured if asked, and what is free.

        Args:
            batch, context: rows, and the tokens of each; default all positions.
            measure: generate so much in a process of its own, with random weights of this model's shape, on
                this model's device and in its dtype: it takes the predicted memory once more.
        """
        from model.footprint import report

        context = self.positions if context is None else context
        batch = require_count("batch", batch)
        context = require_count("context", context)
        if context > self.positions:
            raise ContextError(f"context must be 1 to {self.positions}, the model's positions, got {context}")
        return report(self, self._ledger(batch, context), measure=measure)

    def _ledger(self, batch: int, context: int) -> Ledger:
        place, head = place_of(self.parameters.device), "head.weight" in self.parameters
        sizes = {"batch": batch, "context": context, "positions": self.positions}
        return predict(self.config, self.parameters.dtype, place, head=head, **sizes)

    def load_adapter(self, folder: str | Path) -> None:
        """Adds a LoRA adapter in PEFT's layout to the weights, in place; to be without it, load the model again.

        Raises CheckpointError for one that is damaged, does not fit, or asks for what is not computed here. A sum that
        is too large for the weights' dtype is said in `notices`, and issued as a `LoadNotice`.
        """
        notices = merge(self.parameters, read_adapter(as_path("folder", folder, CheckpointError), self.config))
        self._base = None
        self.notices += notices
        for notice in notices:
            warnings.warn(notice, LoadNotice, stacklevel=2)

    def _run(self, request: Request, batch_size: int) -> Iterator[tuple[Row, str]]:
        rows, limits = request.rows, request.limits
        slots = min(batch_size, len(rows))
        if slots == 0:
            return
        slides = limits.overflow == "slide"
        capacity = limits.positions if slides else max(row.positions_needed for row in rows)
        with explained(*self._room(slots, capacity)):
            decoder = self._decoder(slots, capacity)
            try:
                yield from run(decoder, rows, slots=slots, limits=limits)
            finally:
                self._give_back(decoder)

    def _room(self, rows: int, capacity: int) -> tuple[Device, dict[str, int], str, str]:
        """What a decoder takes and where, what it is for, and what to do where there is not as much."""
        needs = self._ledger(rows, capacity).needs
        what = f"generating {rows} rows of up to {capacity} tokens"
        # Captured, the cache has room for more, however few the tokens are.
        remedy = "reduce batch_size" + ("" if can_capture(self.parameters, self.config) else ", or the tokens")
        return self.parameters.device, needs, what, remedy

    def _decoder(self, rows: int, capacity: int) -> Decoder:
        # One with its graphs is kept from call to call; a call beside another has its own.
        if self._idle is not None and self._idle.rows >= rows and self._idle.capacity >= capacity:
            idle, self._idle = self._idle, None
            return idle
        self._idle = None
        require(*self._room(rows, capacity))
        # What the tokenizer has no text for is padding of the table: never chosen.
        known = min(self.config.vocab_size, self.tokenizer.size) if self.tokenizer else self.config.vocab_size
        if not can_capture(self.parameters, self.config):
            return Decoder(self.parameters, self.config, rows=rows, capacity=capacity, vocabulary=known)
        capacity = captured_capacity(capacity, self.positions)
        kind = graph_decoder(self.parameters, self.config)
        return kind(self.parameters, self.config, rows=rows, capacity=capacity, vocabulary=known)

    def _give_back(self, decoder: Decoder) -> None:
        for row in range(decoder.rows):
            if decoder.lengths[row]:
                decoder.release(row)
        if isinstance(decoder, GraphDecoder):
            # The end of all that was started, a step that ran ahead too: the next call may be on another stream.
            self.parameters.device.fetch(decoder.cache.lengths)()
            self._idle = decoder

    def _request(self, prompt: Any, sampling: Sampling, **options: Any) -> Request:
        limits = {"positions": self.positions, "eos": self.eos_token_ids}
        return read_request(prompt, self.config, self.tokenizer, **limits, sampling=sampling, **options)
