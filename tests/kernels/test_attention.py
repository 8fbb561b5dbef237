"""Attention's kernels where the table of operators does not go: memory layouts, masks one by one, and bad input.

Results at the table's sizes are held against the reference in tests/gpt/parity.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import attention, launch  # noqa: E402
from reference import attention as reference  # noqa: E402
from reference import philox  # noqa: E402

NOISE = (0xFEDCBA9876543210, 2**40 + 5)


def draw(*shape, dtype=torch.float64):
    """Not centred, so that no mean is 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (1.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.4).to(dtype)


def problem(B, H, G, T, S, D, dtype=torch.float64):
    """q, k, v and dy."""
    q, k, v, dy = draw(B, H, T, D), draw(B, G, S, D + 1)[..., 1:], draw(B, G, S, D + 2)[..., 2:], draw(B, H, T, D + 3)
    return [x.to(dtype) for x in (q, k, v, dy[..., 3:])]


def run(layer, q, k, v, dy, *settings):
    """y, dq, dk, dv."""
    y, saved = layer.forward(q, k, v, *settings)
    return y, *layer.backward(dy, saved)


def truth(q, k, v, dy, *settings):
    return run(reference, *(x.double().numpy() for x in (q, k, v, dy)), *settings)


def assert_same(results, expected):
    """To 1e-11 of the largest entry."""
    for result, true in zip(results, expected, strict=True):
        assert result.shape == true.shape
        np.testing.assert_allclose(result.numpy(), true, rtol=0, atol=1e-11 * np.abs(true).max(initial=0))


@pytest.mark.parametrize("head_dim", [1, 3, 16, 17, 200, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions_from_end_to_end(head_dim, causal):
    inputs = problem(1, 2, 1, 67, 70, head_dim)
    assert_same(run(attention, *inputs, causal), truth(*inputs, causal))


@pytest.mark.parametrize("T, S", [(150, 150), (200, 70), (70, 200), (1, 129), (129, 3)])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_several_tiles_of_queries_and_of_keys(T, S, rate):
    """Tiles before, on and behind the diagonal, wherever that begins; tiles of queries that see nothing."""
    inputs = problem(1, 2, 2, T, S, 8)
    settings = (True, 0.3, rate, NOISE)
    assert_same(run(attention, *inputs, *settings), truth(*inputs, *settings))


def test_heads_of_a_group_share_keys_and_values():
    inputs = problem(1, 6, 2, 5, 7, 4)
    repeated = [inputs[0], *(x.repeat_interleave(3, dim=1) for x in inputs[1:3]), inputs[3]]
    (y, dq, dk, dv), (y_of_six, dq_of_six, *of_six) = (run(attention, *given) for given in (inputs, repeated))
    assert torch.equal(y, y_of_six)
    assert torch.equal(dq, dq_of_six)
    for gradient, each in zip((dk, dv), of_six, strict=True):
        torch.testing.assert_close(gradient, each.unflatten(1, (2, 3)).sum(2))


# Dropout. Where all keys score alike and the values are the unit vectors, y shows p, element by element.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [NOISE, (7, 2**64 - 5), (-1, 0)])
def test_it_drops_what_the_reference_drops(dtype, noise):
    B, H, T, S, D, rate = 2, 2, 66, 131, 64, 0.3
    q, k = torch.zeros(B, H, T, D, dtype=dtype), torch.ones(B, H, S, D, dtype=dtype)
    v = torch.eye(S, dtype=dtype)[:, -D:].expand(B, H, S, D)
    y, _ = attention.forward(q, k, v, False, None, rate, noise)
    keep = philox.keep_mask(tuple(word % 2**64 for word in noise), (B, H, T, S), rate)
    np.testing.assert_array_equal(y.float().numpy() != 0, keep[..., -D:])


def test_backward_drops_the_same():
    """What is dropped neither reaches y nor hears of dy: with v and dy of one, dv counts what was kept of each key."""
    B, H, T, S, rate = 1, 2, 70, 131, 0.3
    q, k, ones = torch.zeros(B, H, T, 1), torch.zeros(B, H, S, 1), torch.ones(B, H, S, 1)
    _, saved = attention.forward(q, k, ones, False, None, rate, NOISE)
    dv = attention.backward(torch.ones(B, H, T, 1), saved)[2]
    kept = philox.keep_mask(NOISE, (B, H, T, S), rate).sum(axis=2)
    np.testing.assert_allclose(dv[..., 0].numpy() * S * (1 - rate), kept, rtol=1e-5)


def test_an_example_is_dropped_alike_in_any_batch():
    q, k, v, _ = problem(3, 2, 1, 9, 9, 4)
    whole, _ = attention.forward(q, k, v, True, None, 0.5, (11, 100))
    last, _ = attention.forward(q[2:], k[2:], v[2:], True, None, 0.5, (11, 100 + 2 * 2))
    assert torch.equal(whole[2:], last)


@pytest.mark.parametrize("rate, noise", [(0.0, NOISE), (0.5, None)])
def test_without_rate_or_noise_nothing_is_dropped(rate, noise):
    q, k, v, _ = problem(1, 2, 1, 5, 7, 4)
    assert torch.equal(attention.forward(q, k, v, True, None, rate, noise)[0], attention.forward(q, k, v)[0])


# Memory.


def fused(q, k, v):
    """Views of one tensor (B, T, 3, H, D), as one linear layer for all three gives it."""
    return torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2).transpose(1, 3).unbind(2)


LAYOUTS = {
    "fused": fused,
    "transposed": lambda *qkv: [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv],
    "reversed axes": lambda *qkv: [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in qkv],
    "every other": lambda *qkv: [x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, 1::2] for x in qkv],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    *qkv, dy = problem(2, 2, 2, 67, 67, 12)
    expected = run(attention, *qkv, dy)
    views = LAYOUTS[layout](*qkv)
    assert not any(view.is_contiguous() for view in views)
    dy = LAYOUTS["every other"](dy)[0]
    for result, same in zip(run(attention, *views, dy), expected, strict=True):
        assert torch.equal(result, same)


def test_axes_of_stride_0():
    """One key head for all examples, one query for all positions, and the gradient of a plain sum."""
    q, k, v, dy = problem(1, 2, 1, 67, 70, 5)
    q, k, dy = q[:, :, :1].expand(3, 2, 67, 5), k.expand(3, 1, 70, 5), torch.tensor(0.7).double().expand(3, 2, 67, 5)
    v = v.expand(3, 1, 70, 5)
    assert_same(run(attention, q, k, v, dy), truth(q, k, v, dy))


def test_heads_are_joined_without_a_copy():
    inputs = problem(2, 6, 3, 5, 7, 4)
    for result in run(attention, *inputs):
        assert result.transpose(1, 2).is_contiguous()


def test_the_same_bits_twice():
    inputs = problem(1, 4, 2, 70, 131, 16, torch.bfloat16)
    for first, second in zip(*(run(attention, *inputs, True, None, 0.2, NOISE) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


# Edges.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_queries_that_see_no_key_give_0_and_get_no_gradient(dtype):
    T, S = 70, 3
    inputs = problem(1, 2, 2, T, S, 4, dtype)
    y, dq, dk, dv = run(attention, *inputs)
    assert not y[:, :, : T - S].any()
    assert not dq[:, :, : T - S].any()
    q, k, v, dy = inputs
    for result, same in zip((dk, dv), run(attention, q[:, :, -S:], k, v, dy[:, :, -S:])[2:], strict=True):
        torch.testing.assert_close(result, same)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [(0, 2, 1, 5, 7, 4), (2, 2, 1, 0, 7, 4), (2, 2, 1, 5, 0, 4), (2, 2, 1, 0, 0, 4)])
def test_nothing_to_do(size, causal):
    inputs = problem(*size)
    for result, like in zip(run(attention, *inputs, causal), inputs[:1] + inputs[:3], strict=True):
        assert result.shape == like.shape
        assert not result.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values_stay_finite(dtype):
    inputs = problem(1, 2, 1, 65, 70, 16, dtype)
    for result in run(attention, *(1e4 * x for x in inputs)):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_pytorchs(dtype):
    """On keys enough for several tiles: the error against float64 is twice PyTorch's at most, of gradients 3 times."""
    inputs = problem(2, 4, 2, 130, 150, 64, dtype)
    true = truth(*inputs, False)
    ours = run(attention, *inputs, False)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    y = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True)
    theirs = y.detach(), *torch.autograd.grad(y, leaves, inputs[3])
    for factor, *tensors in zip((2, 3, 3, 3), ours, theirs, true, strict=True):
        result, other, expected = (np.asarray(x.double() if isinstance(x, torch.Tensor) else x) for x in tensors)
        assert np.linalg.norm(result - expected) <= factor * np.linalg.norm(other - expected)


# Launches.


def test_what_is_compiled_does_not_depend_on_lengths():
    def constants(T, S):
        q, k = (torch.empty(2, length, 4, 64, device="meta", dtype=torch.bfloat16) for length in (T, S))
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        with launch.recorded() as launches:
            y, saved = attention.forward(q, k, k)
            attention.backward(y, saved)
        return [(launched.kernel, launched.options) for launched in launches]

    assert constants(1, 1) == constants(4096, 8192)
    assert len(constants(1, 1)) == 3


def ones(*shape, **options):
    return torch.ones(*shape, **options)


Q, K = ones(2, 4, 5, 8), ones(2, 2, 7, 8)
EXPECTED_K = "k, v: expected both (2, G, S, 8) with G dividing 4, got"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: attention.forward(ones(4, 5, 8), K, K), ValueError, "q: expected shape (B, H, T, D), got (4, 5, 8)"),
        (
            lambda: attention.forward(Q, ones(2, 7, 8), K),
            ValueError,
            f"{EXPECTED_K} (2, 7, 8) and (2, 2, 7, 8)",
        ),
        (
            lambda: attention.forward(Q, ones(2, 3, 7, 8), ones(2, 3, 7, 8)),
            ValueError,
            f"{EXPECTED_K} (2, 3, 7, 8) and (2, 3, 7, 8)",
        ),
        (
            lambda: attention.forward(Q, ones(2, 0, 7, 8), ones(2, 0, 7, 8)),
            ValueError,
            f"{EXPECTED_K} (2, 0, 7, 8) and (2, 0, 7, 8)",
        ),
        (
            lambda: attention.forward(Q, K, ones(2, 2, 6, 8)),
            ValueError,
            f"{EXPECTED_K} (2, 2, 7, 8) and (2, 2, 6, 8)",
        ),
        (
            lambda: attention.forward(Q, ones(2, 2, 7, 9), K),
            ValueError,
            f"{EXPECTED_K} (2, 2, 7, 9) and (2, 2, 7, 8)",
        ),
        (lambda: attention.forward(Q, K, K.half()), TypeError, "v: expected float32 like q, got float16"),
        (
            lambda: attention.forward(*[ones(1, 1, 2, 257)] * 3),
            ValueError,
            "q: head_dim: expected at most 256, got 257",
        ),
        (
            lambda: attention.forward(*[ones(1, 1, 2, 0)] * 3),
            ValueError,
            "q: expected a head_dim of at least 1, got 0",
        ),
        (
            lambda: attention.forward(*[ones(1, 1, 2, 4, dtype=torch.int32)] * 3),
            TypeError,
            "q: expected one of float32, float16, bfloat16, float64, got int32",
        ),
        (
            lambda: attention.forward(Q, K, K.to("meta")),
            ValueError,
            "v: expected on cpu, where q is, got meta",
        ),
        (lambda: attention.forward(Q, K, K, scale=0.0), ValueError, "scale: expected a positive number, got 0.0"),
        (lambda: attention.forward(Q, K, K, rate=1.0), ValueError, "rate: expected 0 <= rate < 1, got 1.0"),
        (
            lambda: attention.forward(Q, K, K, rate=0.5, noise=np.ones((2, 4, 5, 7), bool)),
            TypeError,
            "noise: kernels compute their masks, expected (key, first), got ndarray",
        ),
        (
            lambda: attention.backward(K, attention.forward(Q, K, K)[1]),
            ValueError,
            "dy: expected shape (2, 4, 5, 8), got (2, 2, 7, 8)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
