"""The command line: its commands, its options, and what bad input gets."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import gpt
from gpt import cli
from gpt.data import open_tokens
from gpt.errors import UserError
from gpt.options import Parser, from_dict, parse_config, read_json, read_json_object, read_yaml, to_dict
from gpt.train.checkpoint import find_checkpoint
from gpt.weights.native import save_model
from reference import GPT, PRESETS

ROOT = Path(__file__).parents[2]


@dataclass
class Optimizer:
    lr: float = 1e-3
    """Learning rate, 100% of it."""
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "adamw"


@dataclass
class Run:
    """A run."""

    data: str = "a"
    """Where the text is."""
    name: str | None = None
    steps: int | None = None
    engine: Literal["auto", "numpy", "torch"] = "auto"
    shuffle: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")


def parse(text: str) -> Run:
    return parse_config(Run, text.split(), prog="twingrad train")


# ---------------------------------------------------------------- options


def test_no_arguments_give_the_defaults():
    assert parse("") == Run()


def test_flags_set_fields_of_every_type():
    run = parse(
        "--data b --steps 3 --engine numpy --shuffle false --lr 4e-4 --betas 0.8,0.9 --model.emb_dim 48 "
        "--model.mlp gelu --model.norm_eps=1e-6 --model.bias false"
    )
    assert run == Run(
        data="b",
        steps=3,
        engine="numpy",
        shuffle=False,
        model={"emb_dim": 48, "mlp": "gelu", "norm_eps": 1e-6, "bias": False},
        optimizer=Optimizer(lr=4e-4, betas=(0.8, 0.9)),
    )


def test_a_truth_value_needs_no_argument():
    assert parse("--shuffle false").shuffle is False
    assert parse("--shuffle --data b").shuffle is True


def test_none_and_negative_numbers_are_values():
    assert parse("--steps none").steps is None
    assert parse("--lr -1").optimizer.lr == -1.0


def test_a_name_that_two_groups_share_needs_its_group_in_the_nested_one():
    run = parse("--name x --optimizer.name sgd")
    assert (run.name, run.optimizer.name) == ("x", "sgd")


def test_flags_override_the_file_wherever_they_stand(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: from-file\nsteps: 7\nmodel: {emb_dim: 32, n_heads: 2}\noptimizer: {lr: 3e-4}\n")
    expected = Run(data="b", steps=7, model={"emb_dim": 32, "n_heads": 4}, optimizer=Optimizer(lr=3e-4))
    assert parse(f"--data b --config {file} --model.n_heads 4") == expected
    assert parse(f"--config {file} --data b --model.n_heads 4") == expected


def test_printed_options_read_back(tmp_path, capsys):
    flags = "--data b --steps 3 --betas 0.1,0.2 --model.emb_dim 48"
    with pytest.raises(SystemExit) as stop:
        parse(f"{flags} --print_config")
    assert stop.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(f"--config {file}") == parse(flags)


def test_of_several_processes_the_first_prints_the_options(monkeypatch, capsys):
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for rank, lines in (("0", True), ("1", False)):
        for name, value in {**place, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            parse("--print_config")
        assert bool(capsys.readouterr().out) is lines


def test_from_dict_is_the_inverse_of_to_dict():
    run = Run(data="b", model={"emb_dim": 3}, optimizer=Optimizer(betas=(0.0, 0.5)))
    assert to_dict(run)["optimizer"]["betas"] == [0.0, 0.5]
    assert from_dict(Run, to_dict(run)) == run


def test_help_shows_each_field_with_its_docstring_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A run." in text
    assert "--data text Where the text is. [a]" in text
    assert "--lr number Learning rate, 100% of it. [0.001]" in text
    assert "--engine auto|numpy|torch" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--step 3", "twingrad train has no option --step; did you mean --steps?"),
        ("--optimizer.rl 3", "twingrad train has no option --optimizer.rl; did you mean --optimizer.lr?"),
        ("--zzz", "twingrad train has no option --zzz"),
        ("text", "twingrad train has no argument text"),
        ("--steps 1.5", "steps: expected integer|none, got '1.5'"),
        ("--steps -1", "steps: expected at least 0, got -1"),
        ("--lr fast", "optimizer.lr: expected number, got 'fast'"),
        ("--betas 0.9", "optimizer.betas: expected number,number, got '0.9'"),
        ("--engine nunpy", "engine: expected auto|numpy|torch, got 'nunpy'; did you mean numpy?"),
        ("--shuffle maybe", "shuffle: expected true|false, got 'maybe'"),
        ("--data", "argument --data: expected one argument (see twingrad train --help)"),
        ("--config missing.yaml", "missing.yaml: No such file or directory"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step: 3", "step: no such option; did you mean steps? (with --config FILE)"),
        (b"optimizer: {beta: 1}", "optimizer.beta: no such option; did you mean betas? (with --config FILE)"),
        (b"optimizer: 3", "optimizer: expected a group of options, got 3 (with --config FILE)"),
        (b"steps: true", "steps: expected integer|none, got True (with --config FILE)"),
        (b"data: 3", "data: expected text, got 3 (with --config FILE)"),
        (b"- data", "FILE: expected a YAML mapping of options, got a list"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse(f"--config {file}")
    assert str(caught.value) == message.replace("FILE", str(file))


@pytest.mark.parametrize("content", [b"data: [", b"\xff\xfe\x00\x81"])
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml: not YAML: ") as caught:
        parse(f"--config {file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b'"\xff"', b"[" * 100_000, b"9" * 5000, b'{"a": 1}\n\n}'])
def test_a_file_that_is_not_json_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: not JSON: ")
    assert "\n" not in str(caught.value)


def test_a_json_file_gives_what_it_holds(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(str(file)) == read_json_object(file) == {"é": [1, None]}
    file.write_text("\ufeff[1]", encoding="utf-8")  # as Windows writes it
    assert read_json(file) == [1]
    with pytest.raises(UserError) as caught:
        read_json_object(file)
    assert str(caught.value) == f"{file}: expected a JSON object, got list"
    for absent, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as caught:
            read_json_object(absent)
        assert str(caught.value).startswith(f"{absent}: could not be read: {why}")


def test_an_option_below_a_value_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: 3")
    with pytest.raises(UserError, match="optimizer: expected a group of options, got 3"):
        parse(f"--config {file} --lr 1")


def test_options_may_not_be_abbreviated():
    parser = Parser(prog="twingrad x")
    parser.add_argument("--json", action="store_true")
    with pytest.raises(UserError, match="no option --js; did you mean --json"):
        parser.parse_args(["--js"])


@dataclass
class Spelled:
    a_rate: float = 0.0
    text: str = ""
    a_model: dict[str, Any] = field(default_factory=dict)
    a_group: Optimizer = field(default_factory=Optimizer)


@pytest.mark.parametrize(
    "dashed, underscored",
    [
        ("--a-rate 0.5", "--a_rate 0.5"),
        ("--a-rate=-0.5 --text=--a-b", "--a_rate=-0.5 --text=--a-b"),
        ("--a-model.emb-dim 3 --a-model.norm-eps=1e-5", "--a_model.emb_dim 3 --a_model.norm_eps=1e-5"),
        ("--a-group.name x-y", "--a_group.name x-y"),
    ],
)
def test_dashes_between_an_options_words_are_as_good_as_underscores(dashed, underscored):
    ours, plain = (parse_config(Spelled, text.split(), prog="twingrad x") for text in (dashed, underscored))
    assert ours == plain != Spelled()


def test_values_and_what_follows_two_dashes_keep_theirs():
    parser = Parser(prog="twingrad x")
    parser.add_argument("--some_text")
    parser.add_argument("words", nargs="*")
    known = parser.parse_args(["--some-text=a--b-c", "d-e", "--", "--f-g"])
    assert (known.some_text, known.words) == ("a--b-c", ["d-e", "--f-g"])


def test_configurations_are_printed_by_either_spelling(capsys):
    for flag in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit) as stop:
            parse(f"{flag} --steps 4")
        assert stop.value.code == 0
        assert "steps: 4" in capsys.readouterr().out


# ---------------------------------------------------------------- commands and exit statuses


def run_with(monkeypatch, error: BaseException) -> int:
    """The exit status of a command that fails with `error`."""

    def fail(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", fail)
    return cli.main(["fail"])


def test_help_lists_every_command_with_a_summary(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name
        assert command.__doc__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"twingrad {name}" in capsys.readouterr().out


def test_an_unknown_command_names_the_closest(capsys):
    assert cli.main(["trian"]) == 2
    assert "twingrad has no command trian; did you mean train?" in capsys.readouterr().err


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: twingrad" in capsys.readouterr().out


def test_a_user_error_is_one_line(monkeypatch, capsys):
    assert run_with(monkeypatch, UserError("n_heads: 3 does not\ndivide 64")) == 2
    assert capsys.readouterr().err == "error: n_heads: 3 does not divide 64\n"


def test_a_full_disk_names_the_file(monkeypatch, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/last.safetensors")
    assert run_with(monkeypatch, error) == 2
    assert capsys.readouterr().err.startswith("error: runs/a/last.safetensors: No space left on device")


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(monkeypatch, capsys):
    monkeypatch.delenv("TWINGRAD_TRACEBACK", raising=False)
    assert run_with(monkeypatch, KeyError("x")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'x'")
    assert "TWINGRAD_TRACEBACK=1" in shown
    assert "Traceback" not in shown


def test_a_traceback_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("TWINGRAD_TRACEBACK", "1")
    assert run_with(monkeypatch, UserError("x")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_130_quietly(monkeypatch, capsys):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_gone_is_no_error():
    """Write far more than a pipe holds to a reader that stops after one line."""
    code = (
        "import sys\nfrom gpt import cli\n"
        "cli.COMMANDS['flood'] = lambda argv: print('x\\n' * 1_000_000)\n"
        "sys.exit(cli.main(['flood']))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.readline()
    writer.stdout.close()
    shown = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(timeout=60) == 141
    assert shown == b""


def test_python_m_gpt_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gpt", "version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"{gpt.__version__}\n"


# ---------------------------------------------------------------- data


def test_data_list_shows_the_catalogue(capsys):
    assert cli.main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("the-verdict ") and "20,479" in line for line in lines)


def test_data_get_prints_a_verified_file(monkeypatch, capsys):
    if "TWINGRAD_DATA" not in os.environ:
        pytest.skip("TWINGRAD_DATA does not name a folder with the-verdict.txt")
    assert cli.main(["data", "get", "the-verdict"]) == 0
    assert len(Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")) == 20479


def test_data_get_names_the_closest_data_set(capsys):
    assert cli.main(["data", "get", "the-verdikt"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "did you mean 'the-verdict'" in shown
    assert shown.count("\n") == 1


def test_data_prepare_writes_a_token_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    (tmp_path / "b.txt").write_text("de", encoding="utf-8")
    out = tmp_path / "out.tokens"
    assert cli.main(["data", "prepare", str(tmp_path), "--out", str(out), "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out == f"{out}: 6 tokens of 257 from 2 files\n"
    assert open_tokens(out).ids.tolist()[:4] == [97, 98, 99, 256]


def test_the_run_config_has_no_ambiguous_flag():
    """Every option of `twingrad train` can be given by its field's name alone."""
    from gpt.train.config import RunConfig

    run = RunConfig()
    groups = [run, *(value for value in vars(run).values() if dataclasses.is_dataclass(value))]
    names = [item.name for group in groups for item in dataclasses.fields(group)]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------- train

TINY = [
    "--preset",
    "bytes-tiny",
    "--engine",
    "numpy",
    "--model.n_layers",
    "1",
    "--batch_size",
    "4",
    "--eval_every",
    "2",
]


@pytest.fixture
def text(tmp_path):
    """A text of 2,600 characters."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz" * 100, encoding="utf-8")
    return str(path)


def train(*flags: str) -> int:
    return cli.main(["train", *TINY, *flags])


def test_train_writes_a_run_that_generate_continues(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train("--data", text, "--out", out, "--steps", "2") == 0
    settings = read_yaml(Path(out, "config.yaml"))
    assert settings["model"] == {"n_layers": 1}
    assert settings["train"]["steps"] == 2
    capsys.readouterr()
    flags = ["--model", out, "--prompt", "abc", "--engine", "numpy", "--max_new_tokens", "3"]
    assert cli.main(["generate", *flags]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_train_stopped_by_ctrl_c_exits_130_and_can_be_resumed(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gpt", "train", *TINY, "--data", text, "--out", str(out), "--steps", "1000000"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.csv"
    while running.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    shown, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "--resume" in shown + errors
    assert find_checkpoint(out, "last")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "hello"], "text: of a model's page, and --layer studies one layer alone; leave one out"),
        (["--model", "gpt2-small"], "model: of a model's page"),
        (["--dropout", "0.1"], "dropout: of a model's page"),
        (["--yours", "mine.py", "--out", "page.html"], "out: your own layer is compared in the terminal alone"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
    ],
)
def test_options_of_no_use_are_refused_where_one_layer_is_studied(flags, message, capsys):
    assert cli.main(["study", "--layer", "layer_norm", *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_model_s_page_is_not_text_alone(capsys):
    assert cli.main(["study", "--text_only"]) == 2
    assert "error: text_only: a layer alone is shown as text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "gpt2-smal"], "did you mean gpt2-small?"),
        (["--data", "the-verdikt"], "did you mean 'the-verdict'?"),
        (["--tokenizer", "gpt3"], "unknown tokenizer 'gpt3'"),
        (["--stpes", "3"], "twingrad train has no option --stpes; did you mean --steps?"),
        (["--model.n_head", "3"], "n_head: no such field of a GPTConfig; did you mean n_heads?"),
        (["--model.n_kv_heads", "2"], "n_kv_heads: 2 does not divide n_heads 3"),
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--lr", "-1"], "lr: expected a positive learning rate, got -1.0"),
        (["--model.context_length", "5000"], "training split"),
        (["--engine", "jax"], "engine: expected auto|numpy|torch|triton, got 'jax'"),
        (["--max_length", "65"], "max_length: expected at most the model's context_length 64, got 65"),
    ],
)
def test_train_refuses_in_one_line_and_writes_nothing(text, tmp_path, flags, message, capsys):
    out = tmp_path / "run"
    assert train("--data", text, "--out", str(out), *flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not out.exists()


def test_train_refuses_a_text_that_is_not_utf_8(tmp_path, capsys):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"abc\xe9" * 1000)
    assert train("--data", str(path), "--out", str(tmp_path / "run")) == 2
    assert "not UTF-8" in capsys.readouterr().err


# ---------------------------------------------------------------- generate


@pytest.fixture
def checkpoint(tmp_path):
    """The file of an untrained byte model."""
    config = PRESETS["bytes-tiny"]
    path = tmp_path / "model.safetensors"
    save_model(path, GPT.seeded(config, seed=1).params, config, {"name": "bytes"})
    return str(path)


def test_generate_continues_the_prompt_alike_on_either_engine(checkpoint, capsys):
    pytest.importorskip("torch")
    texts = []
    for engine in ("numpy", "torch"):
        flags = ["--prompt", "Hello", "--engine", engine, "--max_new_tokens", "5", "--temperature", "1", "--top_k", "9"]
        assert cli.main(["generate", "--model", checkpoint, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Hello")
    assert len(texts[0]) > len("Hello\n")
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "prompt: expected a text to continue, got none"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected a number of at least 0, got -1.0"),
        (["--prompt", "x", "--top_k", "0"], "top_k: expected at least 1, got 0"),
        (["--prompt", "x", "--topk", "3"], "twingrad generate has no option --topk; did you mean --top_k?"),
    ],
)
def test_generate_refuses_in_one_line(checkpoint, flags, message, capsys):
    assert cli.main(["generate", "--model", checkpoint, *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_generate_without_a_checkpoint_names_where_it_looked(tmp_path, capsys):
    assert cli.main(["generate", "--prompt", "x", "--model", str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert str(tmp_path / "none") in shown
    assert shown.count("\n") == 1


def test_generate_with_an_engine_that_is_not_installed_names_the_command(checkpoint):
    code = (
        "import sys; sys.modules['torch'] = None\nfrom gpt import cli\n"
        f"sys.exit(cli.main(['generate', '--model', {checkpoint!r}, '--prompt', 'x', '--engine', 'torch']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: this needs torch, which is not installed: pip install 'twingrad[torch]'\n"
