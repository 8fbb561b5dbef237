"""The laws hold of sound passes whatever the model is, and a mistake breaks the one that it must."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.parity import model as parity
from gpt.study.laws import laws_of
from gpt.study.record import record
from tests.gpt.study.passes import checked_pass, defect_named, fresh_pass, small_config, tiny_pass


def failed(found):
    return {(name, entry["name"]) for name, entries in found.items() for entry in entries if not entry["passed"]}


@pytest.mark.parametrize("name", parity.CONFIGS)
def test_they_hold_of_every_operation_of_the_checkers_models(name):
    recording, noise = checked_pass(name)
    found = laws_of(recording, noise)
    assert list(found) == [step.name for step in recording.steps]
    assert all(found.values())
    assert failed(found) == set()
    for entry in (entry for entries in found.values() for entry in entries):
        assert 0 <= entry["error"] <= entry["bound"] <= 1e-7
        assert entry["doc"].endswith(".")
        assert "\n" not in entry["doc"]


@given(
    st.fixed_dictionaries(
        {
            "n_layers": st.integers(1, 2),
            "heads": st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
            "head_dim": st.sampled_from([2, 4, 6]),
            "norm": st.sampled_from(["layer_norm", "rms_norm"]),
            "mlp": st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
            "position": st.sampled_from(["learned", "rope"]),
            "qkv_bias": st.booleans(),
            "bias": st.booleans(),
            "tie_embeddings": st.booleans(),
        }
    ),
    st.integers(1, 9),
    st.integers(0, 100),
)
@settings(max_examples=30)
def test_they_hold_of_any_model_at_its_first_weights(settings, length, seed):
    n_heads, n_kv_heads = settings.pop("heads")
    config = small_config(n_heads=n_heads, n_kv_heads=n_kv_heads, **settings)
    assert failed(laws_of(fresh_pass(config, seed, length))) == set()


def test_each_is_measured_where_it_holds():
    recording, noise = tiny_pass(0.1)
    names = {name: {entry["name"] for entry in entries} for name, entries in laws_of(recording, noise).items()}
    assert all("<dy, J v>" in found for found in names.values())
    attention = {"rows of p sum to 1", "p of later keys", "rows of dscores sum to 0", "dk summed over keys"}
    assert attention < names["blocks.1.attn.heads"]
    assert "gradient of the key's bias" in names["blocks.0.attn.key"]
    assert "gradient of the key's bias" not in names["blocks.0.attn.query"]
    assert {"dx summed over a row", "dx along x-hat"} < names["blocks.0.norm1"]
    assert {"y(x) - y(-x)", "dx(x) + dx(-x)"} < names["blocks.0.mlp.act"]
    assert "dx where y was dropped" in names["emb.dropout"]
    assert {"logits before an exchanged token", "dweight summed over the vocabulary"} < names["head"]
    assert "gradients of head and embedding added up" in names["tok_emb"]
    assert "dlogits summed over a row" in names["loss"]
    llama, noise = checked_pass("llama")
    names = {name: {entry["name"] for entry in entries} for name, entries in laws_of(llama, noise).items()}
    assert {"length of each pair", "q k, moved on"} < names["blocks.0.attn.key.rope"]
    assert "dx along x" in names["final_norm"]
    assert "y(gate) - y(-gate)" in names["blocks.1.mlp.act"]


def test_turned_keys_have_a_bias_whose_gradient_is_not_0():
    """Each key is turned by another angle, so that what a bias adds is not the same for all."""
    recording = fresh_pass(small_config(position="rope", qkv_bias=True))
    bias, weight = (recording.gradients[f"blocks.0.attn.key.{kind}"] for kind in ("bias", "weight"))
    assert np.abs(bias).max() > 1e-6 * np.abs(weight).max()
    assert "gradient of the key's bias" not in {entry["name"] for entry in laws_of(recording)["blocks.0.attn.key"]}


@pytest.mark.parametrize(
    "defect, expected",
    [
        ("softmax backward without its row sum", ("blocks.0.attn.heads", "dk summed over keys")),
        ("softmax backward without its row sum", ("blocks.1.attn.key", "gradient of the key's bias")),
        ("mask shows one future key", ("blocks.0.attn.heads", "p of later keys")),
        ("mask shows one future key", ("head", "logits before an exchanged token")),
        ("layer norm without its mean term", ("blocks.0.norm1", "dx summed over a row")),
        ("layer norm without its variance term", ("final_norm", "dx along x-hat")),
        ("target off by one", ("loss", "<dy, J v>")),
        ("tied head counted once", ("tok_emb", "gradients of head and embedding added up")),
        ("gradient of q not scaled", ("blocks.1.attn.heads", "<dy, J v>")),
    ],
)
def test_a_mistake_breaks_a_law(defect, expected):
    sound, _ = tiny_pass()
    params = {name: sound.tensors[name] for name in sound.config.parameter_shapes()}
    with defect_named(defect).seeded():
        recording = record(sound.config, params, sound.tensors["tokens"], sound.tensors["targets"])
        found = laws_of(recording)
    assert expected in failed(found)
    assert failed(laws_of(sound)) == set()


def test_what_is_no_number_has_not_passed():
    recording, _ = tiny_pass()
    params = {name: recording.tensors[name].copy() for name in recording.config.parameter_shapes()}
    params["blocks.1.mlp.up.weight"][0, 0] = np.nan
    broken = record(recording.config, params, recording.tensors["tokens"], recording.tensors["targets"])
    entry = next(entry for entry in laws_of(broken)["blocks.1.mlp.up"] if entry["name"] == "<dy, J v>")
    assert entry["error"] is None
    assert not entry["passed"]
