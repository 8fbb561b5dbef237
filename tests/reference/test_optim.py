import numpy as np
import pytest

from reference import optim, pieces

# Large ones are updated one by one, small ones together.
SHAPES = {"matrix": (7, 5), "large": (96, 100), "vector": (11,), "row": (1, 13), "large vector": (optim.SMALL,)}


def arrays(seed, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def textbook(w, grads, lr, betas, eps, decay):
    """The algorithm as it is printed, for one parameter and a list of gradients."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * m_hat / (np.sqrt(v_hat) + eps)
    return w


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_steps_follow_the_printed_algorithm(decay):
    start, grads = arrays(0), [arrays(step, 0.1) for step in range(1, 40)]
    params = {name: w.copy() for name, w in start.items()}
    optimizer = optim.AdamW(params, lr=3e-3, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, decay=decay)
    for g in grads:
        optimizer.step(g)
    for name, w in start.items():
        of_parameter = 0.2 if decay == "all" or w.ndim == 2 else 0.0
        expected = textbook(w, [g[name] for g in grads], 3e-3, (0.8, 0.95), 1e-3, of_parameter)
        np.testing.assert_allclose(params[name], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("dtype, bound", [("float64", 1e-13), ("float32", 1e-6)])
def test_steps_are_pytorchs_for_hundreds_of_them(decay, dtype, bound):
    torch = pytest.importorskip("torch")
    params = arrays(0, dtype=dtype)
    theirs = {name: torch.tensor(w, requires_grad=True) for name, w in params.items()}
    groups = [{"params": [p], "weight_decay": 0.1 if decay == "all" or p.ndim > 1 else 0.0} for p in theirs.values()]
    pytorch = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    ours = optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, decay=decay)
    for step in range(300):
        grads = arrays(step + 1, 10.0 ** (step % 5 - 3), dtype)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        pytorch.step()
        ours.step(grads)
    for name, p in theirs.items():
        true = p.detach().numpy()
        assert params[name].dtype == true.dtype
        assert np.abs(params[name] - true).max() <= bound * np.abs(true).max(), name


def test_a_learning_rate_and_a_scale_hold_for_one_step():
    one, other = arrays(0), arrays(0)
    first, second = optim.AdamW(one, lr=1.0), optim.AdamW(other, lr=2e-3)
    grads = arrays(1)
    first.step(grads, lr=2e-3, scale=0.5)
    second.step({name: g / 2 for name, g in grads.items()})
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert first.lr == 1.0


def test_gradients_are_not_changed_and_parameters_are_changed_in_place():
    params, grads = arrays(0), arrays(1)
    given, copies = dict(params), {name: g.copy() for name, g in grads.items()}
    optim.AdamW(params).step(grads)
    for name in params:
        assert params[name] is given[name]
        np.testing.assert_array_equal(grads[name], copies[name])


def test_a_large_parameter_is_updated_like_its_parts():
    """In pieces, on several threads, with a last piece that is not whole."""
    size = 5 * pieces.PIECE + 17  # fewer, and one thread has them all
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, size)).astype(np.float32)
    whole = {"w": w.copy()}
    parts = {str(i): part.copy() for i, part in enumerate(np.split(w, [5, size // 2]))}
    optim.AdamW(whole).step({"w": g})
    optim.AdamW(parts).step({str(i): part for i, part in enumerate(np.split(g, [5, size // 2]))})
    np.testing.assert_array_equal(whole["w"], np.concatenate(list(parts.values())))


def test_state_is_what_the_next_step_starts_from():
    params = arrays(0)
    optimizer = optim.AdamW(params, betas=(0.9, 0.99))
    assert optimizer.state()["step"] == 0
    grads = arrays(1)
    optimizer.step(grads)
    state = optimizer.state()
    assert state["step"] == 1
    for name, g in grads.items():
        np.testing.assert_allclose(state["m"][name], 0.1 * g, rtol=1e-12)
        np.testing.assert_allclose(state["v"][name], 0.01 * g * g, rtol=1e-12)


def test_an_unknown_choice_of_what_decays_is_refused():
    with pytest.raises(ValueError, match="decay: 'some' is not one of all, matrices"):
        optim.AdamW({}, decay="some")


def test_the_global_norm_is_that_of_all_entries_together():
    grads = arrays(0)
    joined = np.concatenate([g.ravel() for g in grads.values()])
    assert optim.global_norm(grads) == pytest.approx(np.linalg.norm(joined), rel=1e-14)
    assert optim.global_norm({}) == 0


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_global_norm_of_many_float32_entries_rounds_like_pytorchs_or_better(spread):
    torch = pytest.importorskip("torch")
    g = (0.1 + spread * np.random.default_rng(0).normal(size=10 * pieces.PIECE + 3)).astype(np.float32)
    true = float(np.linalg.norm(g.astype(np.float64)))
    ours, theirs = abs(optim.global_norm({"g": g}) - true), abs(torch.from_numpy(g).norm().item() - true)
    assert ours <= max(2 * theirs, np.finfo(np.float32).eps / 2 * true)


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_clipping_is_pytorchs(max_norm):
    torch = pytest.importorskip("torch")
    grads = arrays(0)
    theirs = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert optim.global_norm(grads) == pytest.approx(norm.item(), rel=1e-14)
    scale = optim.clip_scale(optim.global_norm(grads), max_norm)
    for p, g in zip(theirs, grads.values(), strict=True):
        np.testing.assert_allclose(scale * g, p.grad.numpy(), rtol=1e-14)


def test_clipping_never_enlarges():
    assert optim.clip_scale(0.0, 1.0) == 1
    assert optim.clip_scale(0.5, 1.0) == 1
    assert optim.clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)


def test_parameters_that_could_not_be_updated_in_place_are_refused():
    with pytest.raises(ValueError, match=r"params: w is not contiguous"):
        optim.AdamW({"b": np.ones(3), "w": np.asfortranarray(np.ones((3, 4)))})
