"""The numbers of the section on attention, held against NumPy loops, PyTorch and the older capture."""

import base64
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpt.engine import create_engine
from gpt.parity.model import CONFIGS, batch, noise, parameters
from gpt.study.attention import capture
from gpt.study.heads import by_distance, heads, influence, laws, layers_that_fit, matrices, weights
from gpt.study.record import record
from reference import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator

T = 9
NAMES = ["tied", "untied", "llama"]


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(packed["shown"])


def recorded(name, dropout=True):
    config = CONFIGS[name]
    inputs, targets = (part[:1, :T] for part in batch(config))
    return record(config, parameters(config), inputs, targets, noise() if dropout else None)


@pytest.mark.parametrize("name", NAMES)
def test_the_matrices_are_those_of_the_formulas_written_out(name):
    recording = recorded(name)
    config = recording.config
    for layer in range(config.n_layers):
        found = matrices(recording, layer)
        step = recording.step(f"blocks.{layer}.attn.heads")
        q, k = step.arguments["q"][0], step.arguments["k"][0]
        for h in range(config.n_heads):
            scores = q[h] @ k[h * config.n_kv_heads // config.n_heads].T / np.sqrt(config.head_dim)
            np.testing.assert_allclose(found["scores"][h], scores, atol=1e-12)
            e = np.tril(np.exp(scores - scores.max()))
            np.testing.assert_allclose(found["p"][h], e / e.sum(axis=1, keepdims=True), atol=1e-12)
        kept = found["dropped"] != 0
        np.testing.assert_allclose(found["dropped"], found["p"] * kept / (1 - config.attn_dropout), rtol=1e-12)
        assert 0 < (kept & (found["p"] > 0)).sum() < (found["p"] > 0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_captured_from_an_engine(name):
    """The capture asks an engine for queries and keys; what was recorded is what attention itself kept."""
    recording = recorded(name, dropout=False)
    engine = create_engine("numpy", recording.config, parameters(recording.config), dtype="float64")
    maps = capture(engine, recording.tensors["tokens"][0])
    np.testing.assert_allclose(weights(recording), maps, atol=1e-14)


def test_the_sections_data_are_those_of_the_first_text_and_say_what_holds():
    recording = recorded("tied")
    data = heads(recording, list("abcdefghij"))
    p = weights(recording)
    np.testing.assert_array_equal(unpack(data["matrices"]["p"]), p)
    assert data["labels"] == list("abcdefghi")
    assert data["layers"] == [0, 1]
    assert data["note"] == ""
    assert data["rate"] == recording.config.attn_dropout
    assert [law["passed"] for law in data["laws"]] == [True] * 3
    assert data["ahead"]["masked"] == 0
    assert data["ahead"]["unmasked"] > 0.01
    np.testing.assert_allclose(unpack(data["uniform"])[[0, -1]], [np.mean(1 / np.arange(1, T + 1)), 1 / T])
    assert set(heads(recorded("tied", dropout=False), list("abcdefghij"))["matrices"]) == {"scores", "p"}


def test_of_many_layers_as_many_are_sent_as_there_is_room_for():
    config = PRESETS["bytes-tiny"].replace(n_layers=6)
    params = {name: array.astype(np.float64) for name, array in initialize(config, Generator(1)).items()}
    recording = record(config, params, np.arange(5)[None], np.arange(5)[None])
    data = heads(recording, list("abcdef"), most=3 * config.n_heads * 25 * 2)
    assert data["layers"] == [0, 2, 5]
    assert data["note"] == "Of 6 layers, 0, 2, 5 are shown here."
    np.testing.assert_array_equal(unpack(data["matrices"]["p"]), weights(recording)[[0, 2, 5]])
    assert unpack(data["by_distance"]).shape == (6, config.n_heads, 5)


@given(st.integers(1, 100), st.integers(1, 10**6), st.integers(0, 10**7))
def test_layers_that_fit_do_and_reach_from_the_first_to_the_last(n_layers, numbers, most):
    layers = layers_that_fit(n_layers, numbers, most)
    assert layers == sorted(set(layers))
    assert layers[0] == 0
    assert len(layers) == 1 or (layers[-1] == n_layers - 1 and len(layers) * numbers <= most)
    assert len(layers) == n_layers or (len(layers) + 1) * numbers > most


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 7)), elements=st.floats(0, 1)))
def test_by_distance_is_the_mean_of_each_diagonal(rows):
    T = rows.shape[1]
    p = np.stack([np.multiply.outer(row, np.arange(1, T + 1)) + np.arange(T) for row in rows])
    expected = [[np.mean([one[t, t - d] for t in range(d, T)]) for d in range(T)] for one in p]
    np.testing.assert_allclose(by_distance(p), expected, rtol=1e-12)


def test_a_head_that_always_looks_back_by_two_is_seen_to():
    p = np.eye(8, k=-2)
    p[[0, 1], [0, 1]] = 1
    assert by_distance(p)[2] == 1
    assert by_distance(p)[[1, 3, 4, 5, 6, 7]].max() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_influence_is_what_pytorchs_attention_moves_by(name, causal):
    torch = pytest.importorskip("torch")
    recording = recorded(name, dropout=False)
    step = recording.step("blocks.1.attn.heads")
    moved = influence(step, causal)
    q, k, v = (torch.tensor(np.ascontiguousarray(step.arguments[part])) for part in "qkv")
    attend = torch.nn.functional.scaled_dot_product_attention
    y = attend(q, k, v, is_causal=causal, enable_gqa=True)
    for s in range(T):
        changed = [part.clone() for part in (k, v)]
        for part in changed:
            part[:, :, s] *= -1
        theirs = (attend(q, *changed, is_causal=causal, enable_gqa=True) - y).abs().amax(dim=(0, 1, 3)).numpy()
        np.testing.assert_allclose(moved[:, s], theirs, atol=1e-12)
    if causal:
        assert not np.triu(moved, 1).any()
    else:
        assert (np.triu(moved, 1)[np.triu_indices(T, 1)] > 0).all()


def test_a_matrix_that_breaks_a_law_is_told():
    p = np.tril(np.ones((2, 3, 4, 4)))
    p /= p.sum(axis=-1, keepdims=True)
    assert [law["passed"] for law in laws(p)] == [True, True, True]
    for index, value, broken in (((1, 2, 3, 0), 0.5, 0), ((0, 1, 2, 3), 1e-30, 1), ((1, 0, 0, 0), 0.999, 2)):
        wrong = p.copy()
        wrong[index] = value
        found = laws(wrong)
        assert not found[broken]["passed"]
        assert found[broken]["error"] > 0


def test_dropout_that_is_off_in_attention_leaves_no_matrix_of_it():
    config = dataclasses.replace(CONFIGS["tied"], attn_dropout=0.0)
    inputs, targets = (part[:1, :T] for part in batch(config))
    data = heads(record(config, parameters(config), inputs, targets, noise()), list("abcdefghij"))
    assert "dropped" not in data["matrices"]
    assert data["rate"] == 0
