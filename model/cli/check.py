"""`gpukernels check`: would this model load?"""

import json

import typer

from model import check as preflight
from model.cli.options import CacheDir, Json, Local, Model, Refresh, Revision
from model.load import locate
from model.memory import human, predict


def check(
    model: Model,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
) -> None:
    """Check MODEL from its JSON and headers, without reading weights; exit code 1 if it would not load."""
    path = locate(model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, refresh=refresh)
    report = preflight.check(path)
    planned = report.plan
    memory = [] if planned is None else [predict(planned.config, dtype) for dtype in ("float32", "float16")]
    if as_json:
        document = {
            "model": model,
            "source": str(path),
            "ok": not report.problems,
            "problems": report.problems,
            "notices": report.notices,
            "memory": {each.dtype: each.total for each in memory},
        }
        print(json.dumps(document))
    else:
        for problem in report.problems:
            print(f"problem: {problem}")
        for notice in report.notices:
            print(f"note: {notice}")
        if not report.problems:
            sizes = ", ".join(f"{human(each.total)} as {each.dtype}" for each in memory)
            print(f"ok: {path}: {len(planned.entries)} tensors fit the config; one sequence takes {sizes}")
    if report.problems:
        raise typer.Exit(1)
