"""The pre-flight: whether a model would load, from JSON and headers alone, in a moment."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model.config import generation_eos
from model.errors import ModelError
from model.load import Plan, plan
from model.tokenizer import Tokenizer


@dataclass
class Report:
    """What the pre-flight found; the model would load if there are no problems."""

    source: Path
    plan: Plan | None = None
    tokenizer: Tokenizer | None = None
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def check(source: Path, *, headers_only: bool = True) -> Report:
    """Checks a folder or file: config contract, headers, names, shapes, dtypes, tokenizer.

    Neither weights nor torch are touched; without `headers_only` the bytes of a tied output matrix are, as `plan` says.
    Every problem is listed, not just the first.
    """
    report = Report(source)
    folder = source.parent if source.is_file() else source
    for step in (partial(_plan, headers_only=headers_only), _tokenizer, _generation):
        try:
            step(report, folder)
        except ModelError as fault:
            report.problems += fault.problems
    return report


def _plan(report: Report, folder: Path, *, headers_only: bool) -> None:
    report.plan = plan(report.source, headers_only=headers_only)
    report.notices += report.plan.notices


def _tokenizer(report: Report, folder: Path) -> None:
    report.tokenizer = Tokenizer.from_folder(folder)
    if report.tokenizer is None:
        report.notices.append(f"{folder}: no tokenizer: prompts can only be token ids")
    elif report.plan is not None:
        report.notices += vocabulary_notices(report.tokenizer, report.plan.config.vocab_size)


def _generation(report: Report, folder: Path) -> None:
    generation_eos(folder)


def vocabulary_notices(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """What to say where the tokenizer has ids that the model has not."""
    if tokenizer.size <= vocab_size:
        return []
    return [f"the tokenizer has {tokenizer.size} ids, the model only {vocab_size}: text with the others is refused"]
