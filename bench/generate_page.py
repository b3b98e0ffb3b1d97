"""The tables of a GPU's decoding figures, and the page with their plots."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench import generate_targets
from bench.cuda_generate import Row
from bench.cuda_providers import GRAPH, TRANSFORMERS
from model.page import Page

COLUMNS = (
    "runtime", "first, ms", "token, ms", "tokens/s", "of roof", "end to end", "x eager", "x graph", "regret",
)  # fmt: skip


def title(row: Row) -> str:
    batch = f"batch {row['batch']}"
    return f"{row['preset']}, {row['dtype']}, {batch}, {row['context']} + {row['new']} tokens"


def tables(rows: Sequence[Row]) -> dict[str, list[tuple[str, ...]]]:
    """The cells of every case, by its title."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(_cells(row))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    if "token_ms" not in row:
        problem = row.get("fault", "wrong answer")[:60]
        return (row["runtime"], problem, *[""] * (len(COLUMNS) - 3), f"{row['regret']:.0e}" if "regret" in row else "")
    share, ratios = row.get("share_of_bandwidth"), [row["over"].get(each) for each in (TRANSFORMERS, GRAPH)]
    return (
        row["runtime"],
        f"{row['first_token_ms']:.2f}",
        f"{row['token_ms']:.3f}",
        f"{row['decode_tokens_per_second']:,.0f}",
        "" if share is None else f"{share:.0%}",
        f"{row['tokens_per_second']:,.0f}",
        *("" if each is None else f"{each:.2f}" for each in ratios),
        f"{row['regret']:.0e}",
    )


def page(document: dict[str, Any]) -> Page:
    """Cost card, targets, tables and plots of a document of `bench.generate`."""
    made = Page(f"Decoding on {document['device']}")
    made.text(
        ", ".join(f"{name} {version}" for name, version in document["versions"].items()) + f"; {document['date']}"
    )
    made.heading("What a step must move")
    made.table(*document["card"])
    made.heading("Targets")
    made.table(generate_targets.COLUMNS, [generate_targets.cells(each) for each in document["targets"]])
    for name, cells in tables(document["rows"]).items():
        made.heading(name)
        made.table(COLUMNS, cells)
    made.text(
        "First: the prompt and one token. Token: what lies between the first and the last, by their number; tokens/s "
        "and the share of the bandwidth's roof are of that. End to end: all tokens by all of the time; the ratios are "
        "of that, medians of the rounds'. Regret: how far below float32's best logit a chosen token's was at worst, "
        "as a share of the largest."
    )
    for preset in dict.fromkeys(row["preset"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["preset"] == preset and "token_ms" in row]
        if rows:
            made.plot(
                partial(_bars, rows, "decode_tokens_per_second", "tokens/s"),
                f"{preset}: tokens a second while decoding",
            )
        if any("share_of_bandwidth" in row for row in rows):
            made.plot(
                partial(_bars, rows, "share_of_bandwidth", "share"), f"{preset}: least time of the bytes over the time"
            )
    return made


def _bars(rows: Sequence[Row], key: str, label: str) -> Any:
    """A group for each case, a bar for each runtime; logarithmic."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row["batch"], row["context"], row["new"]) for row in rows))
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    figure = Figure(figsize=(10, 4))
    axes = figure.add_subplot()
    for number, runtime in enumerate(runtimes):
        values = {(row["batch"], row["context"], row["new"]): row[key] for row in rows if row["runtime"] == runtime}
        places = [place + number * 0.8 / len(runtimes) for place, case in enumerate(cases) if case in values]
        axes.bar(places, [values[case] for case in cases if case in values], 0.8 / len(runtimes), label=runtime)
    names = [f"{batch} x\n{context} + {new}" for batch, context, new in cases]
    axes.set_xticks([place + 0.4 - 0.4 / len(runtimes) for place in range(len(cases))], names)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend(fontsize="small")
    return figure
