"""The report's data: what is in it are the engine's numbers, and what cannot be shown is refused in one line."""

import base64
import dataclasses
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from gpt.engine import Batch, create_engine
from gpt.errors import UserError
from gpt.parity import model as parity
from gpt.study import report, source
from gpt.study.record import record
from gpt.study.subject import MOST_TOKENS, Subject, loaded, tiny
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference import GPT
from reference.config import PRESETS, GPTConfig

TEXT = "the cat sat on the mat"


def unpack(packed):
    array = np.frombuffer(base64.b64decode(packed["data"]), "<f8")
    return array.reshape(packed["shown"])


def subject_of(name):
    """One of the checker's models, with dropout, on one example."""
    config, batch = parity.CONFIGS[name], parity.batch(parity.CONFIGS[name])
    tokens, targets = batch.inputs[:1], batch.targets[:1]
    labels = [str(token) for token in (*tokens[0], 0)]
    return Subject(name, config, {0: parity.parameters(config)}, tokens, targets, labels, [], str, parity.noise())


@pytest.mark.parametrize("name", parity.CONFIGS)
def test_every_tensor_is_the_engines_and_every_equation_is_wired_to_tensors(name):
    """In one test: a page takes long to make."""
    subject = subject_of(name)
    data = report.build(subject)
    assert_tensors_are_the_engines(subject, data)
    assert_all_is_connected(data)


def assert_tensors_are_the_engines(subject, data):
    assert data["complete"]
    assert data["checked"]["different"] == []
    engine = create_engine("numpy", subject.config, subject.params, dtype="float64")
    seen = {}
    batch = Batch(subject.tokens, subject.targets)
    engine.trace(batch, lambda name, x: seen.update({name: np.array(x)}), subject.noise)
    assert data["checked"]["tensors"] == len(seen) + len(subject.params)
    for key, array in seen.items():
        if key in data["tensors"]:
            assert np.array_equal(unpack(data["tensors"][key]), array), key
        else:  # the loss's gradient is 1, and what two engines call by one name may be the end of several stations
            assert key.removeprefix("d.") in data["tensors"], key
    engine.accumulate(batch, noise=subject.noise)
    for key, gradient in engine.gradients().items():
        assert np.array_equal(unpack(data["tensors"][f"d.{key}"]), gradient), key


def assert_all_is_connected(data):
    for station in data["stations"]:
        assert set(station["wires"].values()) <= set(data["tensors"])
        for equation in (*station["forward"], *station["backward"]):
            assert equation["tensor"] in station["wires"], (station["name"], equation["text"])
        assert station["code"]["forward"].strip()
        assert station["code"]["backward"].strip()
    for key, parts in data["contributions"].items():
        total = sum(unpack(data["tensors"][part["key"]]) for part in parts)
        np.testing.assert_allclose(
            total, unpack(data["tensors"][key]), rtol=0, atol=1e-13 * np.abs(total).max() + 1e-15
        )


def test_the_code_is_what_stands_in_the_file():
    recording = record(*(getattr(tiny(TEXT, 0), field) for field in ("config", "params", "tokens", "targets")))
    for step in recording.steps:
        code = source.code_of(step.operation)
        lines = (source.ROOT / code["file"]).read_text().splitlines()
        assert code["forward"].splitlines()[0].strip() == lines[code["line"] - 1].strip(), step.name
        for line in f"{code['forward']}\n{code['backward']}".splitlines():
            assert not line.strip() or any(line.strip() == there.strip() for there in lines), line


def test_the_tiny_model_learns_its_text_and_is_the_same_each_time():
    before, after = (record(s.config, s.params, s.tokens, s.targets).loss for s in (tiny(TEXT, 0), tiny(TEXT, 30)))
    assert after < before / 4
    one, two = tiny(TEXT, 5).params, tiny(TEXT, 5).params
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert sorted(tiny(TEXT, 30).snapshots) == list(range(0, 31, 3))
    assert sorted(tiny(TEXT, 3).snapshots) == [0, 1, 2, 3]


def test_dropout_is_the_runs_own():
    subject = tiny(TEXT, 3, dropout=0.2)
    data = report.build(subject)
    assert data["model"]["dropout"] == 0.2
    assert any(station["layer"] == "dropout" for station in data["stations"])
    assert "blocks.0.attn.heads>keep" in data["tensors"]
    assert data["checked"]["different"] == []


@pytest.fixture
def save(tmp_path):
    """Writes a model with a tokenizer of bytes; returns its path."""

    def save(config, change=lambda params: None):
        params = dict(GPT.seeded(config, 1).params)
        change(params)
        path = tmp_path / "model.safetensors"
        save_model(path, params, config, ByteTokenizer().spec())
        return path

    return save


def test_a_checkpoint_is_cut_to_what_a_page_can_show_and_says_so(save):
    config = GPTConfig(257, 64, 96, 6, 6, n_kv_heads=2, norm="rms_norm", mlp="swiglu", position="rope", bias=False)
    data = report.build(loaded(str(save(config)), "A longer model."))
    assert not data["complete"]
    assert "0, 1, 5" in data["notes"][0]
    (limit,) = map(int, re.findall(r"first (\d+) entries", data["notes"][1]))
    assert all(max(t["shown"], default=0) <= limit for t in data["tensors"].values())
    assert data["tensors"]["tok_emb.weight"]["shape"] == (257, 96)
    assert len(json.dumps(data)) < 5e6
    assert data["checked"]["different"] == []


@pytest.mark.parametrize("snapshots", [2, 12, 24])
def test_a_run_s_report_has_its_first_snapshot_and_ends_with_its_last_step(save, tmp_path, snapshots):
    one = save(GPTConfig(257, 16, 12, 1, 2)).read_bytes()
    run = tmp_path / "run"
    for folder, step in (("best-00000001", 1), (f"last-{5 * snapshots:08}", 5 * snapshots)):
        (run / folder).mkdir(parents=True)
        (run / folder / "model.safetensors").write_bytes(one)
        (run / folder / "trainer.json").write_text(json.dumps({"step": step}))
    for step in range(0, 5 * snapshots, 5):
        (run / f"step-{step:08}.safetensors").write_bytes(one)
    steps = list(loaded(str(run), "some text").snapshots)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 5 * snapshots)
    assert len(steps) == min(snapshots + 1, 11)
    (run / f"last-{5 * snapshots:08}").rename(tmp_path / "elsewhere")
    assert max(loaded(str(run), "some text").snapshots) == 5 * (snapshots - 1)


def test_a_text_beyond_the_context_is_refused(save):
    path = save(dataclasses.replace(PRESETS["bytes-tiny"], context_length=16))
    with pytest.raises(UserError, match=r"^text: 30 tokens, more than the model's context of 16$"):
        loaded(str(path), "x" * 30)
    loaded(str(path), "x" * 17)  # the last is a target


@pytest.mark.parametrize("text", ["", "x", "x" * (MOST_TOKENS + 2)])
def test_a_text_that_makes_no_page_is_refused(text):
    with pytest.raises(
        UserError, match=rf"^text: expected 2 to {MOST_TOKENS + 1} characters for a page, got {len(text)}$"
    ):
        tiny(text)


def test_a_model_that_diverged_is_refused(save):
    def break_it(params):
        params["blocks.1.mlp.up.weight"] = params["blocks.1.mlp.up.weight"].copy()
        params["blocks.1.mlp.up.weight"][3, 2] = np.inf

    with pytest.raises(UserError, match=r"model: .*: blocks.1.mlp.up.weight holds inf, as of a run that diverged$"):
        loaded(str(save(PRESETS["bytes-tiny"], break_it)), "some text")


def test_a_classifier_is_refused(save):
    with pytest.raises(UserError, match="tells classes"):
        loaded(str(save(GPTConfig(257, 64, 24, 2, 3, n_outputs=2))), "some text")


def test_a_model_too_large_is_refused_before_it_is_read(tmp_path):
    """The file is a header and a hole."""
    config = GPTConfig(257, 64, 2048, 12, 16)
    header, offset = {}, 0
    for name, shape in config.parameter_shapes().items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    small = tmp_path / "small.safetensors"
    save_model(small, GPT.seeded(PRESETS["bytes-tiny"], 1).params, PRESETS["bytes-tiny"], ByteTokenizer().spec())
    (length,) = struct.unpack("<Q", small.read_bytes()[:8])
    metadata = json.loads(small.read_bytes()[8 : 8 + length])["__metadata__"]
    metadata["config"] = json.dumps(config.to_dict())
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    with pytest.raises(
        UserError, match=r"has 605,\d\d\d,\d\d\d parameters, a report shows models of at most 400,000,000"
    ):
        loaded(str(path), "some text")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "x"], "error: text: expected 2 to 49 characters for a page, got 1"),
        (["--model", "nowhere"], "error: nowhere: no such file or folder"),
        (["--steps", "-1"], "error: steps: expected at least 0, got -1"),
        (["--dropout", "1"], "error: dropout: expected a rate, 0 <= rate < 1, got 1.0"),
        (["--out", "."], "error: out: . is a folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "gpt", "study", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=None)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
