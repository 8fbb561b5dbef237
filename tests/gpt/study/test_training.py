"""The numbers of the section on training, of a model that learns to copy, held against PyTorch and the trainer."""

import base64

import numpy as np
import pytest

from gpt.engine import IGNORE, Batch, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.study.attention import capture
from gpt.study.record import record
from gpt.study.training import gradient_norms, predictions, training
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

LENGTH = 6  # of a text that is then said again
CONFIG = GPTConfig(10, 2 * LENGTH, 32, 1, 2, qkv_bias=True, tie_embeddings=True)
KEPT = (0, 100, 200, 400)


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(packed["shown"])


def copies(rng, rows=32):
    """Random tokens and the same again: in the second half the next token stands LENGTH - 1 tokens back."""
    first = rng.integers(0, CONFIG.vocab_size, (rows, LENGTH))
    tokens = np.concatenate([first, first], axis=1)
    targets = tokens[:, 1:].copy()
    targets[:, : LENGTH - 1] = IGNORE
    return Batch(tokens[:, :-1], targets)


@pytest.fixture(scope="module")
def snapshots():
    """The parameters while the model learns to copy."""
    start = initialize(CONFIG, Generator(1), "gpt2")
    engine = create_engine("numpy", CONFIG, start, OptimizerConfig(weight_decay=0), "float64")
    rng, kept = np.random.default_rng(0), {}
    for step in range(KEPT[-1] + 1):
        if step in KEPT:
            kept[step] = {name: array.copy() for name, array in engine.parameters().items()}
        engine.accumulate(copies(rng))
        engine.step(3e-3, max_norm=1.0)
    return kept


@pytest.fixture(scope="module")
def text():
    first = np.random.default_rng(9).permutation(CONFIG.vocab_size)[:LENGTH]
    tokens = np.concatenate([first, first])[None]
    targets = tokens[:, 1:].copy()
    targets[:, : LENGTH - 1] = IGNORE
    return tokens[:, :-1], targets


@pytest.fixture(scope="module")
def data(snapshots, text):
    labels = [str(token) for token in text[0][0]] + ["end"]
    return training(CONFIG, list(snapshots.items())[::-1], *text, labels, "<{}>".format, [(0, 2.5), (1, 2.25)])


def test_there_is_a_frame_for_each_snapshot_in_order(data, text):
    T = text[0].shape[1]
    assert data["steps"] == list(KEPT)
    assert unpack(data["attention"]).shape == (4, 1, 2, T, T)
    assert unpack(data["norms"]).shape == (4, len(CONFIG.parameter_shapes()))
    assert unpack(data["probabilities"]).shape == unpack(data["target_probabilities"]).shape == (4, T)
    assert len(data["said"]) == len(data["losses"]) == len(data["global_norms"]) == 4
    assert data["curve"] == [[0, 2.5], [1, 2.25]]
    assert data["labels"] == [str(token) for token in text[0][0]]


def test_in_every_frame_rows_sum_to_1_and_nothing_is_seen_ahead(data):
    maps = unpack(data["attention"])
    np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-12)
    assert not np.triu(maps, 1).any()
    assert (maps[..., 0, 0] == 1).all()


def test_the_pair_that_must_be_found_is_looked_at_more_and_more(data):
    """In the head that learns it, the next token's place stands out; at first it does not."""
    maps = unpack(data["attention"])
    tracked = np.mean([maps[:, 0, :, t, t + 1 - LENGTH] for t in range(LENGTH, 2 * LENGTH - 1)], axis=0).max(axis=-1)
    assert tracked[0] < 0.2
    assert tracked[-1] > 0.7
    assert (np.diff(tracked) > -0.05).all()


@pytest.mark.parametrize("step", KEPT)
def test_each_frame_is_what_pytorch_finds_for_its_parameters(data, snapshots, text, step):
    pytest.importorskip("torch")
    i = KEPT.index(step)
    engine = create_engine("torch", CONFIG, snapshots[step], dtype="float64", device="cpu")
    batch = Batch(*text)
    np.testing.assert_allclose(data["losses"][i], engine.loss(batch), rtol=1e-12)
    np.testing.assert_allclose(unpack(data["attention"])[i], capture(engine, text[0][0]), atol=1e-12)
    engine.accumulate(batch)
    theirs = engine.gradients()
    np.testing.assert_allclose(data["global_norms"][i], engine.gradient_norm(), rtol=1e-10)
    for name, norm in zip(data["parameters"], unpack(data["norms"])[i], strict=True):
        np.testing.assert_allclose(norm, np.linalg.norm(theirs[name]), rtol=1e-8, atol=1e-12)

    scored = engine.token_logps(batch)
    right = unpack(data["target_probabilities"])[i]
    assert np.isnan(right[: LENGTH - 1]).all()
    np.testing.assert_allclose(right[LENGTH - 1 :], np.exp(scored.logps[0, LENGTH - 1 :]), rtol=1e-10)
    hits = [said == target for said, target in zip(data["said"][i], data["targets"], strict=True)]
    np.testing.assert_array_equal(hits, scored.best[0])
    last = engine.logits(text[0])[0]
    assert data["said"][i][-1] == f"<{last.argmax()}>"
    np.testing.assert_allclose(unpack(data["probabilities"])[i, -1], 1 / np.exp(last - last.max()).sum(), rtol=1e-10)


def test_what_it_says_becomes_right(data):
    counted = [t for t, target in enumerate(data["targets"]) if target]
    right = [[said[t] == data["targets"][t] for t in counted] for said in data["said"]]
    assert counted == list(range(LENGTH - 1, 2 * LENGTH - 1))
    assert sum(right[0]) < 4
    assert sum(right[-1]) >= 5
    assert data["losses"][-1] < 0.5 < 2 < data["losses"][0]


def test_norms_are_of_every_parameter_and_only_of_these(snapshots, text):
    recording = record(CONFIG, snapshots[100], *text)
    norms = gradient_norms(recording)
    assert list(norms) == list(CONFIG.parameter_shapes())
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, np.sqrt(np.sum(recording.gradients[name] ** 2)), rtol=1e-12)


def test_huge_logits_give_probabilities_and_no_warning(snapshots, text):
    params = {name: array * (1e4 if name == "final_norm.weight" else 1) for name, array in snapshots[400].items()}
    with np.errstate(all="raise", under="ignore"):
        recording = record(CONFIG, params, *text)
        _, top, right = predictions(recording)
    assert ((top > 0) & (top <= 1)).all()
    assert (right[LENGTH - 1 :] <= top[LENGTH - 1 :]).all()


def test_without_a_snapshot_it_is_said_how_to_get_some(text):
    with pytest.raises(UserError, match="expected at least one, got none; train with --study-every N"):
        training(CONFIG, [], *text, list("abcdefghijkl"), str)


def test_where_there_is_no_room_some_layers_are_left_out(text):
    config = CONFIG.replace(n_layers=4)
    params = {name: array.astype(np.float64) for name, array in initialize(config, Generator(1)).items()}
    T = text[0].shape[1]
    data = training(config, [(0, params), (9, params)], *text, list("abcdefghijkl"), str, most=2 * 2 * T * T * 2 + 1)
    assert data["layers"] == [0, 3]
    assert unpack(data["attention"]).shape == (2, 2, 2, T, T)
    assert data["note"] == "Of 4 layers, 0, 3 are shown here."
