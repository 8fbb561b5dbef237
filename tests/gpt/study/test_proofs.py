"""Differences of the whole loss agree with the gradients by hand, and with nothing else."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.parity import model as parity
from gpt.study.proofs import FEWEST, derivative, proofs_of
from reference import cross_entropy, model
from tests.gpt.study.passes import checked_pass, fresh_pass, small_config, tiny_pass


def all_of(found):
    return [(name, proof) for name, proofs in found.items() for proof in proofs]


@pytest.mark.parametrize("name", ["tied", "llama", "classifier"])
def test_they_hold_of_the_checkers_models(name):
    recording, _ = checked_pass(name)
    found = proofs_of(recording, per_tensor=1)
    assert list(found) == [step.name for step in recording.steps]
    for step in recording.steps:
        proved = {proof["tensor"] for proof in found[step.name]}
        assert proved == {argument for argument, gradient in step.gradients.items() if gradient is not None}
    for _, proof in all_of(found):
        assert proof["error"] <= proof["bound"] == parity.DIFFERENCES


def test_what_is_shown_are_the_pass_own_gradients():
    recording, noise = tiny_pass(0.1)
    params = {name: recording.tensors[name] for name in recording.config.parameter_shapes()}

    def loss(name, value):
        logits, _ = model.forward({**params, name: value}, recording.config, recording.tensors["tokens"], noise)
        return float(cross_entropy.forward(logits, recording.tensors["targets"])[0])

    for station, proof in all_of(proofs_of(recording)):
        of = recording.step(station).operation.tensors[proof["tensor"]]
        index = tuple(proof["index"])
        assert proof["by_hand"] == recording.gradients[of][index]
        if of in params:
            x, step = params[of], np.zeros_like(params[of])
            step[index] = 1e-4
            plain = (loss(of, x + step) - loss(of, x - step)) / 2e-4
            assert proof["differences"] == pytest.approx(plain, abs=1e-7)


def test_small_gradients_are_proved_where_one_central_difference_is_not_enough():
    """With GPT-2's first weights a query's gradient is so small beside the loss that rounding hides it."""
    recording = fresh_pass(small_config(emb_dim=24, vocab_size=50), length=24)
    errors = {
        recording.step(station).operation.tensors[proof["tensor"]]: proof["error"]
        for station, proof in all_of(proofs_of(recording, per_tensor=1))
    }
    assert max(errors.values()) <= 1e-7
    worst = 0.0
    for name in (f"blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("query", "key")):
        x, gradient = recording.tensors[name], recording.gradients[name]
        step = np.where(np.abs(gradient) == np.abs(gradient).max(), 1e-5 * np.abs(x).max(), 0.0)
        plain = (recording.loss_with(name, x + step) - recording.loss_with(name, x - step)) / (2 * step.max())
        worst = max(worst, abs(abs(plain) - np.abs(gradient).max()) / np.abs(gradient).max())
    assert worst > 1e-7


@pytest.mark.parametrize("factor", [1 + 1e-5, -1.0, 0.0])
def test_a_wrong_gradient_is_not_proved(factor):
    recording, _ = tiny_pass()
    name = "blocks.1.mlp.up.weight"
    wrong = dataclasses.replace(
        recording, gradients={**recording.gradients, name: factor * recording.gradients[name] + (factor == 0)}
    )
    found = all_of(proofs_of(wrong))
    assert {station for station, proof in found if proof["error"] > proof["bound"]} == {"blocks.1.mlp.up"}


def test_the_seed_says_which_elements():
    recording, _ = tiny_pass()
    first, same, other = (
        [proof["index"] for _, proof in all_of(proofs_of(recording, seed=seed))] for seed in (3, 3, 4)
    )
    assert first == same != other


def test_of_a_large_model_a_few_tensors_are_proved():
    recording, _ = tiny_pass()
    found = [
        (recording.step(station).operation.tensors[proof["tensor"]], tuple(proof["index"]))
        for station, proof in all_of(proofs_of(recording, budget=0))
    ]
    assert len(set(found)) == FEWEST


@given(st.floats(-3, 3), st.floats(0.2, 4), st.floats(0.001, 10))
def test_the_derivative_of_what_has_a_known_one(x, frequency, step):
    measured = derivative(lambda h: math.sin(frequency * (x + h)), min(step, 0.5 / frequency), 1.0)
    assert measured == pytest.approx(frequency * math.cos(frequency * x), abs=2e-9 * frequency)
    assert derivative(lambda h: 3.0, step, 3.0) == 0


def test_a_derivative_that_is_sharp_beside_the_first_step():
    """The first differences say nothing: those that agree with each other are of smaller steps."""
    assert derivative(lambda h: math.tanh(3e3 * h + 0.5), 0.02, 1.0) == pytest.approx(
        3e3 / math.cosh(0.5) ** 2, rel=1e-6
    )
