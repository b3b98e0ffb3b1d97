"""A report as one HTML file that needs nothing beside it: text, tables, and plots as SVG inside the page."""

import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; }
"""


class Page:
    """Sections in their order; `write` puts the whole under a temporary name first."""

    def __init__(self, title: str):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        head = "".join(f"<th>{html.escape(each)}</th>" for each in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows
        )
        self._parts.append(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>")

    def plot(self, draw: Callable[[], Any], caption: str, style: Mapping[str, Any] | None = None) -> None:
        """The matplotlib figure that `draw` makes, as SVG; a note in its place where there is no matplotlib.

        style: matplotlib's settings meanwhile.
        """
        if find_spec("matplotlib") is None:
            self.text(f"(No plot, as matplotlib is not installed: {caption})")
            return
        import matplotlib

        drawn = io.StringIO()
        with matplotlib.rc_context(style):
            draw().savefig(drawn, format="svg", bbox_inches="tight")
        svg = drawn.getvalue()
        svg = svg[svg.index("<svg") :]  # without XML's own head, which HTML has not
        self._parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    @property
    def html(self) -> str:
        head = f'<meta charset="utf-8"><title>{html.escape(self._title)}</title><style>{_STYLE}</style>'
        return f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(self._parts) + "\n</body></html>\n"

    def write(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(self.html, encoding="utf-8")
        os.replace(temporary, path)
