"""Finetuning on instructions as a user runs it: what is learnt, masked, left out, answered and saved."""

import json
import math
import re

import numpy as np
import pytest

from gpt.data.examples import JsonEntries
from gpt.engine import IGNORE, Batch, create_engine
from gpt.finetune import instructions as data
from gpt.finetune.config import ExamplesConfig, FinetuneOptimizer, FinetuneTrain, InstructConfig, LoRAConfig
from gpt.finetune.instruct import RESPONSES, Instruct, plain_name
from gpt.finetune.respond import respond
from gpt.finetune.run import build
from gpt.llm import LLM
from gpt.parity import check
from gpt.prompts import format_prompt
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.weights.load import load
from gpt.weights.native import read_model, save_model
from reference import PRESETS

TRAIN = ("finetune", "instruct")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture
def config(instructions, base, tmp_path):
    """A short run from a file of weights."""
    return InstructConfig(
        data=str(instructions),
        weights=str(base),
        engine="numpy",
        style="plain",
        test_fraction=None,
        out=str(tmp_path / "run"),
        loader=ExamplesConfig(batch_size=4),
        optimizer=FinetuneOptimizer(lr=3e-3),
        train=FinetuneTrain(steps=6, eval_every=2),
    )


def learnt(config):
    """The run's log and parameters."""
    trainer, task = build(config, Instruct, Progress())
    trainer.run()
    return read_log(config.out), trainer.engine.parameters(), task


def test_words_are_repeated_when_it_is_asked_for(engine, instructions, small, twingrad, tmp_path):
    out = tmp_path / "run"
    flags = ("--style", "plain", "--test_fraction", "0.1", "--max_new_tokens", "8", "--mask_instruction")
    rates = ("--lr", "1e-2", "--epochs", "20", "--schedule", "cosine", "--model.context_length", "32")
    printed = twingrad(*TRAIN, "--data", instructions, "--out", out, *small, engine, *flags, *rates)
    log, results = read_log(out), json.loads((out / "results.json").read_text())
    losses = log["val_loss"][~np.isnan(log["val_loss"])]
    assert losses[-1] < 0.5 * losses[0]
    assert results["validation_loss"] < 0.5 * losses[0]
    assert results["dropped"] == results["unanswered"] == []
    entries = JsonEntries(instructions)
    answered = json.loads((out / RESPONSES).read_text())
    assert [{k: v for k, v in entry.items() if k != "model_response"} for entry in answered] == list(entries[35:39])
    assert all(isinstance(entry["model_response"], str) for entry in answered)
    assert f"All answers: {out / RESPONSES}" in printed
    assert (out / "bytes-tiny-sft.safetensors").exists()
    assert (out / "loss.png").stat().st_size > 1000

    llm = LLM.load(out, engine)
    assert llm.style == "plain"
    again = llm.generate([dict(entry) for entry in entries[35:39]], 8)
    assert [text.strip() for text in again] == [entry["model_response"] for entry in answered]


def test_what_is_answered_does_not_repeat_the_prompt(engine, base, instructions, twingrad, tmp_path):
    """Before any training, in the style that a model without a task has."""
    out = tmp_path / "answers.json"
    entries = [{"instruction": "Go.", "output": "Gone."}]
    instructions.write_text(json.dumps(entries))
    llm = LLM.load(base, engine)
    llm.style = "plain"
    (answered,) = respond(llm, entries, out, max_new_tokens=5)
    whole = llm.tokenizer.encode("Go.")
    tokens = []
    for _ in range(5):
        logits = llm.engine.logits(np.array([[*whole, *tokens]]))[0]
        tokens.append(int(logits[: llm.tokenizer.n_vocab].argmax()))
        if tokens[-1] == llm.tokenizer.eot:
            tokens.pop()
            break
    assert answered == {**entries[0], "model_response": llm.tokenizer.decode(tokens).strip()}
    assert json.loads(out.read_text()) == [answered]


def test_answers_of_one_model_are_not_passed_off_as_another_s(base, instructions, twingrad, refused, tmp_path):
    out, trained = tmp_path / "answers.json", tmp_path / "trained.safetensors"
    model = read_model(base)
    changed = {name: np.asarray(array) * 1.5 for name, array in model.params.items()}
    save_model(trained, changed, model.config, model.tokenizer)
    flags = ["--data", instructions, "--model", base, "--style", "plain", "--engine", "numpy", "--out", out]
    twingrad("respond", *flags, "--max_new_tokens", "3", "--limit", "2")
    twingrad("respond", *flags, "--max_new_tokens", "3", "--limit", "3")  # goes on
    answers = out.read_text()
    for other in (("--model", trained), ("--style", "phi3"), ("--max_new_tokens", "4")):
        line = refused("respond", *flags, "--max_new_tokens", "3", *other)
        assert re.fullmatch(r".*answers\.json: holds answers of \w+ \w+, not \w+; remove it, or choose .*--out", line)
    assert out.read_text() == answers
    out.with_name("answers.json.settings").unlink()  # as an earlier version left it
    assert "holds answers of weights unknown, not" in refused("respond", *flags, "--max_new_tokens", "3")


def test_where_answers_cannot_be_written_is_said_before_the_model_is_loaded(instructions, refused, tmp_path):
    for out, message in ((tmp_path, "expected the name of a file"), (instructions / "a.json", "cannot be written")):
        assert message in refused("respond", "--data", instructions, "--model", tmp_path / "none", "--out", out)


@pytest.mark.parametrize(
    "weights, name",
    [
        ("gpt2-medium", "gpt2-medium355M-sft"),
        ("gpt2-small", "gpt2-small124M-sft"),
        ("gpt2-medium (355M)", "gpt2-medium355M-sft"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B-sft"),
        ("bytes-tiny", "bytes-tiny-sft"),
        ("runs/stories", "stories-sft"),
        ("runs/stories/", "stories-sft"),
        ("runs/a model.safetensors", "amodel-sft"),
        ("stories15M.pt", "stories15M-sft"),
        ("runs/.hidden", "hidden-sft"),
    ],
)
def test_the_finished_model_is_called_after_what_it_began_with(weights, name):
    assert Instruct.file_name(None, weights) == name
    assert name == f"{plain_name(weights)}-sft"


def test_the_folder_s_name_stands_for_the_folder_that_is_here(tmp_path, monkeypatch):
    (tmp_path / "stories").mkdir()
    monkeypatch.chdir(tmp_path / "stories")
    assert plain_name(".") == "stories"


def test_the_answers_alone_are_learnt_with_the_mask(config, engine):
    config.engine = engine
    batches = []
    for config.mask_instruction in (False, True):
        trainer, task = build(config, Instruct, Progress())
        batches.append(next(task.validation_loader.epoch()))
        assert math.isfinite(trainer.engine.loss(batches[-1]))
    whole, masked = batches
    np.testing.assert_array_equal(whole.inputs, masked.inputs)
    for x, y, entry in zip(masked.inputs, masked.targets, task.held_out[:4], strict=True):
        answer = entry["output"].encode()
        counted = y[y != IGNORE].tolist()
        assert counted == [*answer, 256]
        start = int(np.flatnonzero(y != IGNORE)[0])
        assert bytes(x[: start + 1].tolist()) == format_prompt(entry, "plain").encode()
    assert whole.counted > masked.counted


def test_a_batch_in_which_nothing_counts_has_no_loss_and_teaches_nothing(config, engine):
    config.engine = engine
    trainer, task = build(config, Instruct, Progress())
    batch = next(task.validation_loader.epoch())
    nothing = Batch(batch.inputs, np.full_like(batch.targets, IGNORE))
    assert nothing.counted == 0
    assert trainer.engine.loss(nothing) == 0
    assert trainer.engine.accumulate(nothing) == 0
    assert trainer.engine.gradient_norm() == 0
    row = data.collate([(list(b"a prompt"), 8)], 256, allowed_max_length=3, mask_instruction=True)
    assert trainer.engine.loss(row) == 0


def test_a_row_in_which_nothing_counts_takes_nothing_from_the_others(config, engine):
    config.engine, config.dtype = engine, "float64"
    trainer, task = build(config, Instruct, Progress())
    batch = next(task.validation_loader.epoch())
    alone = trainer.engine.loss(Batch(batch.inputs[:1], batch.targets[:1]))
    targets = batch.targets.copy()
    targets[1:] = IGNORE
    assert trainer.engine.loss(Batch(batch.inputs, targets)) == pytest.approx(alone, rel=1e-12)


def test_without_kept_tokens_the_run_is_the_same(config, tmp_path):
    runs = []
    for config.keep_tokens in (True, False):
        config.out = str(tmp_path / str(config.keep_tokens))
        runs.append(learnt(config))
    (log, params, _), (other_log, other_params, _) = runs
    np.testing.assert_array_equal(log["loss"], other_log["loss"])
    for name in params:
        np.testing.assert_array_equal(params[name], other_params[name], err_msg=name)


def test_both_engines_learn_alike_step_by_step(config, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    config.dtype, config.model, config.train = "float64", {"drop_rate": 0.1}, FinetuneTrain(steps=12, eval_every=3)
    config.mask_instruction = True
    logs = []
    for config.engine in ("numpy", "torch"):
        config.out = str(tmp_path / config.engine)
        logs.append(learnt(config)[0])
    for name in ("loss", "norm", "train_loss", "val_loss"):
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-10, err_msg=name)


def test_phi_3_s_prompts_are_shorter_and_each_style_is_kept_with_the_model(config, twingrad):
    lengths = {}
    config.weights, config.preset, config.model = None, "bytes-tiny", {"context_length": 256}
    for config.style in ("alpaca", "phi3"):
        _, task = build(config, Instruct, Progress())
        lengths[config.style] = [len(row.ids) for row in task.train_loader.examples]
        assert task.spec["style"] == config.style
    assert all(phi3 < alpaca for phi3, alpaca in zip(lengths["phi3"], lengths["alpaca"], strict=True))
    flags = ("--style", "phi3", "--engine", "numpy", "--steps", "1", "--responses", "1", "--max_new_tokens", "3")
    twingrad(*TRAIN, "--data", config.data, "--preset", "bytes-tiny", "--out", config.out, *flags)
    assert LLM.load(config.out, "numpy").style == "phi3"
    assert len(json.loads((JsonEntries(config.data).path.parent / "run" / RESPONSES).read_text())) == 1


def test_prompts_that_leave_no_room_are_left_out_and_counted(config, instructions, twingrad, tmp_path):
    """Of 10 entries the parts are 8, 1 and 1 (test, then validation); a long prompt is in the first two."""
    entries = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(20)]
    for i in (3, 17):
        entries[i]["instruction"] = "x" * 100
    instructions.write_text(json.dumps(entries))
    flags = ("--weights", config.weights, "--style", "plain", "--engine", "numpy", "--steps", "2", "--batch_size", "2")
    flags += ("--max_new_tokens", "2")
    printed = twingrad(*TRAIN, "--data", instructions, "--out", config.out, *flags)
    assert "20 entries, 16 to train on, 1 left out, whose prompts are too long" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    left_out = "the prompt has 100 tokens, which leaves none of 64 to answer in"
    assert results["dropped"] == [{"entry": 4, "reason": left_out}]
    unanswered = {"entry": 18, "reason": "the prompt has 100 tokens, the model's context 64"}
    assert results["unanswered"] == [unanswered]
    answered = json.loads((tmp_path / "run" / RESPONSES).read_text())
    assert [entry["instruction"] for entry in answered] == ["Say 18."]


def test_without_a_test_fraction_the_rest_is_for_testing_and_for_the_validation_loss(config, engine):
    config.engine = engine
    _, task = build(config, Instruct, Progress())
    entries = JsonEntries(config.data)
    n = len(entries)
    assert len(task.train_loader.examples) == int(0.85 * n)
    assert list(task.answerable) == list(entries[int(0.85 * n) :]) == list(task.held_out)
    config.test_fraction, config.responses = 0.1, 2
    _, task = build(config, Instruct, Progress())
    assert list(task.answerable) == list(entries[35:37])
    assert list(task.held_out) == list(entries[39:])


def test_adapters_are_merged_into_the_finished_model_and_kept_beside_it(
    engine, config, instructions, twingrad, tmp_path
):
    out = tmp_path / "run"
    flags = ("--weights", config.weights, "--style", "plain", "--engine", engine, "--rank", "2", "--alpha", "4")
    rates = ("--lr", "2e-2", "--epochs", "4", "--batch_size", "4", "--eval_every", "10", "--max_new_tokens", "4")
    printed = twingrad(*TRAIN, "--data", instructions, "--out", out, *flags, *rates)
    total, trained = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) parameters, ([\d,]+) of", printed).groups())
    base, merged, unmerged = read_model(config.weights), load(out), load(next(out.glob("last-*")))
    assert trained < total / 4
    for name, array in base.params.items():
        np.testing.assert_array_equal(unmerged.params[name], array, err_msg=name)
    assert merged.config.lora is None
    assert (out / "small-sft.safetensors").exists()
    tokens = np.frombuffer(b"Say ant.", np.uint8)[None].astype(np.int64)
    logits = [create_engine(engine, model.config, model.params).logits(tokens) for model in (merged, unmerged)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    beside = LLM.load(config.weights, engine, adapter=out / "adapter.safetensors")
    np.testing.assert_allclose(beside.engine.logits(tokens), logits[1], atol=1e-6)
    assert np.abs(logits[1] - create_engine(engine, base.config, base.params).logits(tokens)).max() > 0.1
    log = read_log(out)
    losses = log["val_loss"][~np.isnan(log["val_loss"])]
    assert losses[-1] < losses[0]


def test_the_batch_size_and_the_length_are_knobs(config):
    _, task = build(config, Instruct, Progress())
    assert {len(batch.inputs) for batch in task.train_loader.epoch()} == {4}
    config.loader = ExamplesConfig(batch_size=3, max_length=12)
    _, task = build(config, Instruct, Progress())
    shapes = [batch.inputs.shape for batch in task.train_loader.epoch()]
    assert {rows for rows, _ in shapes} == {3}
    assert max(width for _, width in shapes) == 12


def test_what_was_stopped_goes_on_bit_for_bit(config, engine, tmp_path, interrupted_after, assert_same_run):
    config.engine, config.lora, config.model = engine, LoRAConfig(2, lora_dropout=0.1), {"drop_rate": 0.1}
    config.train = FinetuneTrain(epochs=2, eval_every=3)
    config.out = str(tmp_path / "whole")
    build(config, Instruct, Progress())[0].run()
    config.out = str(tmp_path / "parts")
    assert build(config, Instruct, interrupted_after(7))[0].run().interrupted
    trainer, _ = build(config, Instruct, Progress())
    trainer.resume()
    trainer.run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_model_finetuned_is_finetuned_again(config, twingrad, tmp_path):
    """In two runs, the second on what the first one left, adapters and all."""
    flags = (*TRAIN, "--data", config.data, "--engine", "numpy", "--style", "plain", "--steps", "2", "--responses", "0")
    twingrad(*flags, "--weights", config.weights, "--rank", "2", "--out", tmp_path / "one")
    checkpoint = next((tmp_path / "one").glob("last-*"))
    for weights, name in ((tmp_path / "one", "one-sft"), (checkpoint, "last-00000002-sft")):
        out = tmp_path / name
        twingrad(*flags, "--weights", weights, "--rank", "2", "--out", out)
        assert (out / f"{name}.safetensors").exists()
        assert not (out / RESPONSES).exists()
        assert load(out).config == read_model(config.weights).config.replace(tie_embeddings=False)


@pytest.mark.parametrize(
    "entries, flags, message",
    [
        (None, (), r"data: .*instructions\.json: no such file"),
        ([{"instruction": " ", "output": "a"}], (), r"instructions\.json: entry 1: the instruction is empty"),
        ([{"instruction": "a"}], (), r"instructions\.json: entry 1: lacks output; it has instruction"),
        ([{"instruction": "a", "output": 1}], (), r"entry 1: expected a text as output, got int"),
        (
            [{"instruction": "x" * 99, "output": "a"}],
            (),
            r"none of 17 entries can be learnt from; entry 1: the prompt has",
        ),
        ("[{", (), r"instructions\.json: entry 1, line 1: expected a whole JSON object"),
        ("[]", (), r"instructions\.json: holds no entries"),
        (..., ("--style", "alpacca"), r"style: expected alpaca\|phi3\|plain, got 'alpacca'; did you mean alpaca"),
        (..., ("--train_fraction", "1"), r"split: expected fractions above 0"),
        (..., ("--test_fraction", "0.2"), r"split: expected fractions above 0 that leave some for validation"),
        (..., ("--preset", "bytes-tinny"), r"preset: 'bytes-tinny' is not one of .*did you mean bytes-tiny"),
        (..., ("--max_length", "0"), r"max_length: expected at least 1, got 0"),
        (..., ("--responses", "-1"), r"responses: expected at least 0, got -1"),
        (..., ("--max_new_tokens", "0"), r"max_new_tokens: expected at least 1, got 0"),
        (..., ("--tokenizer", "bites"), r"unknown tokenizer 'bites'"),
        (..., ("--model.n_outputs", "3", "--model.tie_embeddings", "false"), r"model: tells 3 classes apart"),
    ],
)
def test_what_is_wrong_gets_one_line_before_anything_is_written(
    instructions, small, refused, tmp_path, entries, flags, message
):
    """In the training part; `entries` may be the file's text."""
    if entries is None:
        instructions.unlink()
    elif isinstance(entries, str):
        instructions.write_text(entries)
    elif entries is not ...:
        instructions.write_text(json.dumps(entries * 20))
    flags = ("--data", instructions, "--style", "plain", "--out", tmp_path / "run", *small, "numpy", *flags)
    line = refused(*TRAIN, *flags)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_an_unsound_test_entry_shows_before_training_and_not_when_it_is_to_be_answered(
    config, instructions, small, refused, tmp_path
):
    entries = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(20)]
    del entries[17]["output"]
    instructions.write_text(json.dumps(entries))
    flags = ("--data", instructions, "--style", "plain", "--out", tmp_path / "run", *small, "numpy")
    assert "entry 18: lacks output" in refused(*TRAIN, *flags)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(instructions, base, refused, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ("--data", instructions, "--weights", base, "--style", "plain", "--engine", "numpy", "--steps", "1")
    line = refused(*TRAIN, *flags, "--out", tmp_path / "file" / "run")
    assert re.search(r"^cannot write .*run: Not a directory$", line), line
    assert (tmp_path / "file").read_text() == ""


def test_the_presets_of_bytes_have_room_for_alpaca_s_prompts():
    """The default preset and style go together."""
    prompt = format_prompt({"instruction": "Say ant.", "output": ""}, "alpaca")
    assert len(prompt) < PRESETS[InstructConfig().preset].context_length
