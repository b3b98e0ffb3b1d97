"""`gpukernels generate`: text from a prompt."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from model.cli.options import CacheDir, Json, Local, ModelOption, Refresh, Revision
from model.errors import ModelError
from model.files import read_json
from model.generate import Generation
from model.language_model import LanguageModel
from model.load import BUNDLED
from model.loading import load
from model.memory import human
from model.prompts import few_shot

# A file smaller than this is read before a bar could be seen.
_WORTH_A_BAR = 200_000_000


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.", show_default=False)
    ] = None,
    model: ModelOption = BUNDLED,
    adapter: Annotated[
        Path | None, typer.Option(help="A folder with a LoRA adapter of the model, as PEFT has it.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-t", help="How many tokens may follow.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 samples the model's own distribution.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that sum to p.", show_default=False)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than p times the best.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens already there are less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be given again.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the draws.", show_default=False)] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="How many answers.")] = 1,
    overflow: Annotated[str, typer.Option(help="Where the context ends: error, truncate_left or slide.")] = "error",
    context: Annotated[
        int | None,
        typer.Option(help="The tokens that prompt and answer may have; default all positions.", show_default=False),
    ] = None,
    few_shot_file: Annotated[
        Path | None,
        typer.Option(
            "--few-shot",
            help='JSON: {"instruction": TEXT, "examples": [[INPUT, OUTPUT], ...]}; PROMPT is then the next input.',
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or auto.")] = "auto",
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no speed on standard error.")] = False,
) -> None:
    """Continue PROMPT, streaming the new text to standard output."""
    text = _prompt(prompt)
    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False)
    lm = load(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        refresh=refresh,
        context=context,
        progress=_bar(console),
    )
    if adapter is not None:
        lm.load_adapter(adapter)
    for notice in lm.notices:
        console.print(f"note: {notice}", soft_wrap=True)
    if lm.filled.nbytes >= _WORTH_A_BAR:
        rate = f"{lm.filled.gigabytes_per_second:.2f} GB/s"
        console.print(f"[loaded {human(lm.filled.nbytes)}, {rate}]", style="dim")

    stops = list(stop or ())
    if few_shot_file is not None:
        text, stops = _few_shot(lm, text, few_shot_file, stops, max_new_tokens)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stops,
        "seed": seed,
        "overflow": overflow,
    }
    if as_json:
        found = lm.generate(text, n=n, **options)
        head = {"model": model, "prompt": text}
        body = _document(found) if isinstance(found, Generation) else {"generations": [_document(g) for g in found]}
        print(json.dumps(head | body))  # ASCII: a document in whatever encoding the output has
    elif n == 1:
        stream = lm.stream(text, **options)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        _speed(console, stream.result)
    else:
        for generation in lm.generate(text, n=n, **options):
            print(generation.text)
            _speed(console, generation)


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        raise ModelError("no prompt: give one as the argument, or on standard input")
    try:
        return re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read().decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise ModelError(f"standard input is not UTF-8 text: {fault}") from None


def _few_shot(lm: LanguageModel, query: str, path: Path, stops: list[str], new: int) -> tuple[str, list[str]]:
    values = read_json(path, ModelError)
    unknown = values.keys() - {"instruction", "examples", "input_label", "output_label", "separator"}
    if unknown:
        raise ModelError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    built = few_shot(lm, query, max_new_tokens=new, **values)
    return built.text, [*stops, built.stop]


def _document(generation: Generation) -> dict:
    return dataclasses.asdict(generation)


def _speed(console: Console, result: Generation) -> None:
    speed = f"{result.generation_tokens_per_second:.1f} tokens/s"
    prompt = f"prompt {result.prompt_tokens} tokens, {result.prompt_tokens_per_second:.0f} tokens/s"
    console.print(f"[{len(result.tokens)} tokens, {result.finish_reason}; {speed}; {prompt}]", style="dim")


def _bar(console: Console) -> Callable[[int, int], None]:
    """A progress bar for `load`, which shows itself only where there is something to wait for."""
    columns = TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, console=console, transient=True)

    def report(done: int, total: int) -> None:
        if total < _WORTH_A_BAR:
            return
        if not bar.task_ids:
            bar.start()
            bar.add_task("loading", total=total)
        bar.update(bar.task_ids[0], completed=done)
        if done == total:
            bar.stop()

    return report
