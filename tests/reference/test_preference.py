"""Losses on preferences where their formulas are at their limits: against 400 digits, in NumPy and in PyTorch."""

import importlib
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reference import cross_entropy, dpo, orpo, token_logps

DIGITS = 400  # 1 - e^a has its first digit after as many zeros as a has
TINY = np.finfo(np.float64).tiny
NEAR_0 = [0.0, -5e-324, -1e-300, -1e-17, -1e-16, -1e-8]


@pytest.fixture(params=["reference", "gpt.ops"], scope="module")
def place(request):
    if request.param == "gpt.ops":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param


def run(place, name, arrays, beta, upstream=1.0):
    """Loss, and its gradients with respect to the first two arrays."""
    if place == "reference":
        layer = importlib.import_module(f"reference.{name}")
        loss, saved = layer.forward(*arrays, beta)
        return float(loss), *layer.backward(upstream, saved)
    torch = importlib.import_module("torch")
    tensors = [torch.from_numpy(array) for array in arrays]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    loss = getattr(importlib.import_module("gpt.ops"), name)(*tensors, beta)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss.item(), *(tensor.grad.numpy() for tensor in tensors[:2])


def pair(place, name, *numbers, beta, dtype=np.float64):
    """The same of one pair."""
    loss, da, db = run(place, name, [np.array([number], dtype) for number in numbers], beta)
    assert da.dtype == db.dtype == dtype
    return loss, float(da[0]), float(db[0])


def near(got, true, bound, dtype=np.float64):
    """Whether a number is right, where the type can hold the true one."""
    info = np.finfo(dtype)
    if abs(true) < Decimal(float(info.tiny)):
        return abs(got) <= 2 * info.tiny
    return abs(Decimal(got) - true) <= Decimal(bound) * abs(true)


# ---------------------------------------------------------------- ORPO


def orpo_truth(a, b, beta):
    """Loss and gradients by the chain rule, its factors one by one."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = DIGITS, -999999, 999999
        a, b, beta = Decimal(a), Decimal(b), Decimal(beta)
        pa, pb = a.exp(), b.exp()
        qa, qb = 1 - pa, 1 - pb
        ratio = (pa / qa) / (pb / qb)
        wrong = 1 / (1 + ratio)  # sigmoid(-z), z = log(ratio)
        loss = -a + beta * (1 + 1 / ratio).ln()
        # dz/da = 1 / (1 - e^a), and dz/db the same of b, with the other sign
        return loss, -1 - beta * wrong / qa, beta * wrong / qb


def logps(width=64):
    """(-200, 0], many near 0, where 1 - e^a has few digits or none."""
    small = st.integers(1, 1000 if width == 64 else 140).map(lambda n: -(2.0**-n))
    edge = [number for number in NEAR_0 if width == 64 or np.float32(number) == number]
    plain = st.floats(-200, 0, exclude_min=True, width=width)
    return st.sampled_from(edge) | small | plain


BETAS = st.floats(0.01, 1)


@pytest.mark.filterwarnings("error")
@settings(max_examples=400)
@given(a=logps(), b=logps(), beta=BETAS)
@example(a=0.0, b=0.0, beta=0.1)
@example(a=0.0, b=-199.0, beta=1.0)
@example(a=-199.0, b=0.0, beta=1.0)
@example(a=-1e-8, b=-1e-300, beta=0.1)
@example(a=-1e-300, b=-1e-8, beta=0.1)
def test_orpo_and_its_gradient_are_finite_and_right(place, a, b, beta):
    loss, da, db = pair(place, "orpo", a, b, beta=beta)
    assert all(map(math.isfinite, (loss, da, db)))
    assert loss >= 0
    assert da <= -1
    assert db >= 0
    if max(a, b) <= -TINY:  # nearer to 0 the truth is beyond the largest number
        true_loss, true_da, true_db = orpo_truth(a, b, beta)
        assert near(loss, true_loss, 1e-9)
        assert near(da, true_da, 1e-9)
        assert near(db, true_db, 1e-9)


@pytest.mark.filterwarnings("error")
@settings(max_examples=400)
@given(a=logps(32), b=logps(32), beta=BETAS)
@example(a=0.0, b=0.0, beta=0.1)
@example(a=0.0, b=-199.0, beta=1.0)
@example(a=-199.0, b=0.0, beta=1.0)
def test_orpo_in_float32(place, a, b, beta):
    loss, da, db = pair(place, "orpo", a, b, beta=beta, dtype=np.float32)
    assert all(map(math.isfinite, (loss, da, db)))
    if max(a, b) <= -np.finfo(np.float32).tiny:
        true_loss, true_da, true_db = orpo_truth(a, b, beta)
        assert near(loss, true_loss, 1e-4, np.float32)
        assert near(da, true_da, 1e-4, np.float32)
        assert near(db, true_db, 1e-4, np.float32)


@pytest.mark.parametrize("a", [-1e-17, 0.0])
def test_what_autograd_makes_of_the_written_formula_is_no_number(a):
    """Which is why the gradient's factors are joined by hand."""
    torch = pytest.importorskip("torch")
    chosen = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    log_odds = (chosen - rejected) - (torch.log(1 - chosen.exp()) - torch.log(1 - rejected.exp()))
    (-chosen - 0.1 * torch.nn.functional.logsigmoid(log_odds)).mean().backward()
    assert not torch.isfinite(chosen.grad).all()
    for place in ("reference", "gpt.ops"):
        _, da, db = pair(place, "orpo", a, -1.0, beta=0.1)
        # e^b / (1 - e^b) is how much of the gradient of a nearly sure answer is left
        assert da == pytest.approx(-1 - 0.1 / (math.exp(1) * -math.expm1(-1.0)), rel=1e-12)
        assert db == pytest.approx(0, abs=1e-16)


def test_orpo_is_a_mean_over_pairs_and_its_gradient_linear(place):
    rng = np.random.default_rng(0)
    a, b = -rng.exponential(2, (2, 5))
    each = [pair(place, "orpo", *both, beta=0.3) for both in zip(a, b, strict=True)]
    loss, da, db = run(place, "orpo", [a, b], 0.3, upstream=-2.5)
    assert loss == pytest.approx(np.mean([one[0] for one in each]), rel=1e-14)
    for got, true in ((da, [one[1] for one in each]), (db, [one[2] for one in each])):
        np.testing.assert_allclose(got, -2.5 / 5 * np.array(true), rtol=1e-13)


def test_orpo_of_answers_alike():
    """z = 0: the loss is -a + beta log 2, and both gradients of the odds are half of what they are at most."""
    loss, saved = orpo.forward(np.array([-0.7]), np.array([-0.7]), 0.1)
    assert float(loss) == pytest.approx(0.7 + 0.1 * math.log(2), rel=1e-15)
    da, db = orpo.backward(1.0, saved)
    assert da[0] == pytest.approx(-1 - 0.1 / 2 / (1 - math.exp(-0.7)), rel=1e-14)
    assert db[0] == pytest.approx(0.1 / 2 / (1 - math.exp(-0.7)), rel=1e-14)


# ---------------------------------------------------------------- DPO


def dpo_truth(chosen, rejected, chosen0, rejected0, beta):
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = DIGITS, -999999, 999999
        c, r, c0, r0, beta = map(Decimal, (chosen, rejected, chosen0, rejected0, beta))
        odds = (beta * ((c - c0) - (r - r0))).exp()
        return (1 + 1 / odds).ln(), -beta / (1 + odds), beta / (1 + odds)


@pytest.mark.filterwarnings("error")
@settings(max_examples=400)
@given(
    numbers=st.tuples(*[st.integers(-8000, 0).map(lambda n: n / 8)] * 4),  # so that differences are exact
    beta=st.sampled_from([0.125, 0.25, 0.5, 1.0, 4.0]),
)
@example(numbers=(-5.0, -5.0, -5.0, -5.0), beta=0.125)
@example(numbers=(-1000.0, 0.0, 0.0, -1000.0), beta=4.0)
@example(numbers=(0.0, -1000.0, -1000.0, 0.0), beta=4.0)
def test_dpo_and_its_gradient_are_finite_and_right(place, numbers, beta):
    found = pair(place, "dpo", *numbers, beta=beta)
    for got, true in zip(found, dpo_truth(*numbers, beta), strict=True):
        assert math.isfinite(got)
        assert near(got, true, 1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gap", [-1e30, -1e6, -800.0, 0.0, 800.0, 1e6, 1e30])
def test_dpo_where_an_exponential_would_overflow(place, dtype, gap):
    loss, dc, dr = pair(place, "dpo", gap, 0.0, 0.0, 0.0, beta=0.5, dtype=dtype)
    assert loss == pytest.approx({-1: -gap / 2, 0: math.log(2), 1: 0.0}[np.sign(gap)], rel=1e-6)
    assert dc == pytest.approx({-1: -0.5, 0: -0.25, 1: 0.0}[np.sign(gap)], rel=1e-6)
    assert dr == -dc


def test_dpo_begins_with_the_logarithm_of_2_and_is_a_mean(place):
    rng = np.random.default_rng(0)
    chosen, rejected = -rng.exponential(20, (2, 7))
    loss, dc, dr = run(place, "dpo", [chosen, rejected, chosen.copy(), rejected.copy()], 0.1, upstream=3.0)
    assert loss == pytest.approx(math.log(2), rel=1e-15)
    np.testing.assert_allclose(dc, -3 * 0.1 / 2 / 7, rtol=1e-14)
    np.testing.assert_array_equal(dr, -dc)


def test_dpo_asks_for_the_difference_from_the_reference_alone():
    """What makes both answers more probable, or both models, changes nothing."""
    base = np.array([[-9.0], [-7.0], [-8.0], [-8.5]])
    loss, saved = dpo.forward(*base, 0.25)
    for more in ([1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]):
        assert dpo.forward(*(base + 2.0 * np.array(more)[:, None]), 0.25)[0] == loss
    assert dpo.forward(*(base + np.array([[1.0], [0], [0], [0]])), 0.25)[0] < loss
    assert saved[1] == 0.25


# ---------------------------------------------------------------- log-probabilities of targets


@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-14), (np.float32, 1e-6)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_token_logps_are_what_cross_entropy_is_the_mean_of(dtype, bound, share, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(3, 7, 11))).astype(dtype)
    targets = np.where(rng.random((3, 7)) < share, -100, rng.integers(0, 11, (3, 7)))
    counted = np.count_nonzero(targets != -100)
    y, saved = token_logps.forward(logits, targets)
    loss, saved_loss = cross_entropy.forward(logits, targets)
    assert (y.dtype, y.shape) == (dtype, (3, 7))
    assert (y <= 0).all()
    assert (y[targets == -100] == 0).all()
    assert -y.sum() / max(1, counted) == pytest.approx(float(loss), rel=bound)
    gradient = token_logps.backward(np.full((3, 7), -1 / max(1, counted), dtype), saved)
    np.testing.assert_allclose(gradient, cross_entropy.backward(1.0, saved_loss), rtol=0, atol=bound)
    assert (gradient[targets == -100] == 0).all()


@given(data=st.data())
def test_token_logps_are_logarithms_of_probabilities(data):
    """Over all targets they add up to one, and the gradient over a row to nothing."""
    V = data.draw(st.integers(1, 9))
    row = np.array(data.draw(st.lists(st.floats(-50, 50), min_size=V, max_size=V)))
    y, saved = token_logps.forward(np.tile(row, (V, 1)), np.arange(V))
    assert np.exp(y).sum() == pytest.approx(1, rel=1e-12)
    gradient = token_logps.backward(np.linspace(1, 2, V), saved)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-14)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_token_logps_refuse_a_target_that_is_no_token(wrong):
    with pytest.raises(ValueError, match=rf"targets: {wrong} is outside the vocabulary, expected 0 <= target < 11"):
        token_logps.forward(np.zeros((2, 11)), np.array([3, wrong]))
