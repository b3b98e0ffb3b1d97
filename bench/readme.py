"""README's tables of what was measured, from `bench/results/`; where nothing was, they say so."""

import json
import sys
import textwrap
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import targets
from bench.generate import LONG, NEW, PROMPT
from bench.kernel_tables import digits, with_best_rival
from bench.report import in_words, write_text

RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- measured: from here to the end mark by python -m bench.report --write README.md -->"
END = "<!-- measured: end -->"
NOT_MEASURED = "not yet measured"

Document = dict[str, Any]
Columns, Rows = Sequence[str], Sequence[Sequence[str]]

_NOTES = (
    "ms: median in a CUDA graph, inputs rotated past three times the L2 cache. of roof: the time that this device's "
    "measured copy and product would take, over ours. ours is: how many times as fast as the best rival. error: the "
    "largest difference from float64 over the largest value."
)
_SPELLED = {"numpy": "NumPy", "ctranslate2": "CTranslate2", "triton": "Triton", "tokenizers": None, "safetensors": None}


def main(
    write: Annotated[
        Path | None, typer.Option(metavar="README", help="Put it between this file's two markers.")
    ] = None,
) -> None:
    """Print the tables of what was measured, as Markdown."""
    text = measured(RESULTS)
    if write is None:
        print(text)
        return
    try:
        page = write.read_text(encoding="utf-8")
        write_text(write, replaced(page, text))
    except (OSError, ValueError) as fault:
        print(f"error: {write}: {getattr(fault, 'strerror', None) or fault}", file=sys.stderr)
        sys.exit(2)


def replaced(page: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: not both markers, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"there must be one line {BEGIN} and below it one line {END}")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def between(page: str) -> str:
    """What stands between a page's markers."""
    return page.partition(BEGIN)[2].partition(END)[0].strip("\n")


def measured(folder: Path) -> str:
    """The whole section: generation and loading on the CPU, what calls cost the host, then each GPU's latest run."""
    sections, latest = [], {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("bench") == "generate" and path.name.startswith("generate-cpu-"):
            sections.append(_cpu(document, path.name))
        elif path.name.startswith("overhead-"):
            sections.append(_host(document, path.name))
        elif document.get("bench") == "memory" and path.name.startswith("memory-cpu-"):
            sections.append(_loads(document, path.name))
        elif document.get("bench") == "gpu":
            latest[document["machine"]["gpu"]["name"]] = (document, path.name)  # the last by date
    for document, name in latest.values():
        where = f"{in_words(document['machine'])}. Every shape: `bench/results/{name.removesuffix('json')}md`."
        sections.append(f"{_wrapped(where)}\n\n{gpu_run(document, whole=False)}")
    if not latest:
        sections.append(f"GPU figures: {NOT_MEASURED}.")
    return "\n\n".join(sections)


def _cpu(document: Document, name: str) -> str:
    """What `bench.generate` measured on a CPU."""
    preset = {"gpt2": "GPT-2 124M"}.get(document["preset"], document["preset"])
    text = (
        f"{preset} with random weights, batch 1, on {document['cores']} cores of {_article(document['processor'])}, "
        f"{document['date']}: prompt {PROMPT} + {NEW} new tokens, end to end, and a prompt of {LONG} with its first "
        f"token. Medians of {document['rounds']} rounds, the runtimes in turn, each in its own process, with a pause "
        f'between; "x eager" is the median of the rounds\' ratios to transformers eager. The machine is shared: single '
        "figures move by a tenth or more from run to run."
    )
    rows = []
    for row in document["rows"]:
        if row["max_logit_error"] is None:
            rows.append((row["runtime"], "wrong answer", "", "", "", ""))
            continue
        ratios = [f"{row[each]:.2f}" if each in row else "" for each in ("decode_speedup", "prefill_speedup")]
        error = "(judge)" if row["max_logit_error"] == 0 else f"{row['max_logit_error']:.0e}"
        speed, prefill = f"{row['tokens_per_second']:.1f}", f"{row['prefill_seconds']:.2f}"
        rows.append((row["runtime"], speed, ratios[0], prefill, ratios[1], error))
    columns = ("runtime", "tokens/s", "x eager", f"prefill {LONG}, s", "x eager", "max logit error")
    versions = ((_SPELLED.get(package, package), version) for package, version in document["versions"].items())
    named = ", ".join(f"{package} {version}" for package, version in versions if package)
    return f"{_wrapped(text)}\n\n{table(columns, rows)}\n\n{_wrapped(f'({named}; `bench/results/{name}`.)')}"


def _host(document: Document, name: str) -> str:
    """What `bench.overhead` measured."""
    where = document["machine"]
    text = (
        f"What a call costs the host, in microseconds, on one core of {_article(where['processor'])}, {where['date']}, "
        f"without the driver's own launch (`python -m bench.overhead`, which needs no GPU; `bench/results/{name}`):"
    )
    columns = ("call", "launches", "whole", "of it launcher and Triton", "recording a gradient")
    keys = ("call", "launches", "whole", "launchers", "gradient")
    rows = [["" if row[key] is None else row[key] for key in keys] for row in document["figures"]]
    return f"{_wrapped(text)}\n\n{table(columns, rows)}"


def _loads(document: Document, name: str) -> str:
    """What `bench.memory` measured on a CPU."""
    text = (
        f"Loading float32 files that the system has in its cache, on {document['cores']} cores of "
        f"{_article(document['processor'])}, {document['date']}: the quickest of {document['rounds']} rounds in a new "
        "process, and the most that resident memory grew over what it was after the imports "
        "(`python -m bench.memory`). Ours reads into place, turns the products' weights and counts what a cast loses; "
        f"transformers maps the file (`bench/results/{name}`):"
    )
    columns = ("model", "weights", "runtime", "load, s", "first logits, s", "peak, MB", "of the weights")
    rows = []
    for row in document["loads"]:
        cells = [row["model"], row["dtype"], row["runtime"]]
        if row["wrong"]:
            cells += ["wrong answer", "", "", ""]
        else:
            cells += [f"{row['seconds']:.2f}", f"{row['seconds_to_logits']:.2f}", f"{row['peak'] / 1e6:.0f}"]
            cells.append(f"{row['peak'] / row['weights']:.2f}")
        rows.append(cells)
    return f"{_wrapped(text)}\n\n{table(columns, rows)}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOaeio" else f"a {noun}"


def gpu_run(document: Document, *, whole: bool = True) -> str:
    """A GPU run: targets, our kernels beside the best rival (one shape of each, if not `whole`), the other parts."""
    blocks = [table(*part_table(document))] if whole else []
    kernels = kernels_of(document)
    if kernels is None:
        blocks.append(f"Kernels: {NOT_MEASURED}.")
    else:
        rows = [row for row in kernels["rows"] if whole or row["quick"]]
        blocks.append(table(targets.COLUMNS, [targets.cells(each) for each in kernels["targets"]]))
        blocks.append(table(*kernel_table(rows)))
        blocks.append(_wrapped(_NOTES))
    for part in document["parts"]:
        if whole or part["name"] != "verify":
            blocks += [f"{name}:\n\n{table(columns, rows)}" for name, columns, rows in plain_tables(part)]
    return "\n\n".join(blocks)


def part_table(document: Document) -> tuple[Columns, Rows]:
    rows = [
        (part["name"], part["state"], f"{part['seconds']:.0f}" if "seconds" in part else "", part.get("why", ""))
        for part in document["parts"]
    ]
    return ("part", "state", "seconds", ""), rows


def kernels_of(document: Document) -> Document | None:
    """What `bench.kernels` found in all of a run's parts, as one document; where two have a row, the first's."""
    found = [part["result"] for part in document["parts"] if (part.get("result") or {}).get("bench") == "kernels"]
    if not found:
        return None
    key = itemgetter("op", "model", "shape", "direction", "provider")
    rows = {key(row): row for result in reversed(found) for row in result["rows"]}
    places: dict[tuple, int] = {}
    for row in chain(*(result["rows"] for result in found)):
        places.setdefault(key(row)[:4], len(places))
    ordered = sorted(rows.values(), key=lambda row: places[key(row)[:4]])
    return found[0] | {"rows": ordered, "targets": targets.compared(ordered, found[0]["device"])}


def kernel_table(rows: Sequence[Document]) -> tuple[Columns, Rows]:
    """Ours at every shape and pass, beside the best of the others."""
    columns = ("op", "shape", "pass", "ms", "speed", "of roof", "best rival", "ours is", "error")
    lines = []
    for row, best in with_best_rival(rows):
        place = (row["op"], f"{row['model']}, {row['shape']}", row["direction"])
        if "seconds" not in row:
            lines.append((*place, row.get("fault", NOT_MEASURED), *[""] * 5))
            continue
        against = ("", "")
        if best is not None:
            against = (best["provider"], f"{best.get('speedup_of_ours', best['seconds'] / row['seconds']):.2f} x")
        speed = (digits(1e3 * row["seconds"]), f"{digits(row['rate'])} {row['unit']}", f"{row['of_roof']:.0%}")
        lines.append((*place, *speed, *against, f"{row['error']:.0e}"))
    return columns, lines


def plain_tables(part: Document) -> list[tuple[str, Columns, Rows]]:
    """Name, columns and rows of whatever a part but the kernels found: lists of rows, their numbers and words."""
    result = part.get("result") or {}
    if result.get("bench") == "kernels":
        return []
    found = []
    for key, value in result.items():
        rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
        plain = (name for row in rows for name, each in row.items() if isinstance(each, int | float | str))
        columns = list(dict.fromkeys(plain))
        if columns:
            found.append(
                (f"{part['name']}, {key}", columns, [[_cell(row.get(name)) for name in columns] for row in rows])
            )
    return found


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0e}" if 0 < abs(value) < 1e-3 else digits(value)
    return str(value) if isinstance(value, int | str) else ""


def table(columns: Columns, rows: Rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)
