"""`gpukernels demo`: the main job on the embedded model, and what mistakes look like. No network."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from model.load import BUNDLED, locate

PROMPT = "And Moses said unto the people,"


def demo() -> None:
    """Show the embedded model's statistics, stream text from a prompt, and refuse three bad inputs."""
    print("The embedded model: a GPT-2 trained on the King James Bible.\n")
    _run("info", BUNDLED)
    _run("generate", PROMPT, "--temperature", "0.7", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "80")

    print("Three inputs that are refused, each with one line:\n")
    _run("generate", PROMPT, "--model", "tiny-gpt3", "--local-files-only")
    with tempfile.TemporaryDirectory() as folder:
        corrupt = _copy(Path(folder) / "corrupt")
        weights = corrupt / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1_000_000])
        _run("generate", PROMPT, "--model", str(corrupt))

        wrong = _copy(Path(folder) / "wrong-key")
        config = json.loads((wrong / "config.json").read_text())
        (wrong / "config.json").write_text(json.dumps(config | {"add_cross_attention": True}))
        _run("generate", PROMPT, "--model", str(wrong))


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(locate(BUNDLED), folder))


def _run(*arguments: str) -> None:
    """Runs the command as a user would, and shows what was typed."""
    shown = " ".join(f'"{each}"' if " " in each else each for each in arguments)
    print(f"$ gpukernels {shown}", flush=True)
    subprocess.run(
        [sys.executable, "-c", "from model.cli import main; main()", *arguments], stderr=subprocess.STDOUT, check=False
    )
    print(flush=True)
