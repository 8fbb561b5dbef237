"""Chapters 6 and 7, appendix E, the workshop and the course on finetuning: a test for each thing that they do.

What takes whole runs is in tests/gpt/finetune; printed numbers are in tests/figures.
"""

import functools
import http.server
import io
import json
import math
import os
import re
import threading
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from gpt import tokenizers
from gpt.cli import main
from gpt.data import catalogue
from gpt.data.examples import ExampleLoader, JsonEntries
from gpt.engine import Batch, OptimizerConfig, create_engine
from gpt.finetune import classification, instructions, preferences
from gpt.finetune.adapters import adapt
from gpt.finetune.classify import Classifier
from gpt.finetune.config import ExamplesConfig, FinetuneOptimizer, FinetuneTrain, InstructConfig, PreferConfig
from gpt.finetune.instruct import Instruct
from gpt.finetune.prefer import Prefer, measure_preferences
from gpt.finetune.respond import respond
from gpt.finetune.run import build
from gpt.llm import LLM
from gpt.parity import check
from gpt.prompts import alpaca, format_prompt, phi3
from gpt.train.log import read_log
from gpt.train.progress import Progress
from gpt.train.schedule import warmup_cosine
from gpt.weights.native import save_model
from reference import PRESETS, lora, orpo
from reference.gradcheck import numeric_gradient
from reference.init import initialize
from reference.lora import LoRA
from reference.torch_rng import Generator

BYTES = tokenizers.load("bytes")
TINY = PRESETS["bytes-tiny"].replace(emb_dim=24, n_heads=2)
ENTRIES = [{"instruction": f"Add 1 to {i}.", "input": "", "output": str(i + 1)} for i in range(30)]
needs_data = pytest.mark.skipif("TWINGRAD_DATA" not in os.environ, reason="TWINGRAD_DATA names no folder of data sets")
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture(params=["numpy", "torch"])
def name(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


@pytest.fixture
def weights(tmp_path):
    """A file of weights that nothing was taught."""
    path = tmp_path / "weights" / "tiny.safetensors"
    save_model(path, initialize(TINY, Generator(3), "gpt2"), TINY, BYTES.spec())
    return path


@pytest.fixture
def data(tmp_path):
    """A file of instructions."""
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def answer(name, model, source=None):
    llm = LLM.load(model, name)
    llm.style = "plain"
    return llm.generate(source or ENTRIES[0], 6)


# ---------------------------------------------------------------- chapter 6


@needs_data
def test_the_messages_are_downloaded_unzipped_and_kept(tmp_path, monkeypatch):
    content, asked = catalogue.get("sms-spam").read_bytes(), []
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("SMSSpamCollection", content)
        archive.writestr("readme", "")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed.getvalue())))
            self.end_headers()
            self.wfile.write(packed.getvalue())

        def log_message(self, *_):
            pass

    monkeypatch.delenv("TWINGRAD_DATA")
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/spam.zip"
        monkeypatch.setitem(catalogue.ENTRIES, "sms-spam", replace(catalogue.ENTRIES["sms-spam"], urls=(url,)))
        paths = [catalogue.get("sms-spam") for _ in range(2)]
        server.shutdown()
    assert paths == [tmp_path / "SMSSpamCollection.tsv"] * 2
    assert paths[0].read_bytes() == content
    assert asked == ["/spam.zip"]
    assert list(tmp_path.iterdir()) == paths[:1]


@needs_data
@needs_gpt2
def test_texts_may_be_padded_to_the_whole_context():
    gpt2 = tokenizers.load("gpt2")
    rows = classification.split(classification.balance(classification.read_rows(catalogue.get("sms-spam"))))[0]
    examples = classification.Classification(rows, gpt2, 1024, context_length=1024)
    make = functools.partial(classification.collate, pad_id=gpt2.eot, max_length=examples.max_length)
    assert next(ExampleLoader(examples, make, 8, True, True, Generator(123)).epoch()).inputs.shape == (8, 1024)


def test_both_widths_have_their_accuracies_printed(name, weights, tmp_path, capsys):
    """Of the longest text, and of the context."""
    texts = [f"{('ham', 'spam')[i % 2]}\t{('tea', 'WIN')[i % 2]} {i}\n" for i in range(40)]
    (tmp_path / "texts.tsv").write_text("".join(texts))
    flags = ["--data", str(tmp_path / "texts.tsv"), "--weights", str(weights), "--engine", name, "--steps", "3"]
    for width in ("none", "64"):
        out = tmp_path / f"run-{width}"
        assert main(["finetune", "classify", *flags, "--max_length", width, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert f" {6 if width == 'none' else 64} tokens each" in printed
        table = dict(re.findall(r"^(train|validation|test) accuracy: ([\d.]+)$", printed, re.MULTILINE))
        results = json.loads((out / "results.json").read_text())
        assert table == {part: f"{results[f'{part}_accuracy']:.4g}" for part in ("train", "validation", "test")}


def test_a_model_of_texts_answers_a_question_before_it_classifies(name, weights):
    """It continues the prompt, whatever it knows; as a classifier it continues none."""
    prompt = "Is the following text 'spam'? Answer with 'yes' or 'no': 'WIN'"
    assert answer(name, weights, prompt) == answer("numpy", weights, prompt)


def test_a_text_is_cut_to_the_context_and_not_to_the_width_of_the_embedding(name, weights):
    """64 positions of 24 entries each."""
    params, config = adapt(
        initialize(TINY, Generator(3), "gpt2"), TINY, Generator(1), n_outputs=2, tie_embeddings=False, head_bias=True
    )
    spec = {"labels": ["a", "b"], "max_length": None, "position": "last", "pad": 256}
    classifier = Classifier(create_engine(name, config, params), BYTES, spec)
    texts = ["x" * 40 + "a", "x" * 40 + "b", "x" * 63 + "a", "x" * 64 + "a", "x" * 64 + "b"]
    p = classifier.probabilities(texts)[:, 0]
    assert abs(p[0] - p[1]) > 1e-6
    assert abs(p[2] - p[3]) > 1e-6
    assert p[3] == pytest.approx(p[4], abs=1e-7)


# ---------------------------------------------------------------- chapter 7


def test_prompts_with_and_without_an_input():
    """Byte by byte."""
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    entry = {"instruction": "Identify the correct spelling of the following word.", "input": "Ocassion"}
    instruction = "\n\n### Instruction:\nIdentify the correct spelling of the following word."
    assert alpaca(entry) == f"{head}{instruction}\n\n### Input:\nOcassion\n\n### Response:\n"
    assert alpaca({**entry, "input": ""}) == alpaca(entry | {"input": ""}) == f"{head}{instruction}\n\n### Response:\n"
    question = "<|user|>\nIdentify the correct spelling of the following word."
    assert phi3(entry) == f"{question}\nOcassion\n\n<|assistant|>\n"
    assert phi3({**entry, "input": ""}) == f"{question}\n\n<|assistant|>\n"


@needs_data
@needs_gpt2
def test_a_data_set_of_instructions_is_tokenized_beforehand(monkeypatch):
    gpt2, entries = tokenizers.load("gpt2"), JsonEntries(catalogue.get("instruction-data"))[:9]
    examples = instructions.InstructionDataset(entries, gpt2)
    expected = [gpt2.encode(alpaca(entry) + entry["output"]) for entry in entries]
    monkeypatch.setattr(type(gpt2), "encode", None)
    assert [ids.tolist() for ids, _ in examples] == expected
    assert len(examples) == 9


def test_a_batch_is_as_wide_as_the_model_reads():
    rows = [(list(range(20)), 4), (list(range(3)), 1)]
    assert instructions.collate(rows, 256).inputs.shape == (2, 20)
    assert instructions.collate(rows, 256, allowed_max_length=7).inputs.shape == (2, 7)


def test_the_medium_model_has_355_million_parameters():
    assert round(PRESETS["gpt2-medium"].n_parameters / 1e6) == 355


def test_training_is_timed_and_the_validation_loss_falls(name, weights, data, tmp_path):
    config = InstructConfig(
        data=str(data), weights=str(weights), engine=name, style="plain", out=str(tmp_path / "run"),
        loader=ExamplesConfig(batch_size=5), optimizer=FinetuneOptimizer(lr=5e-3),
        train=FinetuneTrain(epochs=4, eval_every=5),
    )  # fmt: skip
    build(config, Instruct, Progress())[0].run()
    log = read_log(config.out)
    losses = log["val_loss"][~np.isnan(log["val_loss"])]
    assert losses[-1] < losses[0] - 0.5
    assert (np.diff(log["seconds"]) > 0).all()


def test_52_thousand_instructions_are_read_without_being_held(tmp_path):
    path = tmp_path / "alpaca.json"
    with open(path, "w") as file:
        for i in range(52_002):
            entry = {"instruction": f"Write the number {i} " + "in words " * 20, "input": "", "output": "number " * 20}
            file.write((",\n" if i else "[") + json.dumps(entry))
        file.write("]")
    tracemalloc.start()
    entries = JsonEntries(path)
    examples = instructions.InstructionDataset(entries[:500], BYTES, cache=False)
    loader = ExampleLoader(examples, functools.partial(instructions.collate, pad_id=256), 2, True, True, Generator(1))
    shapes = [batch.inputs.shape for batch, _ in zip(loader, range(5), strict=False)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == 52_002
    assert {rows for rows, _ in shapes} == {2}
    assert path.stat().st_size > 20_000_000
    assert held < 2_000_000
    assert peak < 10_000_000


@needs_data
def test_of_1100_pairs_6_are_twice_the_same():
    config = PreferConfig(preset="bytes-small", model={"context_length": 1024}, engine="numpy", responses=0)
    task = build(config, Prefer, Progress())[1]
    counts = [len(part) for part in task.sets]
    assert counts == [1045, 55]
    assert len(task.identical) == 6
    assert task.dropped == []


# ---------------------------------------------------------------- appendix E


@pytest.mark.parametrize("scaling, scale", [("alpha/rank", 2.0), ("alpha", 8.0)])
def test_an_adapter_changes_nothing_at_first_and_then_by_its_scale(name, scaling, scale):
    settings = LoRA(rank=4, alpha=8.0, scaling=scaling)
    assert settings.scale == scale
    params = initialize(TINY, Generator(3), "gpt2")
    adapted, config = adapt(params, TINY, Generator(1), lora=settings)
    tokens, layer = np.arange(40).reshape(2, 20), "blocks.1.mlp.up"

    def logits(config, params):
        return create_engine(name, config, params, dtype="float64").logits(tokens)

    before = logits(TINY, params)
    np.testing.assert_array_equal(logits(config, adapted), before)
    a = adapted[f"{layer}.lora_a"]
    assert 0.9 / math.sqrt(24) < np.abs(a).max() <= 1 / math.sqrt(24)  # PyTorch's kaiming_uniform_ with a = sqrt(5)
    adapted[f"{layer}.lora_b"] = np.full((96, 4), 0.25, np.float32)
    change = scale * 0.25 * a.astype(np.float64).sum(axis=0)
    by_hand = {**params, f"{layer}.weight": params[f"{layer}.weight"] + change}
    np.testing.assert_allclose(logits(config, adapted), logits(TINY, by_hand), atol=1e-12)
    assert np.abs(logits(TINY, by_hand) - before).max() > 1e-3


def test_all_73_linear_layers_of_the_classifier_have_an_adapter_or_those_that_are_named():
    model = PRESETS["gpt2-small"].replace(n_outputs=2, tie_embeddings=False, head_bias=True)

    def adapted(**settings):
        shapes = model.replace(lora=LoRA(16, 16.0, **settings)).parameter_shapes()
        return [name.removesuffix(".lora_a") for name in shapes if name.endswith(".lora_a")]

    weights = {name.removesuffix(".weight") for name, shape in model.parameter_shapes().items() if len(shape) == 2}
    assert len(adapted()) == 73
    assert set(adapted()) == weights - {"tok_emb", "pos_emb"}
    assert adapted(targets=("query", "value")) == [
        f"blocks.{i}.attn.{n}" for i in range(12) for n in ("query", "value")
    ]


def test_the_gradients_of_an_adapter_by_hand_are_the_true_ones():
    rng = np.random.default_rng(0)
    x, a, b, dy = (rng.normal(size=shape) for shape in ((5, 7), (3, 7), (4, 3), (5, 4)))
    by_hand = lora.backward(dy, lora.forward(x, a, b, 0.5)[1])
    for i, gradient in enumerate(by_hand):
        arrays = [x, a, b]

        def loss(value, i=i, arrays=arrays):
            return float((lora.forward(*arrays[:i], value, *arrays[i + 1 :], 0.5)[0] * dy).sum())

        np.testing.assert_allclose(gradient, numeric_gradient(loss, arrays[i]), atol=1e-7)


# ---------------------------------------------------------------- the workshop


def test_the_data_are_split_into_two_files(tmp_path):
    entries = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(1100)]
    train, _, test = instructions.split(entries, test=None)
    paths = instructions.write_splits(tmp_path, train, test)
    assert [path.name for path in paths] == ["train.json", "test.json"]
    assert [len(json.loads(path.read_text())) for path in paths] == [935, 165]


def test_an_entry_and_its_formatted_text_are_asked_alike(name, weights):
    assert answer(name, weights) == answer(name, weights, format_prompt(ENTRIES[0], "plain"))


def test_a_file_is_answered_by_the_base_and_by_the_finetuned_model(name, weights, data, tmp_path, capsys):
    """Each under a key of its own, the second file made of the first."""
    run = ["--weights", str(weights), "--engine", name, "--style", "plain", "--lr", "1e-2", "--steps", "20"]
    run += ["--data", str(data), "--responses", "0", "--out", str(tmp_path / "run")]
    assert main(["finetune", "instruct", *run]) == 0
    base, both = tmp_path / "test_base_model.json", tmp_path / "test_both.json"
    asking = ["respond", "--engine", name, "--limit", "4", "--max_new_tokens", "6"]
    first = ["--data", str(data), "--model", str(weights), "--key", "base_model", "--style", "plain"]
    assert main([*asking, *first, "--out", str(base)]) == 0
    second = ["--data", str(base), "--model", str(tmp_path / "run"), "--key", "finetuned_model"]
    assert main([*asking, *second, "--out", str(both)]) == 0
    assert f"4 answers: {both}" in capsys.readouterr().out
    answered = json.loads(both.read_text())
    assert [list(entry) for entry in answered] == [[*ENTRIES[0], "base_model", "finetuned_model"]] * 4
    for entry, given in zip(answered, ENTRIES, strict=False):
        assert {key: entry[key] for key in given} == given
        assert entry["base_model"] == answer(name, weights, format_prompt(given, "plain")).strip()
        assert entry["finetuned_model"] == answer(name, tmp_path / "run", format_prompt(given, "plain")).strip()
    assert any(entry["base_model"] != entry["finetuned_model"] for entry in answered)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--key", "output"), "key: an answer under 'output' would take the place of what the entry says there"),
        (("--limit", "0"), "limit must be at least 1, got 0"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1, got 0"),
        (("--model", "nothing"), "nothing: no such file or folder"),
    ],
)
def test_what_cannot_be_answered_so_is_said_in_one_line(weights, data, tmp_path, capsys, flags, message):
    given = ["--data", str(data), "--model", str(weights), "--engine", "numpy", "--out", str(tmp_path / "answers.json")]
    assert main(["respond", *given, *flags]) == 2
    assert re.fullmatch(f"error: {re.escape(message)}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "answers.json").exists()


def test_answering_goes_on_where_it_was_stopped(weights, tmp_path, capsys):
    llm, out = LLM.load(weights, "numpy"), tmp_path / "answers.json"
    llm.style = "plain"
    respond(llm, ENTRIES[:9], out, max_new_tokens=3)
    first = json.loads(out.read_text())
    first[0]["model_response"] = "kept"
    out.write_text(json.dumps(first))
    answered = respond(llm, ENTRIES[:12], out, max_new_tokens=3)
    assert answered == json.loads(out.read_text())
    assert len(answered) == 12
    assert answered[0]["model_response"] == "kept"
    flags = ["--data", str(tmp_path / "other.json"), "--model", str(weights), "--engine", "numpy", "--out", str(out)]
    (tmp_path / "other.json").write_text(json.dumps(ENTRIES[3:20]))
    capsys.readouterr()
    assert main(["respond", *flags]) == 2
    assert re.fullmatch(r"error: .*answers\.json: holds something else .*\n", capsys.readouterr().err)
    assert json.loads(out.read_text()) == answered


# ---------------------------------------------------------------- the course


def test_pairs_are_filtered_padded_cut_kept_and_read_again(tmp_path):
    entries = [
        {"source": "ab"[i % 2], "instruction": "x" * (500 + 20 * i), "chosen": "yes", "rejected": "no" * 300}
        for i in range(4)
    ]
    chosen = preferences.filter_sources(entries, ["b"])  # leaves the first and the third, of 500 and 540 characters
    pairs = preferences.PreferenceDataset(chosen, BYTES, "plain", 1000, max_prompt_tokens=512)
    assert len(pairs) == 1
    assert pairs.dropped == [(3, "the prompt has 540 tokens, expected fewer than 512")]
    assert [len(pairs[0].chosen), len(pairs[0].rejected)] == [500 + 3 + 1, 1001]
    batch = preferences.collate(pairs[:], 256, "orpo", 0.1, 1000)
    assert batch.inputs.shape == (2, 1000)
    assert (batch.inputs[0, 503:] == 256).all()
    preferences.save_pairs(tmp_path / "pairs", pairs[:], {"style": "plain"})
    (again,) = preferences.load_pairs(tmp_path / "pairs", {"style": "plain"})[:]
    for ours, theirs in zip(again[:4], pairs[0][:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("step, factor", [(0, 0.0), (50, 0.5), (100, 1.0), (350, 0.8536), (600, 0.5), (1100, 0.0)])
def test_the_learning_rate_rises_for_100_steps_and_then_falls_as_a_cosine(step, factor):
    """Not as one without a 1 + before it, which is 0 at half the way."""
    assert warmup_cosine(step, 1100, 1.0, 100) == pytest.approx(factor, abs=5e-5)


def test_of_an_answer_of_3_tokens_3_are_counted(name):
    """The mean over them, though the prompt has as many."""
    engine = create_engine(name, TINY, initialize(TINY, Generator(3), "gpt2"), dtype="float64")
    ids = np.array([10, 20, 30, 40, 50, 60], np.int32)
    batch = preferences.collate([preferences.Pair(ids, ids[:5], 3, 3)], 256, "orpo", 0.1)
    assert batch.lengths.tolist() == [3, 2]
    logps = engine.token_logps(batch).logps
    assert np.flatnonzero(logps[0]).tolist() == [2, 3, 4]
    for i in range(3):
        logits = engine.logits(ids[None, : 3 + i].astype(np.int64))[0]
        assert logps[0, 2 + i] == pytest.approx(logits[ids[3 + i]] - np.log(np.exp(logits).sum()), rel=1e-9)
    whole = Batch(batch.inputs[:1], batch.targets[:1])
    assert engine.loss(whole) == pytest.approx(-logps[0].sum() / 3, rel=1e-12)


def test_the_odds_ratio_s_loss_is_finite_for_all_pairs_and_its_gradient_true():
    grid = np.concatenate([-np.logspace(-12, np.log10(200), 40), -np.linspace(0.5, 200, 40), [0.0]])
    chosen, rejected = (axis.ravel() for axis in np.meshgrid(grid, grid))
    for dtype in (np.float64, np.float32):
        loss, saved = orpo.forward(chosen.astype(dtype), rejected.astype(dtype))
        assert np.isfinite(loss)
        inside = (chosen < -1e-3) & (rejected < -1e-3)
        for gradient in orpo.backward(1.0, saved):
            assert np.isfinite(gradient[inside]).all()
    chosen, rejected = np.array([-0.5, -2.0, -9.0]), np.array([-1.5, -0.3, -9.5])
    of_chosen, of_rejected = orpo.backward(1.0, orpo.forward(chosen, rejected, 0.3)[1])
    true = numeric_gradient(lambda value: float(orpo.forward(value, rejected, 0.3)[0]), chosen)
    np.testing.assert_allclose(of_chosen, true, atol=1e-8)
    true = numeric_gradient(lambda value: float(orpo.forward(chosen, value, 0.3)[0]), rejected)
    np.testing.assert_allclose(of_rejected, true, atol=1e-8)


def test_toy_pairs_raise_the_odds_of_what_is_chosen(name):
    engine = create_engine(name, TINY, initialize(TINY, Generator(3), "gpt2"), OptimizerConfig(weight_decay=0.0))
    prompt = [1, 2, 3]
    pairs = [preferences.Pair(*(np.array([*prompt, i, answer], np.int32) for answer in (7, 9)), 4, 4) for i in range(8)]
    batch = preferences.collate(pairs, 256, "orpo", 0.5)
    before = measure_preferences(engine, batch)
    for _ in range(10):
        engine.accumulate(batch)
        engine.step(3e-3)
    after = measure_preferences(engine, batch)
    assert after["log_odds"] > before["log_odds"] + 0.5
    assert after["loss"] < before["loss"]
    assert after["accuracy"] == 1
