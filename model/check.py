"""The pre-flight: whether a model would load, from JSON and headers alone, in a moment."""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model.config import generation_eos
from model.errors import ModelError
from model.load import Plan, plan
from model.tokenizer import Tokenizer

_MAKE = "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"


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
    notices = tokenizer_notices(report.tokenizer, folder, report.plan.config.vocab_size if report.plan else None)
    if report.tokenizer is None and not notices:
        notices.append(f"{folder}: no tokenizer: prompts can only be token ids")
    report.notices += notices


def _generation(report: Report, folder: Path) -> None:
    generation_eos(folder)


def tokenizer_notices(tokenizer: Tokenizer | None, folder: Path, vocab_size: int | None) -> list[str]:
    """What to say where its files are not read, or mean something else, or it has ids that the model has not."""
    if tokenizer is None:
        what = "is SentencePiece, which is not read: prompts can only be token ids"
        return [f"{path}: {what}; {_MAKE}"] if os.path.lexists(path := folder / "tokenizer.model") else []
    notices, size = list(tokenizer.notices), tokenizer.size
    if vocab_size is not None and size > vocab_size:
        notices.append(f"the tokenizer has {size} ids, the model only {vocab_size}: text with the others is refused")
    return notices
