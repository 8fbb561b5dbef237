"""A pass as a list of operations: the engine's, bit for bit, and each one's numbers what the loss says they are."""

import numpy as np
import pytest

from gpt.parity import model as parity
from gpt.study.record import Step, differences_to_model, record
from reference.gradcheck import numeric_gradient


@pytest.fixture(scope="module", params=parity.CONFIGS)
def recording(request):
    config = parity.CONFIGS[request.param]
    batch = parity.batch(config)
    return record(config, parity.parameters(config), batch.inputs, batch.targets, parity.noise())


def test_every_tensor_has_the_models_bits(recording):
    compared, different = differences_to_model(recording, parity.noise())
    assert different == []
    assert compared > 2 * len(recording.config.parameter_shapes())


def test_another_pass_is_told_apart(recording):
    """Without dropout the model's tensors are others, from the first mask on."""
    _, different = differences_to_model(recording, None)
    assert "loss" in different
    assert "tok_emb" not in different


def test_gradients_add_up(recording):
    """A tensor's gradient is the sum of what the operations that use it pass on."""
    several = 0
    for name, parts in recording.contributions.items():
        total = sum(gradient for _, _, gradient in parts)
        np.testing.assert_allclose(recording.gradients[name], total, rtol=1e-10, atol=1e-14)
        several += len(parts) > 1
        assert all(recording.step(station).operation.tensors[argument] == name for station, argument, _ in parts)
    assert several > recording.config.n_layers  # each block has two shortcuts, and a norm that three layers read


def test_the_loss_with_another_tensor_gives_its_gradient(recording):
    """Central differences of the recomputed loss, of inner tensors and of parameters, at their largest gradient."""
    rng = np.random.default_rng(0)
    names = [n for n, g in recording.gradients.items() if recording.tensors[n].dtype.kind == "f" and n != "loss"]
    for name in rng.choice(names, min(14, len(names)), replace=False):
        gradient, tensor = recording.gradients[name], recording.tensors[name]
        index = tuple(map(int, np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)))
        true = numeric_gradient(lambda x, name=name: recording.loss_with(name, x), tensor, 1e-5, [index])[index]
        assert abs(gradient[index] - true) <= 1e-6 * max(1e-3, float(np.abs(gradient).max())), name


def test_the_loss_with_a_tensor_as_it_was_is_the_loss(recording):
    for name in ("blocks.0.norm1", "head", "final_norm.weight", "loss"):
        assert recording.loss_with(name, recording.tensors[name]) == recording.loss


def test_every_steps_equations_give_the_steps_numbers(recording):
    for step in recording.steps:
        true = {step.result: step.y, **{f"d{argument}": g for argument, g in step.gradients.items()}}
        given = {f"d{step.result}": step.dy, **{name: np.full_like(array, np.nan) for name, array in true.items()}}
        found = step.derivation.evaluate(step.arguments, given)
        for name, array in true.items():
            size = max(1e-30, float(np.abs(array).max()), float(np.abs(step.dy).max()) * (name != step.result))
            assert np.abs(found[name] - array).max() <= 1e-12 * size, (step.name, name)


def test_values_are_the_layers_own_where_it_returns_them(recording):
    step = recording.step("blocks.0.attn.heads")
    assert isinstance(step, Step)
    assert step.values["y"] is step.y
    assert step.values["dq"] is step.gradients["q"]
    with pytest.raises(KeyError):
        recording.step("blocks.9")
