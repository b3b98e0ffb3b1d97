"""`gpukernels memory`: what a model takes, predicted and measured, and what fits."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gpukernels.gpus import gpu_named
from model.cli.options import CacheDir, Json, Local, Refresh, Revision
from model.cli.outline import outlined
from model.config import PRESETS, Config
from model.device import DTYPES, choose_device, choose_dtype
from model.errors import ContextError, DeviceError, ModelError
from model.footprint import Footprint, footprint
from model.gpt2_config import PRESETS as GPT2_PRESETS
from model.load import plan
from model.memory import CONTEXT_ALLOWANCE, Ledger, human, largest, parameter_count, place_of, predict
from model.room import available

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class _Subject:
    """A model that is asked about."""

    name: str
    config: Config
    head: bool | None  # an output matrix of its own
    source: Path | Config  # what is measured


@dataclass(frozen=True)
class _Row:
    subject: _Subject
    predicted: Ledger
    measured: Footprint | None
    fits: tuple[int, int] | None  # batch, context


def memory(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="A preset (gpt2, gpt2-medium, ...), a folder, a file, a name on the Hub; default GPT-2 small to XL.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of the weights; may be given again. Default float32 and float16.", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows at a time; several with commas.")] = "1",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row; default all positions.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto: whose memory is measured.")] = "auto",
    gpu: Annotated[
        str | None,
        typer.Option(
            help="What fits a GPU that need not be here: H100, H200, A100, RTX 4090, or its bytes (24GB).",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Generate in a process of its own and measure. Default for one model on this machine's device.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
) -> None:
    """Show what MODEL takes line by line, predicted from its shape and measured, and the batch and context that fit."""
    if gpu is not None and (measure or device != "auto"):
        raise ModelError("--gpu is about a GPU that need not be here: it goes with neither --measure nor --device")
    limit = None if gpu is None else _bytes_of(gpu)
    batches, dtypes = _counts("--batch", batch), list(dict.fromkeys(dtype or ("float32", "float16")))
    place = choose_device(device)
    for each in dtypes:
        if each not in DTYPES:
            raise DeviceError(f"--dtype must be {', '.join(DTYPES)}, got {each!r}")
        if gpu is None:
            choose_dtype(each, place)
    where = "cuda" if gpu is not None else place_of(place)
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "refresh": refresh}
    if measure is None:
        measure = gpu is None and len(models or ()) == 1
    subjects = [_subject(name, options, weights=measure) for name in models or GPT2_PRESETS]
    for subject in subjects:
        if context is not None and not 1 <= context <= subject.config.n_positions:
            raise ContextError(
                f"--context must be 1 to {subject.config.n_positions}, the positions of {subject.name}, got {context}"
            )
    if limit is None:
        limit = available(place)
    elif limit <= CONTEXT_ALLOWANCE:
        raise ModelError(
            f"--gpu: {human(limit)} are no more than the {human(CONTEXT_ALLOWANCE)} set aside for CUDA itself"
        )
    usable = limit - CONTEXT_ALLOWANCE if gpu is not None else limit
    rows = []
    for subject in subjects:
        for rows_at_a_time in batches:
            for each in dtypes:
                ledger = predict(subject.config, each, where, head=subject.head, batch=rows_at_a_time, context=context)
                found = footprint(subject.source, place, ledger) if measure else None
                fits = None if usable is None else largest(ledger, subject.config, usable, head=subject.head)
                rows.append(_Row(subject, ledger, found, fits))
    what = f"{gpu} ({human(limit)})" if gpu is not None else f"{place.name} ({human(limit)} free)" if limit else None
    if as_json:
        print(json.dumps({"place": where, "limit": limit, "rows": [_document(row) for row in rows]}))
    elif len(subjects) == 1:
        _details(rows, what)
    else:
        _summary(rows, what)
    if not as_json and gpu is not None:
        print(
            f"of the GPU's memory {human(CONTEXT_ALLOWANCE)} are set aside for CUDA itself: an allowance, not measured"
        )


def _subject(name: str, options: dict, *, weights: bool) -> _Subject:
    """The model of this name; its `weights` are fetched from the Hub only where they are measured."""
    if name in PRESETS and not Path(name).exists():
        return _Subject(name, PRESETS[name], None, PRESETS[name])
    with outlined(name, weights=weights, **options) as (path, _):
        planned = plan(path, headers_only=True)
    return _Subject(name, planned.config, planned.own_head, planned.source)


def _counts(option: str, text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and len(number) < 20 and 0 < int(number) <= 2**20 for number in numbers):
        raise ModelError(f"{option} must be whole numbers from 1 to {2**20} with commas between them, got {text!r}")
    return [int(number) for number in numbers]


def _bytes_of(gpu: str) -> int:
    """Of a GPU's name, or of a number with or without a unit."""
    number, factor = gpu.strip(), 1
    for unit, size in _UNITS.items():
        if number.lower().endswith(unit.lower()):
            number, factor = number[: -len(unit)].strip(), size
            break
    if number.replace(".", "", 1).isdecimal():
        size = float(number) * factor
        if size >= 2**60:
            raise ModelError(f"--gpu: no GPU has as much as {size:.3g} bytes")
        return int(size)
    try:
        return gpu_named(gpu).memory
    except ValueError as fault:
        raise ModelError(f"--gpu: {fault}, which is no number of bytes either (24GB)") from None


def _document(row: _Row) -> dict:
    predicted = asdict(row.predicted) | {"peak": row.predicted.peak}
    fits = None if row.fits is None else {"batch": row.fits[0], "context": row.fits[1]}
    return {
        "model": row.subject.name,
        "parameters": parameter_count(row.subject.config, head=row.subject.head),
        "predicted": predicted,
        "measured": row.measured and asdict(row.measured),
        "fits": fits,
    }


def _details(rows: list[_Row], limit: str | None) -> None:
    """One model: every line of its ledgers, side by side."""
    first = rows[0]
    ledger = first.predicted
    console = _console()
    title = f"{first.subject.name}: {parameter_count(first.subject.config, head=first.subject.head):,} parameters"
    table = Table("", title=f"{title}, {ledger.context} tokens a row, {ledger.place}", title_justify="left")
    columns = list(_columns(rows))
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for name in ("weights", "KV cache", "activations", "logits", "workspace", "allocator slack", "CUDA context"):
        cells = [cells.get(name) for _, cells in columns]
        if any(cell is not None for cell in cells):
            table.add_row(name, *("" if cell is None else human(cell) for cell in cells))
    table.add_section()
    for name in ("beside the weights", "peak"):
        table.add_row(name, *(human(cells[name]) for _, cells in columns))
    console.print(table)
    for number, row in enumerate(rows):
        if row.fits is not None and row.predicted.dtype not in [each.predicted.dtype for each in rows[:number]]:
            _say_what_fits(console, row, limit)
        if row.measured and row.measured.load_seconds:
            rate = row.measured.load_bytes / row.measured.load_seconds / 1e9
            console.print(
                f"{row.predicted.dtype}: loaded {human(row.measured.load_bytes)} at {rate:.3g} GB/s, "
                f"at most {human(row.measured.loading)} meanwhile",
                soft_wrap=True,
            )


def _columns(rows: list[_Row]) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Heading and lines of every prediction, and of the measurement beside it."""
    for row in rows:
        heading, ledger, found = f"{row.predicted.dtype}\nbatch {row.predicted.batch}", row.predicted, row.measured
        cells: dict[str, int | None] = {"weights": ledger.weights, **_capitalised(ledger)}
        yield f"{heading}\npredicted", cells | {"beside the weights": ledger.beside_weights, "peak": ledger.peak}
        if found is not None:
            cells = {"weights": found.weights, "KV cache": found.kv_cache, "allocator slack": found.slack}
            cells |= {"CUDA context": found.cuda_context, "beside the weights": found.beside_weights}
            yield f"{heading}\nmeasured", cells | {"peak": found.peak}


def _capitalised(ledger: Ledger) -> dict[str, int | None]:
    return ledger.needs | {"allocator slack": ledger.slack if ledger.place == "cuda" else None}


def _say_what_fits(console: Console, row: _Row, limit: str) -> None:
    (rows_at_a_time, tokens), ledger = row.fits, row.predicted
    if rows_at_a_time == 0:
        text = f"{ledger.dtype}: {limit} has no room for one row of {ledger.context} tokens"
    else:
        longest = f"{tokens} tokens a row (all positions)" if tokens == row.subject.config.n_positions else f"{tokens}"
        text = f"{ledger.dtype}: {limit} has room for a batch of {rows_at_a_time:,} at {ledger.context} tokens"
        text += f", and with a batch of {ledger.batch} for {longest}" if tokens else ""
    console.print(text, soft_wrap=True, markup=False)


def _summary(rows: list[_Row], limit: str | None) -> None:
    """Several models, a line each for a dtype and batch."""
    title = f"{rows[0].predicted.place}, {limit}" if limit else rows[0].predicted.place
    table = Table("model", title=title, title_justify="left")
    headings = ["dtype", "batch", "tokens a row", "weights", "KV cache", "other", "peak"]
    headings += ["measured"] * any(row.measured for row in rows)
    headings += ["largest batch"] * any(row.fits for row in rows)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        ledger = row.predicted
        cells = [ledger.dtype, str(ledger.batch), str(ledger.context)]
        sizes = (ledger.weights, ledger.kv_cache, ledger.beside_weights - ledger.kv_cache, ledger.peak)
        cells += map(human, sizes)
        cells += [human(row.measured.peak)] if row.measured else []
        cells += [f"{row.fits[0]:,}"] if row.fits else []
        table.add_row(row.subject.name, *cells)
    _console().print(table)


def _console() -> Console:
    """As wide as the terminal; a file or a pipe is wide enough."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)
