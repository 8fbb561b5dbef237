"""What all tasks have in common: files and tokenizers that are named, a run's folder, and no need of PyTorch."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt import memory as host
from gpt import parts, tokenizers
from gpt.cli import main
from gpt.errors import UserError
from gpt.finetune import run
from gpt.finetune.classify import Classify
from gpt.finetune.config import ClassifyConfig, ExamplesConfig, InstructConfig, LoRAConfig, PreferConfig
from gpt.finetune.instruct import Instruct
from gpt.finetune.prefer import Prefer
from gpt.finetune.run import build, data_file, end_token, write_json
from gpt.options import from_dict, read_yaml
from gpt.parity import check
from gpt.plan import Setup, memory
from gpt.prompts import format_prompt
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.weights.load import load
from gpt.weights.native import read_model, save_model

ROOT = Path(__file__).parents[3]
TASKS = {"classify": ClassifyConfig, "instruct": InstructConfig, "prefer": PreferConfig}
QUICK = ("--engine", "numpy", "--batch_size", "3", "--eval_every", "2")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture
def flags(task, labelled, instructions, pairs, base):
    """Of a short run of each task, but for its folder and its length."""
    data = {"classify": labelled, "instruct": instructions, "prefer": pairs}[task]
    plain = () if task == "classify" else ("--style", "plain", "--responses", "2", "--max_new_tokens", "3")
    return ("finetune", task, "--data", data, "--weights", base, *QUICK, *plain)


def test_a_batch_that_memory_has_no_room_for_is_refused(task, flags, twingrad, refused, tmp_path, monkeypatch):
    """Of the longest example, or what max_length makes of it; of pairs, two rows each."""
    words = list(map(str, flags))
    config, data = (words[words.index(name) + 1] for name in ("--weights", "--data"))
    words[words.index("--batch_size") + 1] = "16"
    setup = Setup(read_model(Path(config)).config, 16, 60, "numpy", cores=parts.threads())
    if task == "classify":
        words += ["--max_length", "60"]
        last = f"blocks.{setup.config.n_layers - 1}.*"
        head = setup.config.replace(tie_embeddings=False, n_outputs=2, head_bias=True)
        setup = replace(setup, config=head, trained=(last, "final_norm.*", "head.*"))
    else:
        answers = {"instruct": ("output",), "prefer": ("chosen", "rejected")}[task]
        both = [
            (format_prompt(entry, "plain"), entry[key])
            for entry in json.loads(Path(data).read_text())
            for key in answers
        ]
        setup = replace(setup, length=max(len(prompt + answer) for prompt, answer in both))
    if task == "prefer":
        setup = replace(setup, objective="dpo", counted=max(len(answer) for _, answer in both) + 1)  # and the end
    needed = memory(setup).peak
    words += ["--steps", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(host, "free_bytes", lambda: needed - 1)
    of = f"batch_size 16{' pairs' if task == 'prefer' else ''} of {setup.length} tokens"
    assert re.match(f"memory: {of} needs .* is free; batch_size \\d+ fits, with accumulation 2 ", refused(*words))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(host, "free_bytes", lambda: needed)
    twingrad(*words)


@pytest.mark.parametrize("cut", [None, 20])
def test_what_is_asked_of_memory_is_of_the_longest_example(cut, instructions, pairs, base, monkeypatch):
    """Tokens as the batches have them, and of pairs those of the longest answer."""
    seen = []
    monkeypatch.setattr(run, "check_memory", lambda config, model, *rest: seen.append(rest))
    common = {"weights": str(base), "engine": "numpy", "style": "plain", "loader": ExamplesConfig(2, cut)}
    for config, task in (
        (InstructConfig(data=str(instructions), keep_tokens=False, **common), Instruct),
        (PreferConfig(data=str(pairs), **common), Prefer),
    ):
        trainer, _ = build(config, task, Progress())
        batches = list(trainer.train_loader)
        length, _, objective, counted = seen.pop()
        assert length == max(batch.inputs.shape[1] for batch in batches)
        assert (objective, counted) == (
            ("cross_entropy", None) if task is Instruct else ("dpo", max(batch.lengths.max() for batch in batches))
        )


def test_a_run_is_made_again_by_its_configuration(task, flags, twingrad, tmp_path, assert_same_run):
    twingrad(*flags, "--steps", "4", "--rank", "2", "--seed", "7", "--out", tmp_path / "one")
    config = tmp_path / "one" / "config.yaml"
    twingrad("finetune", task, "--config", config, "--out", tmp_path / "other")
    assert_same_run(tmp_path / "one", tmp_path / "other")
    kept = from_dict(TASKS[task], read_yaml(config))
    assert kept.lora == LoRAConfig(rank=2)
    assert (kept.train.seed, kept.train.steps, kept.train.epochs) == (7, 4, None)


def test_a_finished_run_may_go_on_and_ends_as_if_it_had_never_ended(task, flags, twingrad, tmp_path, assert_same_run):
    twingrad(*flags, "--steps", "6", "--out", tmp_path / "whole")
    twingrad(*flags, "--steps", "3", "--out", tmp_path / "parts")
    one, other = (tmp_path / name for name in ("whole", "parts"))
    written = {path.name for path in one.iterdir() if path.suffix in (".json", ".csv") and path.name != "log.csv"}
    assert len(written) == {"classify": 4, "instruct": 2, "prefer": 2}[task]
    for name in written:  # what is found there is of before, and no reason to leave anything out
        path = other / name
        path.write_text(re.sub('("model_response"|"after"): ".*"', r'\1: "old"', path.read_text()))
    twingrad(*flags, "--steps", "6", "--out", tmp_path / "parts", "--resume")
    assert {name: (one / name).read_text() for name in written} == {
        name: (other / name).read_text() for name in written
    }
    assert read_log(other)["step"].tolist() == list(range(6))
    np.testing.assert_array_equal(read_log(one)["loss"], read_log(other)["loss"])
    for name, array in load(one).params.items():
        np.testing.assert_array_equal(array, load(other).params[name], err_msg=name)


def test_a_model_that_was_finished_is_not_loaded_for_what_is_learnt_since(
    task, flags, twingrad, tmp_path, interrupted_after
):
    twingrad(*flags, "--steps", "3", "--out", tmp_path / "run")
    (finished,) = (tmp_path / "run").glob("*.safetensors")
    config = from_dict(TASKS[task], read_yaml(tmp_path / "run" / "config.yaml"))
    config = replace(config, resume=True, train=replace(config.train, steps=6))
    make_task = {"classify": Classify, "instruct": Instruct, "prefer": Prefer}[task]
    assert run.finetune(config, make_task, "twingrad", interrupted_after(4)).interrupted
    assert not finished.exists()
    run.finetune(config, make_task, "twingrad", Progress())
    assert finished.exists()


def test_data_that_changed_are_not_gone_on_with(flags, refused, twingrad, tmp_path):
    words = list(map(str, flags))
    place = words.index("--data") + 1
    data = tmp_path / Path(words[place]).name
    data.write_bytes(Path(words[place]).read_bytes())
    words[place] = str(data)
    twingrad(*words, "--steps", "2", "--out", tmp_path / "run")
    changed = data.read_bytes()
    at = changed.rindex(b"e")
    data.write_bytes(changed[:at] + b"a" + changed[at + 1 :])
    line = refused(*words, "--steps", "3", "--out", tmp_path / "run", "--resume")
    assert list((tmp_path / "run").glob("*.safetensors"))  # the finished model, which nothing was learnt beyond
    found = re.search(
        r"the data has changed .* it was (.*) with checksum (\w+), and is (.*) with checksum (\w+)$", line
    )
    assert found, line
    assert found[1] == found[3] == f"{len(changed):,} bytes"
    assert found[2] != found[4]


def test_no_task_needs_torch(flags, tmp_path):
    arguments = [*map(str, flags), "--steps", "2", "--out", str(tmp_path / "run")]
    arguments[arguments.index("numpy")] = "auto"
    code = f"""
import sys
sys.modules["torch"] = None
from gpt.cli import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "; numpy engine, " in done.stdout
    assert (tmp_path / "run" / "results.json").exists()


def test_every_option_of_a_task_has_a_help(task, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", task, "--help"])
    printed = capsys.readouterr().out
    for option in ("--data", "--rank", "--objective" if task == "prefer" else "--train_fraction", "--lora_dropout"):
        assert re.search(rf"^ +{option} \S.*", printed, re.MULTILINE), option


def test_the_tasks_are_listed_and_another_is_none(capsys, refused):
    assert main(["finetune", "--help"]) == 0
    assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(TASKS)
    assert "twingrad finetune has no command instuct; did you mean instruct?" in refused("finetune", "instuct")


def test_a_run_of_one_task_is_not_gone_on_with_as_another(task, flags, twingrad, refused, tmp_path):
    twingrad(*flags, "--steps", "1", "--out", tmp_path / "run")
    for other in TASKS.keys() - {task}:
        line = refused("finetune", other, "--out", tmp_path / "run", "--resume")
        assert re.search(r"config\.yaml: another kind of run, or damaged: \w+: no such option", line)
    line = refused("train", "--out", tmp_path / "run", "--resume")
    assert "another kind of run" in line


def test_weights_without_a_tokenizer_need_one_that_is_named(flags, base, refused, twingrad, tmp_path):
    saved = read_model(base)
    save_model(tmp_path / "bare.safetensors", saved.params, saved.config)
    flags = [tmp_path / "bare.safetensors" if flag == base else flag for flag in flags]
    line = refused(*flags, "--steps", "1", "--out", tmp_path / "run")
    assert line == f"{tmp_path / 'bare.safetensors'}: holds no tokenizer; name it by --tokenizer"
    assert not (tmp_path / "run").exists()
    twingrad(*flags, "--steps", "1", "--tokenizer", "bytes", "--out", tmp_path / "run")
    assert load(tmp_path / "run").tokenizer == {"name": "bytes"}


def test_a_file_comes_before_a_name_and_what_is_neither_is_named(tmp_path, monkeypatch, data_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sms-spam").write_text("ham\ta\n")
    assert data_file("sms-spam") == Path("sms-spam")
    assert data_file("instruction-data") == data_folder / "instruction-data.json"
    with pytest.raises(UserError, match=r"^data: some\.json: no such file$"):
        data_file("some.json")
    with pytest.raises(UserError, match="^'instruct-data' is not a data set .* did you mean 'instruction-data'"):
        data_file("instruct-data")


def test_a_tokenizer_without_an_end_is_refused():
    assert end_token(tokenizers.load("bytes")) == 256
    with pytest.raises(UserError, match="^tokenizer: simple-v1 has no end token"):
        end_token(tokenizers.load("simple-v1", "a b c"))


def test_json_of_numbers_that_are_none_can_be_read_by_everyone(tmp_path):
    write_json(tmp_path / "some.json", {"a": [math.nan, 1.5, (math.inf,)], "b": "é\ud800", "c": None})
    text = (tmp_path / "some.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=None) == {"a": [None, 1.5, [None]], "b": "é?", "c": None}
    assert "é" in text
    assert text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "some.json", {"a": object()})
    assert (tmp_path / "some.json").read_text(encoding="utf-8") == text
    assert len(list(tmp_path.iterdir())) == 1
