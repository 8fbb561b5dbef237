"""The head's loss some rows at a time: value and gradients of the plain one, without its logits."""

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from gpt import ops
from gpt.engine import IGNORE, Batch, OptimizerConfig, create_engine
from reference.config import GPTConfig
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

N, V, C = 150, 37, 12


@pytest.fixture(autouse=True)
def _three_chunks(monkeypatch):
    """Of 64, 64 and 22 rows, and of any number of logits; by one thread, to which arrays so small cost least."""
    monkeypatch.setattr(ops, "LOGITS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(dtype=torch.float64, bias=True, ignored=0.3, rows=(3, N // 3), scale=1.0):
    """x (3, N / 3, C), weight, bias, targets (3, N / 3)."""
    rng = np.random.default_rng(5)
    x, weight, b = (torch.from_numpy(rng.normal(0, scale, shape)).to(dtype) for shape in ((*rows, C), (V, C), (V,)))
    targets = rng.integers(0, V, rows)
    targets[rng.random(rows) < ignored] = IGNORE
    return x, weight, b if bias else None, torch.from_numpy(targets)


def plain(x, weight, bias, targets):
    return ops.cross_entropy(torch.nn.functional.linear(x, weight, bias), targets)


def passes(loss, arguments, upstream=0.7, frozen=()):
    """The loss, and the gradients of what is not frozen."""
    *tensors, targets = arguments
    tensors = [t if t is None or i in frozen else t.detach().clone().requires_grad_() for i, t in enumerate(tensors)]
    found = loss(*tensors, targets)
    (found * upstream).backward()
    return [found.detach(), *(t.grad for t in tensors if t is not None and t.requires_grad)]


def errors(found, truth):
    """Of each tensor the largest error, of its largest entry."""
    pairs = zip(found, truth, strict=True)
    return [float((f.double() - t).abs().max() / t.abs().max().clamp(min=1e-300)) for f, t in pairs]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (1, 2)])
def test_value_and_gradients_are_those_of_the_plain_one(bias, ignored, frozen):
    arguments = drawn(bias=bias, ignored=ignored, scale=3.0)
    ours, theirs = (passes(loss, arguments, frozen=frozen) for loss in (ops.linear_cross_entropy, plain))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(*arguments), theirs[0], rtol=1e-12, atol=0)


def test_the_gradient_is_the_derivative():
    *tensors, targets = drawn(rows=(70,))
    tensors = [t[:9] if i == 1 else t[:9] if i == 2 else t for i, t in enumerate(tensors)]
    targets = torch.where(targets == IGNORE, targets, targets % 9)
    assert torch.autograd.gradcheck(
        lambda *t: ops.chunked_cross_entropy(*t, targets), [t.requires_grad_() for t in tensors]
    )


def test_rounding_is_no_worse_than_the_plain_ones():
    truth = passes(plain, drawn())
    arguments = [t if t.dtype == torch.int64 else t.float() for t in drawn()]
    ours, theirs = (errors(passes(loss, arguments), truth) for loss in (ops.linear_cross_entropy, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert a <= 2 * max(b, 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_factors_and_no_sums(dtype):
    """With a scaled loss, as float16 has it."""
    arguments = [t if t.dtype == torch.int64 else t.float() for t in drawn(scale=1.5)]
    truth = passes(plain, [t if t.dtype == torch.int64 else t.double() for t in arguments], 2.0**13)

    def under_autocast(loss):
        with torch.autocast("cpu", dtype):
            return passes(loss, arguments, 2.0**13)

    ours, theirs = (under_autocast(loss) for loss in (ops.linear_cross_entropy, plain))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [torch.float32] * 4
    for a, b in zip(errors(ours, truth), errors(theirs, truth), strict=True):
        assert a <= 2 * b


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (passes(loss, drawn()) for loss in (ops.linear_cross_entropy, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_small_probabilities_count_in_float16():
    """A token of probability 1e-6, less than float16 resolves, has its share of the gradient."""
    x, weight, bias = torch.ones(100, 1), torch.zeros(8, 1, requires_grad=True), torch.zeros(8)
    bias[3] = np.log(7e-6)
    with torch.autocast("cpu", torch.float16):
        ops.linear_cross_entropy(x, weight, bias, torch.zeros(100, dtype=torch.int64)).backward()
    assert weight.grad[3].item() == pytest.approx(1e-6, rel=1e-3)


def test_sums_over_many_rows_do_not_overflow_float16():
    """Whose gradient a smaller scale could not mend, for it is only applied in the backward pass."""
    x = torch.full((4000, 8), 30.0)
    weight = torch.zeros(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        ops.linear_cross_entropy(x, weight, None, torch.zeros(4000, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad[0], torch.full((8,), -22.5))


def test_what_is_kept_is_no_logits_and_serves_twice():
    *tensors, targets = drawn()
    tensors = [t.requires_grad_() for t in tensors]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        loss = ops.linear_cross_entropy(*tensors, targets)
    assert max(sizes) == N * C
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(a, b)


def test_rows_that_do_not_count_may_hold_anything():
    x, weight, bias, targets = drawn()
    x[targets == IGNORE] = float("nan")
    found = passes(ops.linear_cross_entropy, (x, weight, bias, targets))
    assert all(torch.isfinite(t).all() for t in found)
    assert (found[1][targets == IGNORE] == 0).all()


def test_it_is_one_graph_when_compiled():
    *tensors, targets = drawn()

    def loss(x, weight, bias, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear_cross_entropy(x.sin(), weight, bias, targets)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = [t.float() for t in tensors]
    ours, theirs = (passes(f, [*tensors, targets]) for f in (compiled, loss))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_only_many_logits_are_computed_in_chunks(monkeypatch):
    """More than LOGITS, and more than the weight has numbers: below, the plain product is as good."""
    taken = []
    monkeypatch.setattr(ops, "chunked_cross_entropy", lambda *arguments: taken.append(True) or plain(*arguments[:4]))
    x, weight, bias, targets = drawn()
    for limit, rows, many in ((N * V - 1, N, True), (N * V, N, False), (0, C, False), (0, C + 1, True)):
        monkeypatch.setattr(ops, "LOGITS", limit)
        taken.clear()
        ops.linear_cross_entropy(x.view(N, C)[:rows], weight, bias, targets.view(-1)[:rows])
        assert bool(taken) is many, (limit, rows)
    assert ops.rows_at_a_time(10, 10) == 64


GPT2 = GPTConfig(29, 16, 12, 1, 3, shortcut_dropout=0.1, tie_embeddings=True)


@pytest.mark.parametrize("precision, dtype", [("full", "float64"), ("float16", "float32")])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_takes_the_same_steps(tied, precision, dtype, monkeypatch):
    config = GPT2.replace(tie_embeddings=tied, head_bias=not tied)
    tokens = np.random.default_rng(0).integers(0, 29, (6, 17))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    found = []
    for limit, again in itertools.product((10**9, 0), (False, True)):
        monkeypatch.setattr(ops, "LOGITS", limit)
        engine = create_engine(
            "torch", config, initialize(config, Generator(1), "gpt2"), OptimizerConfig(), dtype, "cpu", precision,
            checkpoint_activations=again,
        )  # fmt: skip
        losses = []
        for step in range(2):
            losses.append(engine.accumulate(batch, 1.0, PhiloxNoise(7, step, 0)))
            gradients = {name: array.copy() for name, array in engine.gradients().items()}
            losses.append(engine.step(1e-3, 1.0))
        found.append((losses, gradients))
    for losses, gradients in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-12 if precision == "full" else 1e-3)
        for name, array in gradients.items():
            if not name.endswith("key.bias"):
                bound = (1e-10 if precision == "full" else 1e-2) * np.abs(found[0][1][name]).max()
                np.testing.assert_allclose(array, found[0][1][name], rtol=0, atol=bound, err_msg=name)
