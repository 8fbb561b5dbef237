"""Classification as a user runs it: trained, asked, gone on with; what learns and what does not."""

import csv
import json
import math
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from gpt.data.examples import ExampleLoader
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.finetune.classification import Classification, collate, read_rows
from gpt.finetune.classify import Classifier, Classify
from gpt.finetune.config import ClassifyConfig, ClassifyTrain, ExamplesConfig, FinetuneOptimizer, LoRAConfig
from gpt.finetune.run import build
from gpt.parity import check
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.train.trainer import measured
from gpt.weights.load import load
from gpt.weights.native import read_model, save_model
from gpt.weights.tensors import read_safetensors

TRAIN = ("finetune", "classify")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture
def config(labelled, base, tmp_path):
    """A short run from a file of weights."""
    return ClassifyConfig(
        data=str(labelled),
        weights=str(base),
        engine="numpy",
        out=str(tmp_path / "run"),
        loader=ExamplesConfig(batch_size=4),
        optimizer=FinetuneOptimizer(lr=3e-3),
        train=ClassifyTrain(steps=6, eval_every=2),
    )


def changed(before, after):
    """The names of the parameters that are no longer the same, bit for bit."""
    return {name for name in before if not np.array_equal(np.asarray(before[name]), np.asarray(after[name]))}


def test_texts_that_a_word_tells_apart_are_all_told_apart(engine, labelled, small, twingrad, tmp_path):
    out = tmp_path / "run"
    printed = twingrad(*TRAIN, "--data", labelled, "--out", out, "--lr", "5e-3", "--epochs", "12", *small, engine)
    results = json.loads((out / "results.json").read_text())
    assert [results[f"{part}_accuracy"] for part in ("train", "validation", "test")] == [1, 1, 1]
    assert results["test_loss"] < 0.1
    assert "test accuracy: 1" in printed
    assert ", but it is " not in printed
    names = {path.name for path in out.iterdir() if not path.name.startswith(("best-", "last-"))}
    plots = {f"{name}.{ending}" for name in ("loss", "accuracy") for ending in ("png", "pdf")}
    tables = {"train.csv", "validation.csv", "test.csv"}
    assert names == {"config.yaml", "log.csv", "results.json", "review_classifier.safetensors", *plots, *tables}
    assert all((out / name).stat().st_size > 1000 for name in plots)
    assert (out / "loss.png").read_bytes() != (out / "accuracy.png").read_bytes()
    assert [len(read_rows(out / name)) for name in ("train.csv", "validation.csv", "test.csv")] == [84, 12, 24]
    with open(out / "log.csv", newline="") as file:
        assert set(next(csv.reader(file))) >= {"examples", "train_loss", "val_loss", "train_accuracy", "val_accuracy"}
    log = read_log(out)
    assert log["examples"].tolist() == list(range(4, 4 * len(log["step"]) + 1, 4))
    evaluated = ~np.isnan(log["val_loss"])
    assert np.flatnonzero(evaluated).tolist() == list(range(0, len(log["step"]), 5))
    assert ((0 <= log["val_accuracy"][evaluated]) & (log["val_accuracy"][evaluated] <= 1)).all()
    assert np.isnan(log["val_accuracy"][~evaluated]).all()

    asked = twingrad("classify", "bread and tea", "a door to WIN", "--model", out, "--engine", engine).splitlines()
    assert re.fullmatch(r"ham \(\d+\.\d%\): bread and tea", asked[0])
    assert re.fullmatch(r"spam \(\d+\.\d%\): a door to WIN", asked[1])
    alone = twingrad("classify", "WIN a door", "--max_length", "3", "--model", out, "--engine", engine)
    assert re.fullmatch(r"(ham|spam) \(\d+\.\d%\): WIN a door\n", alone)


def test_the_accuracy_of_all_training_texts_is_of_all(config):
    config.loader = ExamplesConfig(batch_size=5)  # of 84 texts, in training 4 are left over
    trainer, task = build(config, Classify, Progress())
    trainer.run()
    results = task.finish(trainer.engine, Progress())
    found = Classifier(trainer.engine, task.tokenizer, task.spec).classify([text for _, text in task.rows[0]])
    right = sum(config.labels[label] == name for (label, _), name in zip(task.rows[0], found, strict=True))
    assert len(found) == 84
    assert results["train_accuracy"] == pytest.approx(right / 84, abs=1e-12)


def test_a_saved_classifier_says_the_same_again(config, engine):
    trainer, task = build(config, Classify, Progress())
    trainer.run()
    texts = ["one text", "another, which is rather longer than any that it was trained on " * 2, "a\nb\tc"]
    first = Classifier(trainer.engine, task.tokenizer, task.spec)
    path = Path(config.out, "review_classifier.safetensors")
    save_model(path, trainer.engine.parameters(), trainer.engine.config, trainer.tokenizer, task.spec)
    for source in (path, config.out):
        again = Classifier.load(source, "numpy")
        np.testing.assert_array_equal(again.probabilities(texts), first.probabilities(texts))
        assert again.classify(texts) == first.classify(texts)
    other = Classifier.load(path, engine)
    for length in (None, 3, 64, 1000):
        p = other.probabilities(texts, length)
        np.testing.assert_allclose(p, first.probabilities(texts, length), atol=1e-6)
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    assert other.classify("one text") == other.classify(["one text"])[0]
    assert other.classify([]) == []
    assert np.abs(other.probabilities(texts, 3) - other.probabilities(texts)).max() > 1e-6
    with pytest.raises(UserError, match="^text 2: expected a text to classify, got an empty one$"):
        other.classify(["a", ""])
    with pytest.raises(UserError, match="^max_length must be at least 1, got 0$"):
        other.classify("a", 0)


def test_a_text_of_any_length_is_read_as_far_as_the_context_goes(config):
    trainer, task = build(config, Classify, Progress())
    classifier = Classifier(trainer.engine, task.tokenizer, task.spec)
    one, other = "x" * 64 + "a", "x" * 64 + "b"
    np.testing.assert_array_equal(classifier.probabilities([one], 1000), classifier.probabilities([other], 1000))


@pytest.mark.parametrize(
    "layers, learning",
    [
        ("head", ("head.",)),
        ("last_block", ("head.", "final_norm.", "blocks.1.")),
        ("auto", ("head.", "final_norm.", "blocks.1.")),
        ("all", ("",)),
    ],
)
def test_only_the_chosen_layers_learn_and_the_others_keep_every_bit(config, engine, layers, learning, base):
    config.layers, config.engine = layers, engine
    trainer, _ = build(config, Classify, Progress())
    before = {name: array.copy() for name, array in trainer.engine.parameters().items()}
    trainer.run()
    after = trainer.engine.parameters()
    assert changed(before, after) == {name for name in before if name.startswith(learning)}
    kept = read_model(base).params
    for name in before.keys() - {"head.weight", "head.bias"}:  # what was not drawn anew is the file's
        np.testing.assert_array_equal(before[name], kept[name], err_msg=name)


def test_the_head_is_new_and_as_large_as_there_are_labels(config, labelled):
    content = labelled.read_text()
    labelled.write_text(content.replace("spam\t", "0\t").replace("ham\t", "two\t") + "one\tfish and chips\n" * 40)
    config.labels = ("zero", "one", "two")
    trainer, task = build(config, Classify, Progress())
    shapes = trainer.engine.config.parameter_shapes()
    assert shapes["head.weight"] == (3, 24)
    assert shapes["head.bias"] == (3,)
    assert len(task.train_loader.examples) == 84  # of three times 40
    assert Classifier(trainer.engine, task.tokenizer, task.spec).classify("fish") in config.labels


def test_the_first_token_knows_nothing_of_the_rest_and_the_last_one_does(config, engine):
    texts = ["abcdefgh", "axyz", "a"]
    config.engine = engine
    spread = {}
    for config.position in ("first", "last"):
        trainer, task = build(config, Classify, Progress())
        for _ in range(3):
            trainer.engine.accumulate(next(task.train_loader.epoch()))
            trainer.engine.step(1e-2)
        p = Classifier(trainer.engine, task.tokenizer, task.spec).probabilities(texts)
        spread[config.position] = np.ptp(p, axis=0).max()
    assert spread["first"] < 1e-6
    assert spread["last"] > 1e-4


@pytest.mark.parametrize("favourite", [0, 1])
def test_a_model_that_always_says_the_same_is_right_in_half_of_a_balanced_set(config, engine, favourite):
    config.engine = engine
    trainer, task = build(config, Classify, Progress())
    params = {name: array.copy() for name, array in trainer.engine.parameters().items()}
    params["head.weight"][:] = 0
    params["head.bias"][:] = [1 - favourite, favourite]
    constant = create_engine(engine, trainer.engine.config, params)
    rows = [(i // 15, f"text {i}") for i in range(30)]
    examples = Classification(rows, task.tokenizer)

    def make(rows):
        return collate(rows, task.spec["pad"], examples.max_length)

    found = measured(constant, ExampleLoader(examples, make, 7, False, False), None, task.measure)
    assert found["accuracy"] == 0.5  # of examples: the mean of five batches, which are not balanced, would be another


def test_the_measured_loss_is_the_engines(config, engine):
    config.engine = engine
    trainer, task = build(config, Classify, Progress())
    batch = next(task.validation_loader.epoch())
    assert task.measure(trainer.engine, batch)["loss"] == pytest.approx(trainer.engine.loss(batch), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_both_engines_learn_alike_step_by_step(config, tmp_path, rank):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    config.dtype, config.lora, config.train = "float64", LoRAConfig(rank), ClassifyTrain(steps=12, eval_every=3)
    config.model = {"drop_rate": 0.1}
    logs = []
    for config.engine in ("numpy", "torch"):
        config.out = str(tmp_path / config.engine)
        build(config, Classify, Progress())[0].run()
        logs.append(read_log(config.out))
    for name in ("loss", "norm", "train_loss", "val_loss", "train_accuracy", "val_accuracy"):
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-10, err_msg=name)


def test_adapters_learn_beside_a_base_that_keeps_every_bit(engine, labelled, base, twingrad, tmp_path):
    out = tmp_path / "run"
    flags = ("--weights", base, "--engine", engine, "--rank", "4", "--lr", "1e-2", "--epochs", "10")
    printed = twingrad(*TRAIN, "--data", labelled, "--out", out, "--batch_size", "4", "--max_length", "24", *flags)
    of_last = load(next(out.glob("last-*")))
    adapted = {name for name in of_last.params if name.endswith((".lora_a", ".lora_b"))}
    assert of_last.config.lora.rank == 4
    before = read_model(base).params
    assert not changed({name: before[name] for name in of_last.params if name in before}, of_last.params)
    total, trained = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) parameters, ([\d,]+) of", printed).groups())
    assert trained == sum(math.prod(of_last.params[name].shape) for name in adapted) < total / 4
    tensors, _ = read_safetensors(out / "adapter.safetensors")
    assert tensors.keys() == adapted
    merged, unmerged = load(out), of_last
    assert merged.config.lora is None
    assert merged.task["kind"] == "classification"
    tokens = np.frombuffer(b"bread and tea WIN", np.uint8)[None].astype(np.int64)
    logits = [create_engine(engine, model.config, model.params).logits(tokens) for model in (merged, unmerged)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert json.loads((out / "results.json").read_text())["train_accuracy"] > 0.9
    assert (out / "accuracy.png").stat().st_size > 1000


def test_messages_are_told_apart(data_folder, command, tmp_path):
    """A model of one block and 46,000 parameters, from nothing, in some seconds: better than 9 in 10."""
    sizes = ("--preset", "bytes-tiny", "--model.n_layers", "1", "--model.context_length", "120", "--max_length", "120")
    rates = ("--lr", "5e-3", "--schedule", "cosine", "--warmup_steps", "20", "--batch_size", "16", "--epochs", "5")
    flags = ("--data", "sms-spam", "--engine", "numpy", "--out", tmp_path / "run")
    with command(*TRAIN, *flags, *sizes, *rates) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation_accuracy"] > 0.9
    assert results["test_accuracy"] > 0.9
    classifier = Classifier.load(tmp_path / "run", "numpy")
    rows = read_rows(tmp_path / "run" / "validation.csv")
    found = classifier.classify([text for _, text in rows])
    right = np.mean([label == ("ham", "spam")[number] for label, (number, _) in zip(found, rows, strict=True)])
    assert right == pytest.approx(results["validation_accuracy"])
    texts = (
        "You are a winner you have been specially selected to receive $1000 cash or a $2000 award.",
        "Hey, just wanted to check if we're still on for dinner tonight? Let me know!",
    )
    assert classifier.classify(texts) == ["spam", "ham"]


def test_a_stopped_run_goes_on_bit_for_bit(labelled, command, tmp_path, assert_same_run):
    """Ctrl-C, and then the command that the run ends with."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    flags = (*TRAIN, "--data", labelled, "--preset", "bytes-tiny", "--engine", "numpy", "--model.drop_rate", "0.1")
    flags += ("--batch_size", "4", "--steps", "200", "--eval_every", "3", "--eval_batches", "2", "--out")
    with command(*flags, whole) as one, command(*flags, parts) as other:
        while other.poll() is None and not has_rows(parts / "log.csv", 5):
            time.sleep(0.01)
        other.send_signal(signal.SIGINT)
        printed, errors = other.communicate(timeout=100)
        assert other.returncode == 130, errors
        assert not (parts / "results.json").exists()
        *_, last = printed.splitlines()
        assert last == f"To go on: twingrad finetune classify --config {parts / 'config.yaml'} --resume"
        with command(*last.removeprefix("To go on: twingrad ").split()) as again:
            printed, errors = again.communicate(timeout=100)
        assert again.returncode == 0, errors
        assert "Goes on after step" in printed
        _, errors = one.communicate(timeout=100)
        assert one.returncode == 0, errors
    assert_same_run(whole, parts)
    assert json.loads((parts / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    before, after = (read_model(run / "review_classifier.safetensors").params for run in (whole, parts))
    assert not changed(before, after)


def has_rows(path, n):
    return path.exists() and path.read_text().count("\n") > n


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, (), r"data: .*/texts\.tsv: no such file"),
        ("spam\ta\neggs\tb\n", (), r"texts\.tsv: line 2: the label 'eggs' is not one of ham, spam"),
        ("spam\ta\nham\t\n", (), r"texts\.tsv: line 2: the text is empty"),
        ("spam\ta\nham\tb\n", (), r"split: 2 texts are too few"),
        ("spam\ta\nspam\tb\n", (), r"balance: expected texts of at least two labels"),
        (..., ("--labels", "spam"), r"labels: expected two different ones at least, got spam"),
        (..., ("--max_length", "65"), r"max_length has 65 tokens, the model's context 64"),
        (..., ("--max_length", "0"), r"max_length: expected at least 1, got 0"),
        (..., ("--preset", "bytes-tinny"), r"preset: 'bytes-tinny' is not one of .*did you mean bytes-tiny"),
        (..., ("--weights", "nothing"), r"nothing: no such file or folder"),
        (..., ("--tokenizer", "simple-v1"), r"tokenizer"),
        (..., ("--batch_size", "1000"), r"drop_last leaves no batch"),
        (..., ("--layers", "first"), r"layers: expected auto\|head\|last_block\|all, got 'first'"),
        (..., ("--position", "middle"), r"position: expected last\|first, got 'middle'"),
        (
            ...,
            ("--rank", "2", "--trained", "head.*"),
            r"trained: with adapters \(rank above 0\) they alone are trained",
        ),
        (..., ("--rank", "2", "--targets", "nose"), r"lora targets: nose, expected some of"),
        (..., ("--targets", "query"), r"targets: of adapters, and at rank 0 there are none; expected --rank beside it"),
        (..., ("--trained", "nose.*"), r"trained: no parameter is named 'nose\.\*'"),
        (..., ("--epoch", "1"), r"has no option --epoch; did you mean --epochs\?"),
    ],
)
def test_what_is_wrong_gets_one_line_before_anything_is_written(
    labelled, small, refused, tmp_path, content, flags, message
):
    if content is None:
        labelled.unlink()
    elif content is not ...:
        labelled.write_text(content)
    line = refused(*TRAIN, "--data", labelled, "--out", tmp_path / "run", *small, "numpy", *flags)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_gone_on_with_only_as_that_run(config, refused, twingrad, tmp_path, instructions):
    out = config.out
    flags = ("--data", config.data, "--weights", config.weights, "--engine", "numpy", "--steps", "2", "--out", out)
    twingrad(*TRAIN, *flags)
    before = {path: path.stat().st_mtime_ns for path in Path(out).iterdir()}
    assert "already holds a run: go on with it by --resume" in refused(*TRAIN, *flags)
    assert "labels of the run in" in refused(*TRAIN, *flags, "--resume", "--labels", "spam", "--labels", "ham")
    line = refused("finetune", "instruct", "--data", instructions, "--out", out, "--resume")
    assert re.search(r"config\.yaml: another kind of run, or damaged", line)
    assert "holds no run" in refused(*TRAIN, *flags[:-1], tmp_path / "elsewhere", "--resume")
    assert {path: path.stat().st_mtime_ns for path in Path(out).iterdir()} == before
    twingrad(*TRAIN, *flags, "--resume", "--steps", "3")  # longer is the same run
    assert len(read_log(out)["step"]) == 3


def test_what_is_no_classifier_cannot_be_asked(base, refused, tmp_path):
    assert re.search("small.safetensors: no classifier; train one by", refused("classify", "a", "--model", base))
    assert "no such file or folder" in refused("classify", "a", "--model", tmp_path / "nothing")
    assert 'give it as in: twingrad classify "..."' in refused("classify", "--model", base)
    assert "max_length must be at least 1, got -1" in refused("classify", "a", "--max_length", "-1", "--model", base)


def test_a_classifier_writes_no_text(config, refused, twingrad, instructions, pairs, tmp_path):
    trainer, task = build(config, Classify, Progress())
    path = tmp_path / "classifier.safetensors"
    save_model(path, trainer.engine.parameters(), trainer.engine.config, trainer.tokenizer, task.spec)
    for kind, data in (("instruct", instructions), ("prefer", pairs)):
        flags = ("--data", data, "--weights", path, "--engine", "numpy", "--style", "plain", "--out", tmp_path / kind)
        line = refused("finetune", kind, *flags)
        assert line == f"{path}: tells 2 classes apart, and cannot learn to write"
        assert not (tmp_path / kind).exists()
    assert "twingrad classify" in refused("generate", "--model", path, "--prompt", "a", "--engine", "numpy")


def test_a_run_that_is_never_evaluated_ends_with_its_model_all_the_same(labelled, small, twingrad, tmp_path):
    """There is no accuracy to draw, and no other reason to lose the model."""
    out = tmp_path / "run"
    twingrad(*TRAIN, "--data", labelled, "--out", out, "--steps", "2", *small, "numpy", "--eval_every", "0")
    assert {"review_classifier.safetensors", "results.json", "loss.png"} <= {path.name for path in out.iterdir()}
    assert not (out / "accuracy.png").exists()
