"""Learning preferences as a user runs it: DPO and ORPO from before the first step to the answers afterwards."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gpt.cli import main
from gpt.data.examples import JsonEntries
from gpt.engine import NonFiniteError, create_engine
from gpt.finetune.config import ExamplesConfig, FinetuneOptimizer, FinetuneTrain, LoRAConfig, PreferConfig
from gpt.finetune.prefer import ANSWERS, Prefer, measure_preferences
from gpt.finetune.run import build
from gpt.llm import LLM
from gpt.parity import check
from gpt.prompts import format_prompt
from gpt.train.checkpoint import load_checkpoint
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.train.trainer import measured
from gpt.weights.load import load
from gpt.weights.native import read_model, save_model

TRAIN = ("finetune", "prefer")
METRICS = ("accuracy", "margin", "log_odds")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture(params=["dpo", "orpo"])
def objective(request):
    return request.param


@pytest.fixture
def config(pairs, base, tmp_path):
    """A short run from a file of weights."""
    return PreferConfig(
        data=str(pairs),
        weights=str(base),
        engine="numpy",
        style="plain",
        validation_fraction=0.25,
        responses=0,
        out=str(tmp_path / "run"),
        loader=ExamplesConfig(batch_size=3),
        optimizer=FinetuneOptimizer(lr=3e-3),
        train=FinetuneTrain(steps=6, eval_every=2),
    )


def begun(config, progress=None):
    """Trainer and task, the model before training measured."""
    trainer, task = build(config, Prefer, progress or Progress())
    task.begin(trainer.engine, trainer.progress)
    return trainer, task


def evaluated(log, name):
    return log[name][~np.isnan(log["val_loss"])]


@pytest.mark.parametrize("rank", [0, 2])
def test_dpo_begins_with_the_logarithm_of_2(config, engine, rank):
    """The loss of any pair, for the model is still its own reference, adapters or not."""
    config.engine, config.dtype, config.lora = engine, "float64", LoRAConfig(rank)
    trainer, task = begun(config)
    for loader in (task.train_loader, task.validation_loader):
        found = measured(trainer.engine, loader, None, task.measure)
        assert found["loss"] == pytest.approx(math.log(2), rel=1e-12)
        assert found["margin"] == pytest.approx(0, abs=1e-12)
    trainer.run()
    assert read_log(config.out)["loss"][0] == pytest.approx(math.log(2), rel=1e-12)


def test_the_polite_answer_is_preferred_afterwards(pairs, base, engine, objective, twingrad, tmp_path):
    out = tmp_path / "run"
    flags = ("--weights", base, "--engine", engine, "--style", "plain", "--objective", objective, "--beta", "0.5")
    rates = ("--lr", "2e-3", "--epochs", "5", "--batch_size", "3", "--eval_every", "4", "--eval_batches", "none")
    answers = ("--validation_fraction", "0.25", "--responses", "3", "--max_new_tokens", "6")
    printed = twingrad(*TRAIN, "--data", pairs, "--out", out, *flags, *rates, *answers)
    log, results = read_log(out), json.loads((out / "results.json").read_text())
    with open(out / "log.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert columns[-6:] == [f"{split}_{name}" for split in ("train", "val") for name in METRICS]
    for name in ("val_margin", "val_log_odds"):
        assert evaluated(log, name)[-1] > evaluated(log, name)[0] + 0.1
    assert evaluated(log, "val_loss")[-1] < evaluated(log, "val_loss")[0]
    assert evaluated(log, "val_accuracy")[-1] > 0.5
    assert results["validation_accuracy"] > 0.5
    assert results["validation_log_odds"] > 0
    assert results["dropped"] == results["identical"] == []
    for name in ("loss", *METRICS):
        assert {(out / f"{name}.{ending}").stat().st_size > 1000 for ending in ("png", "pdf")} == {True}
    assert (out / f"small-{objective}.safetensors").exists()
    assert LLM.load(out, engine).style == "plain"

    answered = json.loads((out / ANSWERS).read_text())
    assert [list(answer) for answer in answered] == [["entry", "prompt", "chosen", "rejected", "before", "after"]] * 3
    entries = JsonEntries(pairs)
    before = LLM.load(base, engine)
    after = LLM.load(out, engine)
    for answer in answered:
        entry = entries[answer["entry"] - 1]
        assert answer["prompt"] == format_prompt(entry, "plain")
        assert [answer["chosen"], answer["rejected"]] == [entry["chosen"], entry["rejected"]]
        assert answer["before"] == before.generate(answer["prompt"], 6).strip()
        assert answer["after"] == after.generate(answer["prompt"], 6).strip()
    assert any(answer["before"] != answer["after"] for answer in answered)
    assert f"Answers before and after: {out / ANSWERS}" in printed
    assert "validation accuracy: " in printed


def test_epochs_leave_checkpoints_that_stand_alone(config, pairs, objective, twingrad):
    flags = ("--weights", config.weights, "--engine", "numpy", "--style", "plain", "--objective", objective)
    twingrad(*TRAIN, "--data", pairs, "--out", config.out, *flags, "--epochs", "1", "--responses", "0")
    found = load_checkpoint(config.out)
    assert found.state["step"] == 23 // 8
    assert found.state["examples"] == 16
    assert found.model.config == read_model(config.weights).config
    assert found.model.task == {"kind": "preferences", "style": "plain"}
    assert load(config.out).task == found.model.task
    assert read_log(config.out)["examples"].tolist() == [8, 16]


@pytest.mark.parametrize("rank", [0, 2])
def test_both_engines_learn_alike_step_by_step(config, objective, tmp_path, rank):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    config.dtype, config.objective, config.lora = "float64", objective, LoRAConfig(rank, lora_dropout=0.1)
    config.train, config.model = FinetuneTrain(steps=12, eval_every=3), {"drop_rate": 0.1}
    logs = []
    for config.engine in ("numpy", "torch"):
        config.out = str(tmp_path / config.engine)
        begun(config)[0].run()
        logs.append(read_log(config.out))
    for name in ("loss", "norm", "val_loss", *(f"val_{name}" for name in METRICS)):
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_what_was_stopped_goes_on_with_the_same_reference(config, engine, tmp_path, interrupted_after, assert_same_run):
    config.engine, config.train, config.model = engine, FinetuneTrain(epochs=3, eval_every=2), {"drop_rate": 0.1}
    config.out = str(tmp_path / "whole")
    begun(config)[0].run()
    config.out = str(tmp_path / "parts")
    assert begun(config, interrupted_after(7))[0].run().interrupted
    trainer, task = begun(config)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    batch = next(task.validation_loader.epoch())
    beginning = create_engine(engine, trainer.engine.config, read_model(config.weights).params)
    theirs = beginning.token_logps(batch).logps.sum(axis=1)
    np.testing.assert_allclose(batch.reference, theirs, rtol=1e-5)
    assert np.abs(trainer.engine.token_logps(batch).logps.sum(axis=1) - theirs).max() > 0.1


def test_a_parameter_that_is_no_number_stops_the_run_and_the_last_good_checkpoint_is_named(
    config, engine, objective, tmp_path, assert_same_run
):
    class Spoil(Progress):
        """Makes one of the parameters nan after a step."""

        def step(self, row):
            if row.step == 4:
                params = {name: array.copy() for name, array in trainer.engine.parameters().items()}
                params["blocks.1.mlp.up.weight"][3, 5] = np.nan
                trainer.engine.load_parameters(params)

    config.engine, config.objective = engine, objective
    config.train = FinetuneTrain(steps=8, save_every=4, eval_every=0)
    config.out = str(tmp_path / "whole")
    begun(config)[0].run()
    config.out = str(tmp_path / "parts")
    trainer, _ = begun(config, Spoil())
    last = tmp_path / "parts" / "last-00000004"
    with pytest.raises(NonFiniteError) as stopped:
        trainer.run()
    message = r"step 5: .*blocks\.1\.mlp\.up\.weight.*; last good checkpoint: "
    assert re.fullmatch(message + re.escape(str(last)), str(stopped.value))
    assert all(np.isfinite(array).all() for array in map(np.asarray, load_checkpoint(last).model.params.values()))
    trainer, _ = begun(config)
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_weights_that_are_no_numbers_are_said_to_be_so(config, base, pairs, capsys, tmp_path):
    saved = read_model(base)
    params = {name: np.array(array) for name, array in saved.params.items()}
    params["final_norm.weight"][0] = np.nan
    save_model(tmp_path / "spoilt.safetensors", params, saved.config, saved.tokenizer)
    flags = ("--data", pairs, "--weights", tmp_path / "spoilt.safetensors", "--style", "plain", "--engine", "numpy")
    assert main([str(argument) for argument in (*TRAIN, *flags, "--responses", "0", "--out", tmp_path / "run")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: .*spoilt\.safetensors: final_norm\.weight holds NaN", warning)
    assert re.fullmatch(r"error: step 0: .*final_norm\.weight.*; there is no checkpoint yet", error)


def test_what_is_left_out_is_really_left_out_and_counted(config, pairs, twingrad, tmp_path):
    entries = [dict(entry) for entry in JsonEntries(pairs)]
    for i in (0, 8, 16):
        entries[i]["rejected"] = entries[i]["chosen"]  # of source a
    for i in (2, 4):
        entries[i]["instruction"] = "Do this: " + entries[i]["instruction"]  # likewise
    pairs.write_text(json.dumps(entries))
    same = "the chosen and the rejected answer are the same"
    long = "the prompt has 20 tokens, expected fewer than 20"

    def left_out(**changes):
        """How many pairs there are to train and to validate, which are left out and why, and those of equal answers."""
        _, task = build(replace(config, **changes), Prefer, Progress())
        return [len(part) for part in task.sets], dict(task.dropped), sorted(task.identical)

    assert left_out() == ([18, 6], {}, [1, 9, 17])
    assert left_out(drop_sources=("a",)) == ([9, 3], {}, [])
    sizes, *others = left_out(drop_identical=True)
    assert (sum(sizes), *others) == (21, dict.fromkeys([1, 9, 17], same), [1, 9, 17])
    sizes, *others = left_out(max_prompt_tokens=20)
    assert (sum(sizes), *others) == (22, dict.fromkeys([3, 5], long), [1, 9, 17])

    flags = ("--data", pairs, "--weights", config.weights, "--style", "plain", "--engine", "numpy", "--steps", "1")
    flags += ("--validation_fraction", "0.25", "--batch_size", "1", "--responses", "0", "--out", config.out)
    said = twingrad(*TRAIN, *flags, "--max_prompt_tokens", "20", "--drop_identical", "--drop_sources", "b")
    (trained,) = re.findall(r"24 pairs, (\d) to train on, 5 left out, 3 with equal answers; ", said)
    assert 4 <= int(trained) <= 7
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    dropped = {entry["entry"]: entry["reason"] for entry in results["dropped"]}
    assert dropped == dict.fromkeys([1, 9, 17], same) | dict.fromkeys([3, 5], long)
    assert sorted(results["identical"]) == [1, 9, 17]


def test_what_is_left_out_is_not_trained_on(config, pairs):
    config.drop_sources, config.validation_fraction = ("a",), 0.25
    _, task = build(config, Prefer, Progress())
    assert [len(part) for part in task.sets] == [9, 3]
    assert len(task.train_loader) == 3
    prompts = {bytes(pair.chosen[: pair.chosen_prompt].tolist()).decode() for part in task.sets for pair in part}
    assert prompts == {f"Add 1 to {i}." for i in range(1, 24, 2)}
    assert task.data == f"{pairs}: 24 pairs, 9 to train on"


def test_the_split_is_drawn_with_its_own_seed(config):
    def held_out():
        return [entry["instruction"] for entry in build(config, Prefer, Progress())[1].held_out]

    drawn = held_out()
    config.train.seed = 7
    assert held_out() == drawn
    config.split_seed = 43
    assert held_out() != drawn


def test_conversations_are_learnt_in_a_template(pairs, base, engine, twingrad, tmp_path):
    def said(i, answer):
        return [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": answer}]

    entries = [{"source": "x", "chosen": said(i, "Hey!"), "rejected": said(i, "Go.")} for i in range(12)]
    pairs.write_text("\n".join(map(json.dumps, entries)))
    flags = ("--data", pairs, "--engine", engine, "--style", "chatml", "--objective", "orpo", "--lr", "5e-3")
    model = ("--preset", "bytes-tiny", "--model.context_length", "100", "--validation_fraction", "0.2")
    answers = ("--responses", "2", "--max_new_tokens", "8", "--epochs", "15", "--batch_size", "3")
    twingrad(*TRAIN, *flags, *model, *answers, "--out", tmp_path / "run")
    answered = json.loads((tmp_path / "run" / ANSWERS).read_text())
    assert len(answered) == 2
    for answer in answered:
        assert answer["prompt"].startswith("<|im_start|>user\nHi ")
        assert answer["prompt"].endswith("<|im_start|>assistant\n")
        assert answer["chosen"] == "Hey!<|im_end|>"
        assert "<|" not in answer["after"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["validation_accuracy"] == 1


def test_the_measured_loss_is_the_engines(config, engine, objective):
    config.engine, config.objective, config.dtype = engine, objective, "float64"
    trainer, task = begun(config)
    trainer.run()
    batch = next(task.validation_loader.epoch())
    found = measure_preferences(trainer.engine, batch)
    assert found["loss"] == pytest.approx(trainer.engine.loss(batch), rel=1e-10)
    sums = trainer.engine.token_logps(batch).logps.sum(axis=1)
    chosen, rejected = (sums / batch.lengths).reshape(2, -1)
    odds = np.exp(chosen) / (1 - np.exp(chosen)) / (np.exp(rejected) / (1 - np.exp(rejected)))
    assert found["log_odds"] == pytest.approx(np.log(odds).mean(), rel=1e-9)


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (None, (), r"data: .*pairs\.json: no such file"),
        ({"instruction": ""}, (), r"pairs\.json: entry 4: the instruction is empty"),
        ({"chosen": 3}, (), r"pairs\.json: entry 4: expected a text as chosen, got int"),
        ({"chosen": []}, (), r"pairs\.json: entry 4: expected the messages of chosen to be a prompt and, last"),
        ({}, ("--style", "alpacca"), r"style: 'alpacca' is not one of .*did you mean alpaca"),
        ({}, ("--style", "alpaca"), r"none of 22 entries can be learnt from; entry \d+: the prompt has \d+ tokens"),
        ({}, ("--objective", "ppo"), r"objective: expected dpo\|orpo, got 'ppo'"),
        ({}, ("--beta", "0"), r"beta: expected a positive number, got 0\.0"),
        ({}, ("--drop_sources", "c"), r"source: 'c' is not one of a, b"),
        ({}, ("--max_prompt_tokens", "0"), r"max_prompt_tokens must be at least 1, got 0"),
        ({}, ("--max_prompt_tokens", "2"), r"none of 22 entries can be learnt from"),
        ({}, ("--validation_fraction", "1"), r"split: expected a fraction between 0 and 1"),
        ({}, ("--responses", "-1"), r"responses: expected at least 0, got -1"),
        ({}, ("--max_new_tokens", "0"), r"max_new_tokens: expected at least 1, got 0"),
        ({}, ("--preset", "bytes-tinny"), r"preset: 'bytes-tinny' is not one of .*did you mean bytes-tiny"),
    ],
)
def test_what_is_wrong_gets_one_line_before_anything_is_written(
    pairs, small, refused, tmp_path, change, flags, message
):
    """In the fourth entry."""
    entries = [dict(entry) for entry in JsonEntries(pairs)]
    pairs.unlink()
    if change is not None:
        entries[3].update(change)
        pairs.write_text(json.dumps(entries))
    flags = ("--data", pairs, "--style", "plain", "--out", tmp_path / "run", *small, "numpy", *flags)
    line = refused(*TRAIN, *flags)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()
