"""The page of `bench.kernels` in a real browser: its plots are drawn, and its tables stand there."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from plots import needs_matplotlib

import bench.kernels

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

# For every plot its size and how many of its paths cover some of the screen; and the rows that have a height.
MEASURE = """<script>
const shown = one => { const box = one.getBoundingClientRect(); return box.width + box.height > 1; };
document.body.dataset.found = JSON.stringify({
  plots: [...document.querySelectorAll("figure svg")].map(svg => ({
    width: svg.getBoundingClientRect().width,
    height: svg.getBoundingClientRect().height,
    paths: [...svg.querySelectorAll("path")].filter(shown).length,
    words: [...svg.querySelectorAll("text")].filter(shown).map(each => each.textContent.trim()),
  })),
  rows: [...document.querySelectorAll("tbody tr")].filter(shown).length,
  title: document.title,
  wide: document.documentElement.scrollWidth,
});
</script>"""


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(f"none of {', '.join(NAMES)} is installed, and REQUIRE_BROWSER is set")
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    return found


@needs_matplotlib
@pytest.mark.skipif(torch.cuda.is_available(), reason="the page of a machine without a GPU")
def test_a_browser_draws_the_report(browser, tmp_path, capsys):
    page = tmp_path / "report.html"
    bench.kernels.main(op=["layer_norm", "few_rows"], quick=True, html_file=page)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900", "--dump-dom"]
    told = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'data-found="([^"]*)"', told.stdout)
    assert match, told.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert found["title"] == "Kernels: what GPUs would allow"
    assert found["rows"] == len(rows)
    assert len(found["plots"]) == 3  # the roofline, and a plot for each op
    for plot in found["plots"]:
        assert plot["width"] > 600
        assert plot["height"] > 60
        assert plot["paths"] > 20
    assert "operations a byte" in found["plots"][0]["words"]
    assert "GPT-2, 32768 x 768" in found["plots"][1]["words"]
    assert found["wide"] <= 1280  # nothing is cut off
