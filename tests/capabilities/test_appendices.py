"""Appendices A and D of the book: arrays, gradients by hand, a toy problem, devices, clipping, weight decay."""

import numpy as np
import pytest

from gpt.engine import Batch, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.generate import sample_probabilities
from gpt.train.schedule import warmup_cosine
from reference import GPTConfig, cross_entropy, linear
from reference.gradcheck import numeric_gradient
from reference.init import initialize
from reference.optim import clip_scale, global_norm
from reference.torch_rng import Generator
from tests.figures import engines
from tests.figures.appendices import X_TRAIN, Y_TRAIN, perceptron, toy_training

TINY = GPTConfig(31, 8, 24, 2, 3)


@pytest.fixture(params=["numpy", "torch"])
def name(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def test_arrays_and_tensors_do_the_same():
    torch = pytest.importorskip("torch")
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    t = torch.tensor(x)
    assert torch.tensor([1, 2, 3]).numpy().dtype == np.array([1, 2, 3]).dtype == np.int64
    assert t.numpy().dtype == x.dtype == np.float32
    for ours, theirs in ((x.reshape(3, 2), t.view(3, 2)), (x.T, t.T), (x @ x.T, t @ t.T), (x.mean(), t.mean())):
        np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(x @ x.T, [[14, 32], [32, 77]])


def test_the_gradient_of_logistic_regression_three_ways():
    """By hand, by finite differences, by autograd."""
    torch = pytest.importorskip("torch")
    x, target = np.array([[1.1]]), np.array([1])

    def loss(weight, bias):
        logits, saved = linear.forward(x, np.array([[0.0], [weight]]), np.array([0.0, bias]))
        value, saved_loss = cross_entropy.forward(logits, target)
        return value, saved, saved_loss

    value, saved, saved_loss = loss(2.2, 0.0)
    _, dweight, dbias = linear.backward(cross_entropy.backward(1.0, saved_loss), saved)
    by_hand = np.array([dweight[1, 0], dbias[1]])
    np.testing.assert_allclose(by_hand, [-0.0898, -0.0817], atol=5e-5)
    np.testing.assert_allclose(by_hand, numeric_gradient(lambda p: float(loss(*p)[0]), np.array([2.2, 0.0])), atol=1e-9)
    w, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (2.2, 0.0))
    theirs = torch.nn.functional.binary_cross_entropy(torch.sigmoid(1.1 * w + b), torch.ones(1, dtype=torch.float64))
    theirs.backward()
    assert value == pytest.approx(theirs.item(), abs=1e-14)
    np.testing.assert_allclose(by_hand, [w.grad.item(), b.grad.item()], atol=1e-14)


def test_probabilities_of_a_perceptron_sum_to_one(name):
    logits = engines.layers(name).perceptron(perceptron(Generator(123), 50, 3), Generator(123).rand((1, 50)))
    assert sample_probabilities(logits).sum() == pytest.approx(1, abs=1e-15)


def test_gradients_of_a_perceptron_by_hand_are_those_of_autograd():
    pytest.importorskip("torch")
    params = perceptron(Generator(123), 2, 2)
    (ours, by_hand), (theirs, by_autograd) = (
        engines.layers(name).perceptron_gradients(params, X_TRAIN, Y_TRAIN) for name in ("numpy", "torch")
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    for parameter in params:
        np.testing.assert_allclose(by_hand[parameter], by_autograd[parameter], rtol=1e-4, atol=1e-7)


def test_a_toy_problem_is_solved_in_three_epochs(name):
    params, losses = toy_training(name)
    assert losses[-1] < 0.01 < losses[0]
    assert np.array_equal(engines.layers(name).perceptron(params, X_TRAIN).argmax(axis=-1), Y_TRAIN)


def test_a_device_that_is_not_there_is_named_with_those_that_are():
    params = initialize(TINY, Generator(1))
    with pytest.raises(UserError, match="numpy engine runs on the cpu, not on 'cuda'"):
        create_engine("numpy", TINY, params, device="cuda")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' is not available here, choose from .*cpu"):
            create_engine("torch", TINY, params, device="cuda")
    assert create_engine("torch", TINY, params, device="cpu").logits(np.arange(3)[None]).shape == (1, 31)


@pytest.mark.parametrize("decay, norms_decay", [("matrices", False), ("all", True)])
def test_which_parameters_decay(name, decay, norms_decay):
    """With a gradient next to nothing beside eps, a step is decay alone: w (1 - lr decay)."""
    params = initialize(TINY, Generator(1))
    engine = create_engine(name, TINY, params, OptimizerConfig(weight_decay=0.5, decay=decay, eps=1e8))
    tokens = np.arange(18).reshape(2, 9)
    engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]))
    engine.step(lr=0.1)
    for parameter, after in engine.parameters().items():
        decays = norms_decay or params[parameter].ndim >= 2
        expected = params[parameter] * np.float32(0.95 if decays else 1)
        np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-7, err_msg=parameter)


def test_clipping_brings_the_largest_gradient_down_with_the_norm(name):
    engine = create_engine(name, TINY, initialize(TINY, Generator(1)))
    tokens = np.arange(18).reshape(2, 9)
    engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]))
    gradients = {parameter: array.astype(np.float64) for parameter, array in engine.gradients().items()}
    norm = global_norm(gradients)
    assert engine.gradient_norm() == pytest.approx(norm, rel=1e-5)
    highest = max(np.abs(array).max() for array in gradients.values())
    scale = clip_scale(norm, norm / 4)
    assert scale == pytest.approx(0.25, rel=1e-5)
    clipped = {parameter: array * scale for parameter, array in gradients.items()}
    assert global_norm(clipped) == pytest.approx(norm / 4, rel=1e-5)
    assert max(np.abs(array).max() for array in clipped.values()) == pytest.approx(highest / 4, rel=1e-5)


def test_a_cosine_ends_above_its_minimum_and_stays_there():
    rates = [warmup_cosine(step, 135, 1e-2, 20, 1e-4, 1e-5) for step in range(200)]
    assert rates[20] == max(rates) == 1e-2
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[134] > rates[135] == rates[199] == pytest.approx(1e-5)
