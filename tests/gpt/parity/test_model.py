"""The two engines side by side: hundreds of steps in lockstep, and the first tensor named where they part."""

import numpy as np
import pytest

from gpt.parity import check
from gpt.parity import model as parity
from reference import attention, layer_norm, optim

pytest.importorskip("torch")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.mark.parametrize("dtype", parity.LOCKSTEP)
@pytest.mark.parametrize("name", parity.CONFIGS)
def test_engines_stay_together_for_hundreds_of_steps_with_dropout(name, dtype):
    """One model for 300 steps; the others, for what they are made of, for the 100 that `twingrad check` takes."""
    steps = 300 if name == "untied" else 100
    results = list(parity.lockstep(name, dtype, steps=steps))
    assert [result.case for result in results] == [f"{steps} steps"]
    assert results[0].passed, results[0]


def test_there_is_something_to_stay_together_on():
    """The loss falls, gradients are clipped, and a step's dropout is not the last step's."""
    engine, _ = parity.engines("tied", "float64")
    losses = [parity._step(engine, step)[0] for step in range(300)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert parity._step(engine, 300)[1] > parity.MAX_NORM


def test_where_engines_part_the_first_tensor_in_execution_order_is_named(monkeypatch):
    sound = layer_norm.forward

    def off_in_one_norm(x, weight, bias, eps):
        y, saved = sound(x, weight, bias, eps)
        return (y * (1 + 1e-9) if weight is norms["blocks.1.norm2.weight"] else y), saved

    both = parity.engines("untied", "float64")
    norms = both[0].parameters()
    monkeypatch.setattr(layer_norm, "forward", off_in_one_norm)
    note = parity.first_difference("untied", both, 0, 1e-12)
    assert note.startswith("first differs blocks.1.norm2, by 1e-09")


def test_a_difference_on_the_way_back_is_named_as_such(monkeypatch):
    sound = attention.backward

    def doubled_dk(dy, saved):
        dq, dk, dv = sound(dy, saved)
        return dq, 2 * dk, dv

    monkeypatch.setattr(attention, "backward", doubled_dk)
    failed = [result.tensor for result in parity.trace("tied") if not result.passed]
    assert failed[0] == "d.blocks.1.attn.key"


def test_a_wrong_optimizer_is_named_by_the_parameter_it_updated(monkeypatch):
    class Wrong(optim.AdamW):
        def step(self, grads, lr=None, scale=1.0):
            super().step(grads, 1.01 * lr, scale)

    monkeypatch.setattr(optim, "AdamW", Wrong)
    results = list(parity.lockstep("tied", "float64", steps=10))
    assert [(result.case, result.passed) for result in results] == [("step 1", False)]
    assert "first differs parameter tok_emb.weight" in results[0].note
    assert "updated in step 0" in results[0].note


def test_traces_that_name_other_tensors_are_a_failure():
    ours, theirs = parity.engines("tied", "float64")

    class Renamed:
        name = "torch"

        def trace(self, batch, trace, noise=None):
            theirs.trace(batch, lambda name, y: trace(name.replace("shortcut1", "shortcut"), y), noise)

    results = list(parity.compare_traces("tied", "trace", (ours, Renamed()), parity.batch(ours.config), None, 1e-12))
    assert results[-1].tensor == "blocks.0.shortcut1"
    assert not results[-1].passed
    assert "the torch engine has blocks.0.shortcut here" in str(results[-1])


def test_the_key_s_bias_is_measured_by_name_and_its_gradient_is_zero():
    by_name = {result.tensor: result for result in parity.gradients("tied")}
    for tensor, result in by_name.items():
        assert (result.note == parity.KEY_BIAS_NOTE) == tensor.endswith(parity.KEY_BIAS)
    engine, _ = parity.engines("tied", "float64")
    engine.accumulate(parity.batch(engine.config), noise=parity.noise())
    gradients = engine.gradients()
    for i in range(2):
        bias, weight = (gradients[f"blocks.{i}.attn.key.{part}"] for part in ("bias", "weight"))
        assert 0 < np.abs(bias).max() < 1e-14 * np.abs(weight).max() * 100


def test_another_key_bias_changes_no_loss():
    """Why it may part: it has no effect."""
    engine, _ = parity.engines("tied", "float64")
    batch, before = parity.batch(engine.config), engine.loss(parity.batch(engine.config))
    params = {name: value + 3.0 * name.endswith(parity.KEY_BIAS) for name, value in engine.parameters().items()}
    engine.load_parameters(params)
    assert engine.loss(batch) == pytest.approx(before, rel=1e-13)
