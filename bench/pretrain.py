"""The embedded model from scratch, by this package's own trainer, and how good a model of its text is.

    python -m bench.pretrain --check MODEL          the validation loss of a model
    python -m bench.pretrain --out FOLDER           train; Ctrl-C stops and saves, --resume goes on

The text is the King James Bible in `bench/data/kjv`, every chapter led by `<|endoftext|>`. The model has the shape
and the tokenizer of the embedded one, 5.92 million parameters. It sees the text PASSES times, each time cut into
windows at another place, so that no token always stands at a window's beginning. FOLDER/model has the best weights
as float16, which is what the package would ship.

The validation loss is in nats a token: the mean over the 50 whole windows of 512 tokens of `val.txt`, each the mean
over its 511 predictions, by a float32 forward pass. The embedded model is what this recipe made: 2.951
(perplexity 19.1), in 43 minutes on 2 cores of a Xeon.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import model
from bench.report import machine
from model.load import locate

KJV = Path(__file__).parent / "data" / "kjv"
PASSES, WINDOW = 8, 512

#: Of `lm.finetune`. Decay of matrices, the tables among them.
OPTIONS = {
    "epochs": 1,
    "batch_size": 4,
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "schedule": "linear",
    "warmup": 60,
    "weight_decay": 0.3,
    "dropout": 0.1,
    "betas": (0.9, 0.97),
    "clip": 1.0,
    "evaluate_every": 500,
    "seed": 0,
}


def stream(name: str, tokenizer: model.Tokenizer) -> np.ndarray:
    """(N,) int32: the tokens of a text, each chapter behind the end of the one before."""
    chapters = (KJV / name).read_text(encoding="utf-8").split("\n\n")
    return np.array(tokenizer.encode("".join(f"<|endoftext|>{each.strip()}" for each in chapters)), np.int32)


def windows(ids: np.ndarray, start: int = 0) -> np.ndarray:
    """(n, WINDOW): the whole windows from `start`."""
    count = (len(ids) - start) // WINDOW
    return ids[start : start + count * WINDOW].reshape(count, WINDOW)


def validation_loss(lm: model.LanguageModel, first: int | None = None) -> float:
    """Nats a token over the first so many validation windows; None: all 50."""
    losses = []
    for ids in windows(stream("val.txt", lm.tokenizer))[:first]:
        logits = lm.logits(ids)[0, :-1].astype(np.float64)
        top = logits.max(-1)
        total = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
        losses.append((total - logits[np.arange(WINDOW - 1), ids[1:]]).mean())
    return float(np.mean(losses))


def main(
    check: Annotated[
        str | None, typer.Option(help="A model whose validation loss to tell.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Train, into this new folder.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    max_time: Annotated[
        float | None, typer.Option(help="Seconds after which to stop; --resume goes on.", show_default=False)
    ] = None,
) -> None:
    """Train or check, and end with one line of JSON."""
    try:
        if (check is None) == (out is None):
            raise model.ModelError("say either --check MODEL or --out FOLDER")
        if check:
            document = {
                "model": check,
                "validation_loss": validation_loss(model.load(check, device="cpu", dtype="float32")),
            }
        else:
            document = train(out, resume=resume, max_time=max_time)
    except model.ModelError as fault:
        for problem in fault.problems:
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(2) from None
    print(json.dumps({"bench": "pretrain", **machine(), **document}))


def train(out: Path, *, resume: bool = False, max_time: float | None = None) -> dict[str, object]:
    """The run; what it came to, and the loss of the weights as they would be shipped."""
    tokenizer = model.Tokenizer.from_folder(locate("tiny-gpt2"))
    shape = model.GPT2Config(
        vocab_size=4096, n_positions=WINDOW, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0
    )
    lm = model.from_config(shape, seed=0, device="auto", dtype="float32")
    lm.tokenizer = tokenizer
    ids = stream("train.txt", tokenizer)
    passes = [windows(ids, start=number * WINDOW // PASSES) for number in range(PASSES)]
    result = lm.finetune(
        np.concatenate(passes),
        out=out / "run",
        resume=resume,
        validation_data=windows(stream("val.txt", tokenizer)),
        max_time=max_time,
        **OPTIONS,
    )
    document = {"reason": result.reason, "steps": result.steps, "seconds": round(result.seconds)}
    if result.reason != "finished" or int(os.environ.get("RANK", 0)):
        return document
    small = model.load(out / "run", device="cpu", dtype="float16")
    small.save(out / "model")
    return {**document, "validation_loss": validation_loss(model.load(out / "model", device="cpu", dtype="float32"))}


if __name__ == "__main__":
    typer.run(main)
