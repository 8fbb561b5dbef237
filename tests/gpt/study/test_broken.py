"""What is said of each known mistake is what it does to the engine, and the reference is sound again afterwards."""

import base64
import dataclasses
import inspect

import numpy as np
import pytest

from gpt.engine import Batch, OptimizerConfig, create_engine
from gpt.parity import model as parity
from gpt.parity.defects import DEFECTS
from gpt.study import broken
from gpt.study.broken import broken_of
from gpt.study.record import differences_to_model
from tests.gpt.study.passes import checked_pass, defect_named, tiny_pass


@pytest.fixture(scope="module")
def found():
    return broken_of(*tiny_pass())


def seen(recording, noise):
    """All tensors and gradients of a pass, from the engine."""
    config, tensors = recording.config, recording.tensors
    params = {name: tensors[name] for name in config.parameter_shapes()}
    engine = create_engine("numpy", config, params, OptimizerConfig(trained=("*",)), "float64")
    batch, arrays = Batch(tensors["tokens"], tensors["targets"]), {}
    engine.trace(batch, lambda name, x: arrays.update({name: np.array(x)}), noise)
    engine.accumulate(batch, noise=noise)
    return arrays | {f"d.{name}": gradient.copy() for name, gradient in engine.gradients().items()}


@pytest.mark.parametrize("name", ["tiny", "tied", "llama", "adapted"])
def test_the_first_tensor_to_go_wrong_is_the_first_that_the_engine_computes_otherwise(name):
    recording, noise = tiny_pass(0.1) if name == "tiny" else checked_pass(name)
    data = broken_of(recording, noise)
    sound = seen(recording, noise)
    assert set(data["names"]) == set(sound)
    assert len(data["defects"]) > 20
    for entry in data["defects"][::3]:
        with defect_named(entry["name"]).seeded(), np.errstate(all="ignore"):
            wrong = seen(recording, noise)
        position = data["names"].index(entry["first"])
        for k, tensor in enumerate(data["names"]):
            largest = np.abs(sound[tensor]).max() or 1.0
            error = np.abs(wrong[tensor] - sound[tensor]).max() / largest
            if tensor.endswith(parity.KEY_BIAS):
                continue
            if k < position:
                assert error <= 1e-12, (entry["name"], tensor)
            if np.isfinite(error):
                assert entry["errors"][k] == pytest.approx(error, rel=1e-3, abs=1e-13), (entry["name"], tensor)
        assert not entry["errors"][position] <= 1e-12
        assert entry["loss"] == pytest.approx(float(wrong["loss"]), rel=1e-12)
        at = entry["map"]
        part = np.frombuffer(base64.b64decode(at["data"])).reshape(at["shown"])
        table = np.atleast_2d((wrong[entry["first"]] - sound[entry["first"]])[tuple(at["index"])])
        (r, c), (rows, columns) = at["starts"], at["shown"]
        np.testing.assert_allclose(part, table[r : r + rows, c : c + columns], rtol=1e-12)
        assert np.nanmax(np.abs(part)) == pytest.approx(
            np.nanmax(np.abs(wrong[entry["first"]] - sound[entry["first"]]))
        )


@pytest.mark.parametrize(
    "defect, tensor",
    [
        ("forgotten residual, forward", "blocks.0.shortcut1"),
        ("scores not scaled", "blocks.0.attn.heads"),
        ("variance over C - 1", "blocks.0.norm1"),
        ("target off by one", "d.head"),
        ("key's share of dx forgotten", "d.blocks.1.norm1"),
        ("layer norm without its mean term", "d.blocks.1.shortcut2"),
        ("bias gradient not summed over one axis", "d.blocks.1.mlp.down.bias"),
    ],
)
def test_known_mistakes_show_where_they_are_made(found, defect, tensor):
    assert next(entry for entry in found["defects"] if entry["name"] == defect)["first"] == tensor


def test_a_tied_head_counted_once_spoils_one_gradient_alone(found):
    entry = next(entry for entry in found["defects"] if entry["name"] == "tied head counted once")
    wrong = [name for name, error in zip(found["names"], entry["errors"], strict=True) if error > 1e-12]
    assert wrong == ["d.tok_emb.weight"]
    assert entry["loss"] == found["loss"]


def test_each_mistake_in_the_reference_is_offered_or_said_why_not(found):
    listed = [entry["name"] for entry in (*found["defects"], *found["others"])]
    assert sorted(listed) == sorted(defect.name for defect in DEFECTS if not defect.module.startswith("kernels."))
    why = {entry["name"]: entry["why"] for entry in found["others"]}
    assert why["gradient turned on instead of back"] == "reference/rope.py plays no part in this pass"
    assert why["attention dropout not in dp"] == "it changes no number of this pass; it shows in attention-dropout"
    with_dropout = {entry["name"] for entry in broken_of(*tiny_pass(0.1))["defects"]}
    assert "attention dropout not in dp" in with_dropout
    assert "gradient turned on instead of back" in {
        entry["name"] for entry in broken_of(*checked_pass("llama"))["defects"]
    }


def test_loose_tests_let_some_of_them_pass(found):
    noticed = {entry["name"]: entry["noticed"] for entry in found["defects"]}
    assert not noticed["layer norm right only at weight 1"]["small"]  # where all weights of norms are 1
    assert not noticed["bias left out"]["small"]  # where all are 0
    assert not noticed["two digits of GELU's constant swapped"]["alone"]
    assert noticed["forgotten residual, forward"]["small"]
    assert not any(entry["shapes"] for entry in noticed.values())


def test_the_lines_shown_are_those_of_the_source(found):
    for entry in found["defects"]:
        defect = defect_named(entry["name"])
        lines = inspect.getsource(defect._module()).splitlines()
        removed = [line for sign, line in entry["diff"] if sign == "-"]
        added = [line for sign, line in entry["diff"] if sign == "+"]
        altered = lines[: entry["line"] - 1] + added + lines[entry["line"] - 1 + len(removed) :]
        assert lines[entry["line"] - 1 : entry["line"] - 1 + len(removed)] == removed
        assert altered == defect.altered_source().splitlines()


def test_the_reference_is_sound_afterwards(found):
    assert found["defects"]
    assert differences_to_model(tiny_pass()[0])[1] == []


def test_a_model_too_large_is_left_alone(monkeypatch):
    recording, noise = tiny_pass()
    monkeypatch.setattr(broken, "trace_model", None)
    data = broken_of(recording, noise, budget=0)
    assert data["defects"] == []
    assert f"{recording.config.n_parameters:,} parameters" in data["why"]


def test_a_mistake_that_stops_the_pass_is_said_to(monkeypatch):
    stops = dataclasses.replace(DEFECTS[0], new="np.matmul(dy_rows, x_rows)", name="no transpose")
    monkeypatch.setattr(broken, "DEFECTS", (stops,))
    data = broken_of(*tiny_pass())
    assert data["defects"] == []
    assert data["others"][0]["why"].startswith("it stops the pass: matmul")


def test_another_shape_is_noticed_by_who_looks_at_shapes(monkeypatch):
    other = dataclasses.replace(DEFECTS[0], old="pieces.sum_rows(dy_rows)", new="pieces.sum_rows(dy_rows)[None]")
    monkeypatch.setattr(broken, "DEFECTS", (other,))
    (entry,) = broken_of(*tiny_pass())["defects"]
    assert entry["noticed"]["shapes"]
    assert entry["map"] is None
    assert entry["first"] == "d.blocks.1.mlp.down.bias"
