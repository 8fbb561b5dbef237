"""twingrad evaluate: its commands, the workshop's form of them, and what bad input gets."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.evaluate.cli import COMMANDS, main
from gpt.evaluate.likelihood import perplexity
from gpt.llm import LLM
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference.config import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[3]
CONFIG = PRESETS["bytes-tiny"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, initialize(CONFIG, Generator(1), "gpt2"), CONFIG, ByteTokenizer().spec())
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """MMLU's philosophy, six questions, in the current folder's folder mmlu."""
    for split in ("dev", "test"):
        path = tmp_path / "mmlu" / split / f"philosophy_{split}.csv"
        path.parent.mkdir(parents=True)
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([f"{split} {i}?", "a", "b", "c", "d", "ABCD"[i % 4]] for i in range(6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWINGRAD_DATA", raising=False)
    return tmp_path


def test_list_shows_the_tasks_of_a_folder(folder, capsys):
    lines = ["task                dev    test     val", "mmlu_philosophy       6       6"]
    for arguments in ([], ["mmlu"], ["--data", str(folder / "mmlu")]):
        assert main(["list", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == lines


def test_list_says_where_tasks_are_when_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWINGRAD_DATA", raising=False)
    assert main(["list"]) == 0
    assert "no tasks in mmlu. MMLU's are in https://" in capsys.readouterr().out
    with pytest.raises(UserError, match="none: expected a folder of tasks"):
        main(["list", "none"])


def test_a_folder_is_looked_for_in_the_data_folder(folder, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("TWINGRAD_DATA", str(folder))
    assert main(["list"]) == 0
    assert "mmlu_philosophy" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize(
    "form", [["MODEL"], ["choices", "MODEL"], ["choices", "--model", "MODEL"]], ids=["model", "choices", "option"]
)
def test_a_model_answers_multiple_choice(folder, model, engine, form, capsys):
    if engine == "torch":
        pytest.importorskip("torch")
    form = [model if word == "MODEL" else word for word in form]
    assert main([*form, "--tasks", "mmlu_philosophy", "--batch_size", "4", "--engine", engine]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" left)")  # progress, of which the last line is all
    written = json.loads((folder / "evaluation" / "results.json").read_text())
    acc = written["overall"]["acc"]
    assert any(line.startswith(f"philosophy       6 questions  acc {acc:.1%} ± ") for line in lines)
    assert lines[-3:] == [os.path.join("evaluation", name) for name in ("results.json", "accuracy.png", "accuracy.pdf")]
    assert all((folder / line).stat().st_size > 100 for line in lines[-3:])
    assert written["config"]["model"] == model
    assert written["config"]["engine"] == engine
    assert len(written["predictions"]) == 6


def test_both_engines_predict_the_same(folder, model):
    pytest.importorskip("torch")
    found = []
    for engine in ("numpy", "torch"):
        arguments = ["--num_fewshot", "3", "--mode", "texts", "--engine", engine, "--out", engine]
        assert main([model, "--tasks", "mmlu", *arguments]) == 0
        found.append(json.loads((folder / engine / "results.json").read_text())["predictions"])
    for ours, theirs in zip(*found, strict=True):
        assert ours["logps"] == pytest.approx(theirs["logps"], rel=1e-5)
        assert ours["prediction_norm"] is not None


def test_examples_that_do_not_fit_are_counted(folder, model, capsys):
    assert main([model, "--tasks", "mmlu_philosophy", "--num_fewshot", "6", "--limit", "2"]) == 0
    shots = [p["shots"] for p in json.loads((folder / "evaluation" / "results.json").read_text())["predictions"]]
    assert len(shots) == 2
    assert max(shots) < 6
    assert "2 prompts were too long for 6 examples, and had fewer" in capsys.readouterr().out


@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_of_a_file(folder, model, stride, capsys):
    (folder / "text.txt").write_text("Some text to predict. " * 30)
    options = ["--stride", str(stride)] if stride else []
    assert main(["perplexity", model, "--data", "text.txt", "--engine", "numpy", *options]) == 0
    expected = perplexity(LLM.load(model, "numpy"), folder / "text.txt", stride)
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines == [
        f"perplexity      {expected.perplexity:,.4f} per token",
        f"cross entropy   {expected.nats_per_token:.6f} nats per token",
        f"bits per byte   {expected.bits_per_byte:.6f}",
        "predicted       660 tokens, 660 bytes",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chioces", "--tasks", "x"], "no command chioces; did you mean choices"),
        (["nothing-like-it", "--tasks", "mmlu"], "nothing-like-it"),
        (["MODEL"], "tasks: expected the name of a task, got none"),
        (["MODEL", "--tasks", "mmlu_filosophy"], "did you mean mmlu_philosophy"),
        (["MODEL", "--tasks", "mmlu", "--data", "none"], "none: expected a folder of tasks"),
        (["MODEL", "--tasks", "mmlu", "--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["MODEL", "--tasks", "mmlu", "--mode", "letter"], "did you mean letters"),
        (["MODEL", "--tasks", "mmlu", "--num_fewshot", "7"], "mmlu_philosophy has 6 examples in dev, got 7"),
        (["perplexity", "MODEL"], "data: expected a text, got none"),
        (["perplexity", "MODEL", "--data", "none.txt"], "neither a file nor"),
        (["perplexity", "MODEL", "--data", "empty.txt"], "empty.txt: expected a text, got an empty file"),
        (["perplexity", "MODEL", "--data", "some.txt", "--stride", "999"], "stride: expected from 1 to"),
        (["none", "--tasks", "mmlu", "--out", "empty.txt"], "out: empty.txt/results.json cannot be written"),  # first
        (["harness", "MODEL"], "tasks: expected the name of a task of lm_eval, got none"),
    ],
)
def test_bad_input_is_one_clear_line(folder, model, arguments, message):
    (folder / "empty.txt").touch()
    (folder / "some.txt").write_text("some text")
    with pytest.raises(UserError, match=message) as caught:
        main([model if word == "MODEL" else word for word in arguments])
    assert "\n" not in str(caught.value)


def test_without_mmlu_its_place_is_named(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWINGRAD_DATA", raising=False)
    with pytest.raises(UserError, match="there is no folder mmlu; MMLU's is in https://"):
        main([model, "--tasks", "mmlu_philosophy"])


def test_every_command_has_help(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in shown
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"usage: twingrad evaluate {name}" in capsys.readouterr().out


def test_help_imports_no_framework():
    code = (
        "import sys\nfrom gpt.evaluate.cli import main\nmain(['--help'])\n"
        "print(*{'torch', 'lm_eval', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "", done.stderr


def test_the_harness_runs_in_a_process(folder, model):
    """As a user does it: a task in a folder, the library's cache elsewhere, no network."""
    pytest.importorskip("lm_eval", reason="not installed: pip install 'twingrad[harness]'")
    data = folder / "questions.jsonl"
    lines = [{"q": f"What is {i}?", "c": ["one", "two"], "a": i % 2} for i in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: c\ndoc_to_target: a\n"
    )
    code = "import sys; from gpt.evaluate.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "harness",
        model,
        "--tasks",
        "tiny",
        "--include_path",
        str(folder),
        "--limit",
        "3",
        "--engine",
        "numpy",
    ]
    offline = {"HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "evaluation" / "harness.json").read_text())
    acc = written["results"]["tiny"]["acc,none"]
    assert acc in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert f"tiny  acc  {acc:.4f} ± " in done.stdout
    assert written["config"]["limit"] == 3
