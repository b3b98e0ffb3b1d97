"""README's measured section is what `python -m bench.report` prints."""

import json
from pathlib import Path

import pytest
from test_bench_gpu import HERE, KERNELS
from typer.testing import CliRunner

from bench import readme
from bench.readme import BEGIN, END, RESULTS, between, measured, replaced

ROOT = Path(__file__).parents[1]


def test_readme_says_what_was_measured():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert between(page) == measured(RESULTS), "run python -m bench.report --write README.md"


def test_the_section_is_put_between_the_markers():
    page = f"one\n{BEGIN}\nold\n{END}\ntwo\n"
    assert replaced(page, "new") == f"one\n{BEGIN}\nnew\n{END}\ntwo\n"
    assert between(replaced(page, "new\n\nlines")) == "new\n\nlines"
    for broken in ("one", BEGIN, f"{END}\n{BEGIN}", page + page):
        with pytest.raises(ValueError, match="there must be one line"):
            replaced(broken, "new")


def test_a_page_without_markers_is_one_line_and_stays_as_it_is(tmp_path):
    import typer

    page = tmp_path / "README.md"
    page.write_text("words\n")
    app = typer.Typer()
    app.command()(readme.main)
    for path in (page, tmp_path / "other.md"):
        result = CliRunner().invoke(app, ["--write", str(path)])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {path}: ")
        assert result.stderr.count("\n") == 1
    assert page.read_text() == "words\n"


def test_the_cpu_table_is_of_its_file():
    text = measured(RESULTS)
    rows = json.loads((RESULTS / "generate-cpu-2core-epyc.json").read_text())["rows"]
    for row in rows:
        assert f"| {row['runtime']} | {row['tokens_per_second']:.1f} | {row['decode_speedup']:.2f} |" in text


def test_the_hosts_table_is_of_its_file():
    text = measured(RESULTS)
    for row in json.loads((RESULTS / "overhead-2core-epyc.json").read_text())["figures"]:
        gradient = "" if row["gradient"] is None else row["gradient"]
        assert f"| {row['call']} | {row['launches']} | {row['whole']} | {row['launchers']} | {gradient} |" in text


def test_what_loading_takes_on_a_cpu_is_a_table(tmp_path):
    right = {"model": "gpt2", "dtype": "float16", "runtime": "ours", "wrong": False, "seconds": 0.5}
    right |= {"seconds_to_logits": 0.625, "peak": 300_000_000, "weights": 250_000_000}
    wrong = {"model": "gpt2", "dtype": "float32", "runtime": "transformers", "wrong": True, "max_logit_error": None}
    document = {"bench": "memory", "cores": 2, "processor": "AMD", "date": "2026-01-01", "rounds": 3}
    for name in ("memory-cpu-x.json", "memory-gpu.json"):
        (tmp_path / name).write_text(json.dumps(document | {"loads": [right, wrong]}))
    text = measured(tmp_path)
    assert "| gpt2 | float16 | ours | 0.50 | 0.62 | 300 | 1.20 |" in text
    assert text.count("| gpt2 | float32 | transformers | wrong answer |  |  |  |") == 1
    assert "on 2 cores of an AMD, 2026-01-01: the quickest of 3 rounds" in " ".join(text.split())


def test_nothing_measured_says_so(tmp_path):
    assert measured(tmp_path) == "GPU figures: not yet measured."


def test_a_gpu_run_becomes_tables(tmp_path):
    def stored(date, parts):
        document = {"bench": "gpu", "machine": HERE | {"date": date}, "limit": 1, "parts": parts}
        (tmp_path / f"gpu-h100-{date}.json").write_text(json.dumps(document))

    stored("2026-01-01", [])
    loads = [{"what": "x", "bytes": 5, "list": []}, {"what": "y", "met": True, "small": 1e-5, "wide": 1234.5}]
    memory = {"device": "cuda", "loads": loads, "footprints": []}
    parts = [
        {"name": "kernels", "state": "cut short", "seconds": 9.0, "result": KERNELS},
        {"name": "memory", "state": "done", "seconds": 1.0, "result": memory},
        {"name": "train", "state": "no time"},
    ]
    stored("2026-01-03", parts)
    text = measured(tmp_path)
    assert text.count("NVIDIA H100 80GB HBM3, 80 GiB") == 1  # the latest run of a GPU
    assert "2026-01-03" in text
    assert between(replaced(f"{BEGIN}\n{END}", text)) == text
    assert "| gelu | GPT-2, 8 x 9 | forward | 0.0100 | 1.50 TB/s | 50% | torch | 2.00 x | 1e-04 |" in text
    wanted = "| what | bytes | met | small | wide |\n| --- | --- | --- | --- | --- |\n| x | 5 |  |  |  |\n"
    assert f"memory, loads:\n\n{wanted}| y |  | yes | 1e-05 | 1234 |" in text
    assert "Kernels: " not in text
    compiled = KERNELS["rows"][1] | {"provider": "torch.compile", "seconds": 1.5e-5, "speedup_of_ours": 1.5}
    again = {"name": "compiled", "state": "done", "seconds": 9.0, "result": KERNELS | {"rows": [compiled]}}
    stored("2026-01-04", [parts[0], again])  # rows of both parts
    assert "| 50% | torch.compile | 1.50 x | 1e-04 |" in measured(tmp_path)
    other = KERNELS["rows"][0] | {"shape": "9 x 9", "quick": False}
    more = parts[0] | {"result": KERNELS | {"rows": [*KERNELS["rows"], other]}}
    stored("2026-01-05", [more])  # README has one shape, the run's own file all of them
    assert "9 x 9" not in measured(tmp_path)
    assert "Every shape: `bench/results/gpu-h100-2026-01-05.md`" in measured(tmp_path)
    assert "9 x 9" in readme.gpu_run({"parts": [more]})
    stored("2026-01-06", parts[1:])
    assert "Kernels: not yet measured." in measured(tmp_path)


def test_a_file_in_no_folder_is_refused_before_a_call_is_timed(tmp_path, monkeypatch, capsys):
    overhead = pytest.importorskip("bench.overhead", reason="Triton is not installed")
    monkeypatch.setattr(overhead, "calls", lambda: pytest.fail("this was timed"))
    monkeypatch.setattr("sys.argv", ["overhead", "--json", str(tmp_path / "nowhere" / "figures.json")])
    with pytest.raises(SystemExit) as caught:
        overhead.main()
    assert caught.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
