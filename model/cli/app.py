"""The `gpukernels` command: its subcommands, and what a user's mistake looks like.

A mistake is one line a problem on standard error and exit code 2 (`check`: 1 where a model would not
load); a traceback is a bug of ours.
"""

import contextlib
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from gpukernels import __version__
from model.cli import check, compile_report, demo, env, finetune, generate, info, memory, verify, warmup
from model.errors import LoadNotice, ModelError

app = typer.Typer(
    name="gpukernels",
    help="GPT-2, LLaMA and Mistral from Hugging Face checkpoints: generate text, fine-tune, inspect, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.command("check")(check.check)
app.command("memory")(memory.memory)
app.command("finetune")(finetune.finetune)
app.command("compile-report")(compile_report.compile_report)
app.command("verify")(verify.verify)
app.command("warmup")(warmup.warmup)
app.command("env")(env.env)
app.command("demo")(demo.demo)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"gpukernels {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command and exits."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # What the terminal has no character for is shown as its number; nothing is lost, nothing fails.
        stream.reconfigure(errors="backslashreplace")
    # A load says these through the command's own lines.
    warnings.simplefilter("ignore", LoadNotice)
    # Where the reader has gone (`| head`), rich and typer exit with 1, which `check` and `verify` have a meaning for.
    Console.on_broken_pipe = _leave_to_typer
    output = sys.stdout  # typer puts another in its place then
    code = _run()
    try:
        # Here, and not while Python ends, which has a text of its own for it, and a code.
        output.flush()
    except OSError as fault:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())  # or Python would complain again
        if not code:
            code = 141 if isinstance(fault, BrokenPipeError) else _failed(fault)
    sys.exit(code if sys.stdout is output else 141)


def _run() -> int | str | None:
    """Runs the command; its exit code."""
    try:
        app()
    except SystemExit as done:
        return done.code
    except ModelError as fault:
        for problem in fault.problems:
            _say(problem)
        return 2
    except MemoryError:
        _say("not enough memory on this machine")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as fault:
        return _failed(fault)


def _leave_to_typer(console: Console) -> None:
    raise  # the BrokenPipeError that is handled


def _failed(fault: OSError) -> int:
    _say(f"{fault.filename or 'output'}: {fault.strerror or fault}")
    return 2


def _say(problem: str) -> None:
    with contextlib.suppress(OSError):  # where nobody can read it, the exit code says it still
        print(f"error: {problem}", file=sys.stderr)
