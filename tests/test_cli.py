"""The `gpukernels` command: its output, its exit codes, and one line for every mistake."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from command import start
from damage import DAMAGE, edit_config, make

import gpukernels
import model
from model.cli import app
from model.load import BUNDLED

PROMPT = "And Moses said unto"
GOLDEN = [259, 492, 269, 432, 12, 1414, 361, 289, 259, 498]

# --- generate


def test_the_golden_tokens_come_as_one_document():
    process = start("generate", PROMPT, "--temperature", "0", "--max-new-tokens", "40", "--json")
    out, err = process.communicate()
    document = json.loads(out)
    assert process.returncode == 0
    assert err == b""
    assert document["tokens"][:10] == GOLDEN
    assert len(document["tokens"]) == 40
    assert document["finish_reason"] == "length"
    assert document["text"].startswith(" the children of Israel, Go up to the land")
    assert document["prompt"] == PROMPT


@pytest.mark.parametrize(
    "options", [("--temperature", "0"), ("--temperature", "1.2", "--seed", "5"), ("--stop", "God")]
)
def test_the_streamed_text_is_the_documents(run, options):
    options = (PROMPT, "--max-new-tokens", "40", *options)
    code, document, _ = run("generate", *options, "--json")
    assert code == 0
    assert run("generate", *options, "--quiet") == (0, json.loads(document)["text"] + "\n", "")


def test_the_speed_goes_to_standard_error_and_quiet_leaves_it_out(run):
    code, out, err = run("generate", PROMPT, "-t", "3")
    assert (code, out) == (0, " the children of\n")
    (line,) = err.splitlines()
    assert line.startswith("[3 tokens, length; ")
    assert run("generate", PROMPT, "-t", "3", "--quiet") == (0, out, "")


def test_several_answers_are_several_texts(run):
    options = ("generate", PROMPT, "-t", "5", "-n", "3", "--temperature", "1", "--seed", "1")
    _, document, _ = run(*options, "--json")
    texts = [each["text"] for each in json.loads(document)["generations"]]
    assert len(set(texts)) == 3
    assert run(*options, "--quiet") == (0, "".join(text + "\n" for text in texts), "")


@pytest.mark.parametrize("arguments", [(), ("-",)])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_prompt_may_come_from_standard_input(run, arguments, end):
    code, document, _ = run("generate", *arguments, "-t", "10", "--json", stdin=PROMPT.encode() + end)
    assert code == 0
    assert json.loads(document)["prompt"] == PROMPT
    assert json.loads(document)["tokens"] == GOLDEN


def test_an_empty_standard_input_starts_from_the_models_first_token(run):
    code, document, _ = run("generate", "-t", "5", "--json", stdin=b"")
    assert code == 0
    assert json.loads(document)["prompt_tokens"] == 1
    assert json.loads(document)["tokens"] == model.load(BUNDLED, device="cpu").generate([0], max_new_tokens=5).tokens


def test_a_standard_input_that_is_not_utf8_is_a_mistake(refused):
    (line,) = refused("generate", stdin=b"And Moses \xff\xfe")
    assert line.startswith("error: standard input is not UTF-8 text: ")


def test_a_prompt_that_is_not_utf8_is_a_mistake():
    process = start("generate", b"And Moses \xff")
    _, err = process.communicate()
    assert process.returncode == 2
    assert b"Traceback" not in err


def test_no_prompt_at_a_terminal_is_a_mistake(refused, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO())
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert refused("generate") == ["error: no prompt: give one as the argument, or on standard input"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "2"), "top_p"),
        (("--min-p", "-0.1"), "min_p"),
        (("--top-k", "-1"), "top_k"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("-n", "0"), "n must"),
        (("--overflow", "x"), "overflow"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--max-new-tokens", "512"), "512 positions"),
        (("--stop", ""), "stop"),
        (("--seed", "-1"), "seed"),
        (("--seed", str(2**64)), "seed"),
        (("--device", "tpu"), "device"),
        (("--dtype", "int8"), "dtype"),
        (("--device", "cpu", "--dtype", "bfloat16"), "bfloat16"),
        (("--few-shot", "no/such.json"), "no/such.json"),
        (("--few-shot", "/dev/zero"), "/dev/zero: 16842752 bytes, more than the 16777216 such a file may have"),
        (("--model", "no/such/folder.safetensors"), "no/such/folder.safetensors"),
        (("--model", "./no-such-folder"), "./no-such-folder"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_option_that_cannot_be_is_one_line_that_names_it(refused, options, names, form):
    (line,) = refused("generate", PROMPT, *options, *form)
    assert names in line


@pytest.mark.parametrize("options", [("--temperature", "hot"), ("--no-such-option",), ("--top-k", "1.5"), ("-n",)])
def test_an_option_that_is_not_one_is_refused_with_its_name(run, options):
    code, out, err = run("generate", PROMPT, *options)
    assert (code, out) == (2, "")
    assert options[0] in err
    assert "Traceback" not in err


def test_a_prompt_that_is_too_long_is_a_mistake_and_may_be_cut_or_slide(run, refused):
    prompt = "And Moses said. " * 200
    (line,) = refused("generate", prompt, "-t", "4")
    assert "512 positions" in line
    for overflow in ("truncate_left", "slide"):
        code, _, _ = run("generate", prompt, "-t", "4", "--overflow", overflow, "--quiet")
        assert code == 0


def test_a_name_that_is_not_in_the_cache_is_one_line_without_the_network(refused, tmp_path):
    pytest.importorskip("model.hub")
    for command in (("generate", PROMPT, "--model"), ("info",), ("check",)):
        (line,) = refused(*command, "owner/no-such-model", "--local-files-only", "--cache-dir", tmp_path)
        assert "owner/no-such-model" in line


def test_a_few_shot_file_makes_the_prompt_and_its_end(run, tmp_path):
    path = tmp_path / "shots.json"
    path.write_text(
        json.dumps({"instruction": "Name the son.", "examples": [["Abraham", "Isaac"], ["Isaac", "Jacob"]]})
    )
    code, document, _ = run("generate", "Jacob", "--few-shot", path, "-t", "8", "--json")
    prompt = json.loads(document)["prompt"]
    assert code == 0
    assert prompt == (
        "Name the son.\n\nInput: Abraham\nOutput: Isaac\n\nInput: Isaac\nOutput: Jacob\n\nInput: Jacob\nOutput:"
    )
    assert "\n\n" not in json.loads(document)["text"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"shots": []}',
        '{"examples": 5}',
        '{"examples": null}',
        '{"examples": [1]}',
        '{"examples": ["ab"]}',
        '{"examples": {"ab": 1}}',
        '{"examples": [["a"]]}',
        '{"examples": [["a", 1]]}',
        '{"instruction": 5}',
        '{"separator": ""}',
        '{"separator": 5}',
        '{"input_label": null}',
    ],
)
def test_a_few_shot_file_of_another_form_is_a_mistake(refused, tmp_path, content):
    path = tmp_path / "shots.json"
    path.write_text(content)
    refused("generate", PROMPT, "--few-shot", path)


# --- info, check, env


def test_info_shows_config_parameters_memory_and_tensors(run):
    code, out, _ = run("info", BUNDLED, "--json")
    document = json.loads(out)
    lm = model.load(BUNDLED, device="cpu")
    assert code == 0
    assert document["parameters"] == lm.parameters.count
    assert document["config"]["n_layer"] == lm.config.n_layer
    assert document["stored_dtype"] == "F16"
    assert [each["weights"] for each in document["memory"]] == [4 * lm.parameters.count, 2 * lm.parameters.count]
    assert [tuple(each["shape"]) for each in document["tensors"]] == [array.shape for array in lm.parameters.values()]
    _, text, _ = run("info", BUNDLED)
    for shown in (f"{lm.parameters.count:,}", "n_layer", "float32", "float16", "stored as F16"):
        assert shown in text
    assert "blocks.5.qkv.weight" not in text
    _, text, _ = run("info", BUNDLED, "--tensors")
    assert all(name in text for name in lm.parameters)


def test_info_of_a_preset_needs_no_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = run("info", "gpt2-xl", "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == 1_557_611_200
    assert "124,439,808" in run("info", "gpt2")[1]
    text = " ".join(run("info", "llama-2-7b")[1].split())
    assert "rope │ rope_theta 10000.0, rope_type default │" in text


@pytest.mark.parametrize("name", ["[bold]", "[/bold]", "a [red] b"])
def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(run, tmp_path, monkeypatch, name):
    make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for command in ("info", "check"):
        code, out, _ = run(command, f"./{name}")
        assert code == 0
        assert name in out


def test_check_says_ok_or_lists_every_problem(run, tmp_path):
    folder = make(tmp_path / "tiny")
    code, out, err = run("check", folder)
    assert (code, err) == (0, "")
    assert out.startswith(f"ok: {folder}: 28 tensors fit")
    edit_config(folder, add_cross_attention=True, n_head=0, other=1)
    (folder / "tokenizer.json").write_text("")
    code, out, err = run("check", folder)
    assert (code, err) == (1, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == ["problem"] * 3
    code, out, err = run("check", folder, "--json")
    document = json.loads(out)
    assert (code, document["ok"], len(document["problems"])) == (1, False, 3)


def test_check_of_what_is_not_there_is_a_mistake(refused, tmp_path):
    (line,) = refused("check", tmp_path / "no")
    assert "there is no such file or folder" in line


def test_env_says_what_will_run_and_why(run, monkeypatch):
    monkeypatch.setattr("model.cli.env.why_no_cuda", lambda: "there is no NVIDIA driver on this machine")
    code, out, _ = run("env", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["device_auto"] == "cpu"
    assert document["why"] == "there is no NVIDIA driver on this machine"
    assert document["packages"]["numpy"]
    code, out, _ = run("env")
    assert code == 0
    assert "NumPy on the CPU" in out


@pytest.mark.parametrize("command", ["check", "info", "generate"])
def test_no_torch_is_imported_for_numpy(command):
    arguments = {"generate": ["generate", PROMPT, "-t", "1", "--device", "cpu"]}.get(command, [command, BUNDLED])
    script = f"""
import sys
from model.cli import main
sys.argv = ["gpukernels", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# --- damage, and readers that go


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_list_with_exit_code_1_for_check_and_2_for_generate(run, refused, whole, tmp_path, kind):
    folder = shutil.copytree(whole, tmp_path / "tiny")
    DAMAGE[kind].do(folder)
    code, out, err = run("check", folder)
    assert (code, err) == (1, "")
    problems = [line.removeprefix("problem: ") for line in out.splitlines() if line.startswith("problem: ")]
    assert any(str(folder / DAMAGE[kind].file) in problem for problem in problems)
    assert refused("generate", "a", "--model", folder, lines=None) == [f"error: {problem}" for problem in problems]


@pytest.mark.parametrize(
    "kind",
    [
        "an empty file",
        "a header of 2**63 bytes",
        "a cut inside the data",
        "a header nested too deep",
        "offsets that overlap",
        "a Git LFS pointer",
        "a pickle",
        "only a .bin",
        "a shard on the way up",
        "a shard missing",
        "a tensor missing",
        "a name that cannot be printed",
        "cross-attention",
        "a config with a long number",
        "a tokenizer that its library panics on",
    ],
)
def test_the_command_never_shows_a_traceback(whole, tmp_path, kind):
    folder = shutil.copytree(whole, tmp_path / "tiny")
    DAMAGE[kind].do(folder)
    processes = start("check", folder), start("generate", "a", "--model", folder)
    for process, code in zip(processes, (1, 2), strict=True):
        out, err = process.communicate()
        assert process.returncode == code
        assert b"Traceback" not in err + out
        assert str(folder).encode() in err + out


@pytest.mark.parametrize(
    "arguments", [("info", BUNDLED, "--json"), ("check", BUNDLED), ("generate", PROMPT, "-t", "60"), ("env",)]
)
def test_a_reader_that_goes_away_is_no_error_message(arguments):
    with start(*arguments) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_an_output_that_is_closed_from_the_start_is_no_error(run, refused, monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)
    code, out, err = run("check", BUNDLED)
    assert (code, err) == (0, "")
    assert bool(out) == (closed == "stderr")
    monkeypatch.setattr(sys, closed, None)
    code, out, err = run("check", "./no-such-folder")
    assert (code, out) == (2, "")
    assert bool(err) == (closed == "stdout")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_document_is_json_in_whatever_encoding(run, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    code, _, _ = run("generate", "é 日 🙂 \x85", "-t", "1", "--json")
    assert code == 0
    assert json.loads(raw.getvalue().decode(encoding))["prompt"] == "é 日 🙂 \x85"


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in app.app.registered_commands:
        assert command.name in out


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, f"gpukernels {gpukernels.__version__}\n", "")
