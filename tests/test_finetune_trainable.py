"""What trains: patterns, layers, what is refused, and the table that is shown."""

import io

import pytest
from rich.console import Console

from model import gpt2
from model.config import GPT2Config
from model.errors import ModelError
from model.finetune.trainable import matching, select, table

CONFIG = GPT2Config(vocab_size=40, n_positions=8, n_embd=4, n_layer=12, n_head=1)
SIZES = {slot.name: slot.size for slot in gpt2.slots(CONFIG)}


def test_everything_trains_by_default():
    assert select(SIZES) == set(SIZES)


def test_a_pattern_freezes_and_another_unfreezes():
    found = select(SIZES, freeze=["tokens.*", "blocks.1.*"], unfreeze=["blocks.1.norm?.bias"])
    frozen = {"tokens.weight", *(name for name in SIZES if name.startswith("blocks.1."))}
    assert found == set(SIZES) - frozen | {"blocks.1.norm1.bias", "blocks.1.norm2.bias"}
    assert select(SIZES, freeze=["*"], unfreeze=["norm.*"]) == {"norm.weight", "norm.bias"}
    assert {"blocks.10.up.bias", "blocks.11.up.bias"} <= found  # blocks.1.* is of layer 1 alone


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("4", {4}), ("2-5", {2, 3, 4, 5}), (" 11 ", {11}), ("9-", {9, 10, 11}), (range(0, 12, 5), {0, 5, 10})],
)
def test_layers_train_alone(layers, wanted):
    found = select(SIZES, layers=layers)
    assert found == {name for name in SIZES if name.split(".")[0] == "blocks" and int(name.split(".")[1]) in wanted}
    assert select(SIZES, layers=layers, unfreeze=["norm.bias"]) == found | {"norm.bias"}
    assert select(SIZES, layers=layers, freeze=["*.weight"]) == {name for name in found if name.endswith("bias")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"freeze": ["blocks.3.qvk.weight"]},
            "'blocks.3.qvk.weight' matches nothing; there is blocks.*.qkv.weight",
        ),
        ({"unfreeze": ["wte"]}, "'wte' matches nothing; there is tokens.weight, "),
        ({"freeze": ["Tokens.weight"]}, "there is tokens.weight"),
        ({"freeze": ["blocks.12.*"]}, "'blocks.12.*' matches nothing"),
        ({"freeze": ["*"]}, "nothing would train: every parameter is frozen"),
        ({"layers": "12"}, "layers must be from 0 to 11, the model's last, got 12-12"),
        ({"layers": "12-"}, "from 0 to 11, the model's last, got none"),
        ({"layers": "5-2"}, "from 0 to 11, the model's last, got none"),
        ({"layers": "last"}, 'layers must be like "4", "2-5" or "8-", got \'last\''),
        ({"layers": range(-2, 0)}, "got -2--1"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ModelError) as fault:
        select(SIZES, **options)
    assert said in str(fault.value)


def test_matching_takes_any_pattern_of_the_shell():
    assert matching(SIZES, "blocks.[0-1].up.bias") == {"blocks.0.up.bias", "blocks.1.up.bias"}


def test_the_table_has_every_kind_once_and_the_sums():
    chosen = select(SIZES, freeze=["tokens.*", "blocks.[1-3].qkv.weight"])
    page = io.StringIO()
    Console(file=page, width=120, color_system=None).print(table(SIZES, chosen, tied=True))
    lines = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
             for line in page.getvalue().splitlines() if line.startswith("│")}  # fmt: skip
    assert len(lines) == 2 + 12 + 2 + 1
    assert lines["tokens.weight (and the output)"] == ["no", "160", "0", "0%"]
    assert lines["blocks.*.qkv.weight"] == ["0, 4-11", "576", "432", "75%"]
    assert lines["blocks.*.up.bias"] == ["yes", "192", "192", "100%"]
    total, trained = sum(SIZES.values()), sum(SIZES[name] for name in chosen)
    assert lines["all"] == ["", f"{total:,}", f"{trained:,}", f"{trained / total:.2%}"]
