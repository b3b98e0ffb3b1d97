"""The decode step as a CUDA graph: one launch from the host for every token, whatever the lengths are.

A graph is captured once for a number of rows and a set of sampling arguments, and never again for a length:
everything that changes from step to step lies in device memory. Rows of the bucket that are not in use have
the length 0, and nothing is read or written for them.

A prompt is a hundred launches, which cost the host more than they cost the GPU. So prompts are filled up in
front, to 16, 32, 64, ... tokens, with ones at positions below 0, which attention leaves out, and there is a graph
for each of these lengths. It fills the last row, which is free while rows are joining, and from there keys and
values are copied to the row that they are for. Where it is not free, the same kernels are launched one by one.
"""

import contextlib
import gc
import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpukernels.launches import dependent_launches
from model.config import Config
from model.decoder import CHUNK, Decoder, Tokens
from model.parameters import Parameters
from model.sampling import DRAWING, FILTERS, PENALTY

#: Runs a function once without capturing, then captures it; what replays it, and what the replays write.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]

_SHORTEST = 16  # of prompts as they are filled up


def filled_up(tokens: int, capacity: int) -> int:
    """What a prompt of so many tokens is filled up to, where it is no more than `CHUNK`."""
    return min(max(_SHORTEST, 1 << (tokens - 1).bit_length()), capacity)


def prompt_sizes(tokens: int, capacity: int) -> list[int]:
    """The lengths of the graphs that prompts of up to so many tokens need."""
    powers = (1 << power for power in range((tokens - 1).bit_length() + 1))
    return sorted({size for size in (filled_up(power, capacity) for power in powers) if size <= CHUNK})


_ALWAYS = 8192  # positions that there is room for however few are asked for, where the model has so many


def captured_capacity(tokens: int, positions: int) -> int:
    """What a captured cache has room for where rows of `tokens` are asked for and the model has so many `positions`.

    All of them, up to `_ALWAYS`; beyond, the tokens filled up to a power of two: there are few sizes, each captured
    once, and a model of 131,072 positions does not take the memory of them all for every question.
    """
    return min(max(_ALWAYS, 1 << (tokens - 1).bit_length()), positions)


_WIDEST = 256  # wider heads have no kernel, and plain torch's attention asks the device for values


def can_capture(parameters: Parameters, config: Config) -> bool:
    """Whether a step of this model can be a graph: on CUDA, where every op of it is a kernel."""
    on_cuda = parameters.device.name.startswith("cuda")
    return on_cuda and importlib.util.find_spec("triton") is not None and is_capturable(config)


def is_capturable(config: Config) -> bool:
    """Whether it could be one on a machine that has what it takes."""
    return config.head_width <= _WIDEST


class GraphDecoder(Decoder):
    """A `Decoder` whose steps are replayed graphs, for buckets of 1, 2, 4, ... rows.

    Attributes:
        capture_seconds: how long capturing took so far, compiling included.
    """

    def __init__(
        self,
        parameters: Parameters,
        config: Config,
        *,
        rows: int,
        capacity: int,
        vocabulary: int | None = None,
        capture: Capture | None = None,
    ):
        super().__init__(parameters, config, rows=rows, capacity=capacity, vocabulary=vocabulary)
        self.buckets = [*(1 << i for i in range((rows - 1).bit_length())), rows]
        self.capture_seconds = 0.0
        self._capture = CudaCapture(self._device.device) if capture is None else capture
        self._graphs: dict[tuple, tuple[Callable[[], None], Any]] = {}
        self._prompts: dict[int, Any] = {}

    def step(self, rows: int) -> Tokens:
        for row in range(rows):
            self.lengths[row] += 1
        bucket = next(each for each in self.buckets if each >= rows)
        replay, tokens = self._step_graph(bucket, self._names(0, rows))
        replay()
        return self._device.fetch(tokens[:rows])

    def prefill(self, row: int, ids: Sequence[int]) -> Any:
        """As `Decoder.prefill`; the logits stand until the next call."""
        size = filled_up(len(ids), self.capacity)
        if size > CHUNK:
            return super().prefill(row, ids)
        blank, last = [0] * (size - len(ids)), self.rows - 1
        prompt = self._device.indices([[*blank, *ids], [*blank, *range(len(ids))]])
        if row != last and self.lengths[last]:
            self._hold(row, len(ids))
            with dependent_launches():  # kernels that are compiled by now
                return self._read_prompt(row, prompt)
        replay, logits = self._prompt_graph(size)
        self._device.assign(self._prompts[size], prompt)
        self._hold(last, len(ids))
        replay()
        if row != last:
            self.cache.copy(last, row, len(ids))
            self._hold(row, len(ids))
            self.release(last)
        return logits

    def warm_up(self) -> None:
        """Captures what greedy and sampled steps of every bucket and prompts of every length need.

        No later token waits for it, but for those of a repetition penalty.
        """
        for bucket in self.buckets:
            for variant in ((), _variant(DRAWING)):
                self._step_graph(bucket, variant)
        for size in prompt_sizes(self.capacity, self.capacity):
            self._prompt_graph(size)

    def _names(self, start: int, stop: int) -> tuple[str, ...]:
        # A row starts with the kernel that steps have, too.
        return _variant(super()._names(start, stop))

    def _step_graph(self, bucket: int, names: tuple[str, ...]) -> tuple[Callable[[], None], Any]:
        return self._graph((bucket, names), lambda: self._step(bucket, self.capacity, names))

    def _prompt_graph(self, size: int) -> tuple[Callable[[], None], Any]:
        if size not in self._prompts:
            self._prompts[size] = self._device.indices([[0] * size] * 2)
        return self._graph(("prompt", size), lambda: self._read_prompt(self.rows - 1, self._prompts[size]))

    def _read_prompt(self, row: int, prompt: Any) -> Any:
        """(1, V) behind a prompt: ids and positions, (2, T)."""
        return self._model.unembed(
            self._parameters, self._config, self._read(row, prompt[:1], prompt[1:], self.capacity)
        )

    def _graph(self, key: tuple, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if key not in self._graphs:
            started = time.perf_counter()
            # Nobody is in use meanwhile: the call that compiles the kernels changes nothing.
            lengths = self.cache.lengths + 0
            self.cache.lengths[:] = 0
            try:
                with dependent_launches():
                    self._graphs[key] = self._capture(function)
            finally:
                self.cache.lengths[:] = lengths
            self.capture_seconds += time.perf_counter() - started
        return self._graphs[key]


def _variant(needed: Iterable[str]) -> tuple[str, ...]:
    """Few sets of sampling arguments, so that there are few graphs: those with neutral values cost next to nothing."""
    drawing = (*DRAWING, *FILTERS) if "temperature" in needed else ()
    return drawing + (PENALTY if "seen" in needed else ())


# torch waits for the device before it captures, which CUDA forbids while another thread does, and ends both.
_one_at_a_time = threading.Lock()


class CudaCapture:
    """`Capture` by torch, on one stream; the graphs share one pool of memory, as only one runs at a time."""

    def __init__(self, device: Any):
        import torch

        self._torch, self._device = torch, device
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()  # torch's own for captures is of the device that captured first
        self._pool = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        cuda, stream = self._torch.cuda, self._stream
        with cuda.device(self._device):
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                function()
            cuda.current_stream().wait_stream(stream)
            graph = cuda.CUDAGraph()
            pool, self._pool = self._pool or cuda.graph_pool_handle(), None  # a capture that fails keeps its pool
            # Other threads may go on using the device meanwhile, but for captures.
            options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with _one_at_a_time, _no_garbage_collected(), capturing(graph, **options):
                result = function()
            self._pool = pool
        return graph.replay, result


@contextlib.contextmanager
def capturing(graph: Any, *, pool: Any, stream: Any, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, and torch can be used as before where the capture fails.

    To torch before 2.12 such a capture is still under way: its stream stays the current one, and its allocator's
    cache cannot be emptied any more, with which the next capture begins. Nor can the pool be captured into again.

    Args:
        pool: what `torch.cuda.graph_pool_handle` gave.
        options: others of `torch.cuda.graph`.

    Raises:
        What the work that is captured raised, which torch says less of when it ends the capture.
    """
    import torch

    first = None
    with torch.cuda.stream(torch.cuda.current_stream()):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, **options):
                try:
                    yield
                except BaseException as fault:
                    first = fault
                    raise
        except BaseException as fault:
            with contextlib.suppress(RuntimeError, AttributeError):  # torch 2.12 has ended it
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
            fault, first = first or fault, None  # a frame that its own fault refers to would keep its arrays
            raise fault


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """A stream of text that nobody reads on releases its rows when it is collected: that would be in the graph."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
