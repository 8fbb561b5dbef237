"""The adapter: what PyTorch expects of an operator holds for every kernel, whatever the layer.

What the kernels compute is held against the reference by the table of operators, in tests/gpt/parity.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.library import opcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from gpt import ops  # noqa: E402
from kernels import (  # noqa: E402
    add_layer_norm,
    add_rms_norm,
    attention,
    autograd,
    bias_gelu,
    cross_entropy,
    dropout,
    gelu,
    launch,
    layer_norm,
    linear_cross_entropy,
    philox,
    rms_norm,
    rope,
    swiglu,
)
from reference import philox as reference_philox  # noqa: E402

NOISE = (2**64 - 25, 7)


def draw(*shape, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


TARGETS = torch.tensor([[3, 0, -100, 12, 9], [4, 4, 1, -100, 2]])
# layer -> arguments of its operator
ARGUMENTS = {
    layer_norm: lambda: (draw(2, 5, 13), draw(13), draw(13), 1e-5),
    add_layer_norm: lambda: (draw(2, 5, 13), draw(5, 2, 13).transpose(0, 1), draw(13), draw(13), 1e-5),
    rms_norm: lambda: (draw(2, 5, 13), draw(13), 1e-6),
    add_rms_norm: lambda: (draw(2, 5, 13), draw(5, 2, 13).transpose(0, 1), draw(13), 1e-6),
    rope: lambda: (draw(2, 4, 5, 6), draw(2, 5, 3, grad=False), draw(2, 5, 3, grad=False).flip(0), True),
    swiglu: lambda: (draw(2, 5, 13), draw(5, 2, 13).transpose(0, 1)),
    gelu: lambda: (draw(2, 5, 13), "tanh"),
    bias_gelu: lambda: (draw(2, 5, 13), draw(13), "none"),
    dropout: lambda: (draw(2, 5, 13), 0.3, NOISE),
    attention: lambda: (draw(2, 4, 5, 6), draw(2, 2, 7, 6), draw(2, 2, 7, 6), True, None, 0.3, NOISE),
    cross_entropy: lambda: (draw(2, 5, 13), TARGETS, -100),
    linear_cross_entropy: lambda: (draw(2, 5, 6), draw(13, 6), draw(13), TARGETS, -100),
}
LAYERS = pytest.mark.parametrize("layer", ARGUMENTS, ids=lambda layer: layer.__name__.removeprefix("kernels."))


def name_of(layer):
    return layer.__name__.removeprefix("kernels.")


def first(results):
    return results[0] if isinstance(results, tuple) else results


@LAYERS
def test_opcheck(layer):
    """Schema, registration of the gradient, the fake implementation, and tracing with dynamic shapes."""
    arguments = tuple(philox.signed(x) if x is NOISE else x for x in ARGUMENTS[layer]())
    outcome = opcheck(getattr(torch.ops.twingrad, name_of(layer)).default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@LAYERS
def test_a_compiled_function_gives_the_same(layer):
    def loss(*arguments):
        return sum(result.float().square().sum() for result in autograd._as_tuple(layer.operator(*arguments)))

    torch.compiler.reset()  # of one function it would compile eight versions at most
    arguments = ARGUMENTS[layer]()
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    eager = loss(*arguments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_function_takes_sequences_of_any_length():
    compiled = torch.compile(lambda *qkv: attention.operator(*qkv), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 9, 70):
        qkv = [draw(1, 2, length, 8, grad=False) for _ in range(3)]
        torch.testing.assert_close(compiled(*qkv), attention.operator(*qkv))


@LAYERS
def test_only_what_needs_a_gradient_gets_one(layer):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in ARGUMENTS[layer]()]
    assert not first(layer.operator(*arguments)).requires_grad
    arguments[0].requires_grad_()
    first(layer.operator(*arguments)).sum().backward()
    assert arguments[0].grad.shape == arguments[0].shape


@LAYERS
def test_autocast_follows_pytorch(layer):
    """The dtype of the result under autocast is that of PyTorch's own operator."""
    theirs = getattr(ops, name_of(layer))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [
            x.detach().to(dtype) if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x
            for x in ARGUMENTS[layer]()
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert first(layer.operator(*arguments)).dtype == CUDA_AUTOCAST[name_of(layer)](dtype), theirs


# What PyTorch's autocast does on a GPU, where it is not the same list as on the CPU.
CUDA_AUTOCAST = {
    "layer_norm": lambda dtype: torch.float32,
    "add_layer_norm": lambda dtype: torch.float32,
    "rms_norm": lambda dtype: torch.float32,
    "add_rms_norm": lambda dtype: torch.float32,
    "rope": lambda dtype: dtype,
    "swiglu": lambda dtype: dtype,
    "gelu": lambda dtype: dtype,
    "bias_gelu": lambda dtype: dtype,
    "dropout": lambda dtype: dtype,
    "attention": lambda dtype: torch.bfloat16,
    "cross_entropy": lambda dtype: torch.float32,
    "linear_cross_entropy": lambda dtype: torch.float32,
}


@pytest.mark.parametrize("layer", [attention, dropout], ids=name_of)
def test_checkpointing_drops_the_same_elements_again(layer):
    arguments = ARGUMENTS[layer]()
    inputs = [x for x in arguments if isinstance(x, torch.Tensor)]

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), inputs)

    kept = gradients(layer.operator(*arguments))
    recomputed = gradients(checkpoint(layer.operator, *arguments, use_reentrant=False))
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 3, 4, 11), (7, 1030), (5, 3), (9,)])
def test_dropout_keeps_what_the_reference_keeps(shape):
    y = dropout.operator(torch.ones(shape), 0.3, NOISE)
    np.testing.assert_array_equal(y.numpy() != 0, reference_philox.keep_mask(NOISE, shape, 0.3))


def test_dropout_without_noise_hands_on():
    x = draw(3, 4)
    for rate, noise in ((0.0, NOISE), (0.5, None)):
        assert torch.equal(dropout.operator(x, rate, noise), x)


@pytest.mark.parametrize("layer", [layer_norm, rms_norm, swiglu, gelu], ids=name_of)
def test_empty_tensors(layer):
    arguments = ARGUMENTS[layer]()
    x = torch.empty(0, 13, requires_grad=True)
    y = layer.operator(x, *((x,) if layer is swiglu else arguments[1:]))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 13)


@pytest.mark.parametrize("layer, parameters", [(add_layer_norm, 2), (add_rms_norm, 1)])
def test_a_norm_of_a_sum_of_two_types_has_the_wider_one(layer, parameters):
    x, residual = draw(3, 8), draw(3, 8, dtype=torch.bfloat16)
    y, total = layer.operator(x, residual, *(draw(8) for _ in range(parameters)))
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + residual)
    dx, dresidual = torch.autograd.grad(y.sum() + total.square().sum(), [x, residual])
    assert dx.dtype == torch.float32
    assert dresidual.dtype == torch.bfloat16


@pytest.mark.parametrize("layer, parameters", [(layer_norm, 2), (rms_norm, 1)])
@pytest.mark.parametrize("width", [8_192, 8_193, 16_384])
def test_wide_rows(layer, parameters, width):
    """Wider than other tests go: the last that fit one kernel's registers, and those whose sums need another."""
    inputs, dy = [draw(5, width), *(draw(width) for _ in range(parameters))], draw(5, width, grad=False)
    ours, theirs = (
        torch.autograd.grad(norm(*inputs), inputs, dy) for norm in (layer.operator, getattr(ops, name_of(layer)))
    )
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_view_of_fused_projections_needs_no_copy():
    """q, k and v as slices of one tensor, in whatever order its axes lie."""
    fused = draw(2, 7, 3, 4, 8, grad=False)  # (B, T, qkv, H, D)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    addresses = []

    def note(kernel, grid, *arguments, **options):
        addresses.extend(x.data_ptr() for x in arguments[:3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", note)
        attention.forward(q, k, v)
    assert addresses == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    torch.testing.assert_close(attention.operator(q, k, v), ops.attention(q, k, v))
    y = attention.operator(q, k, v)
    assert y.transpose(1, 2).reshape(2, 7, 32).data_ptr() == y.data_ptr()


def test_turned_heads_lie_in_memory_as_attention_s():
    """Heads as a projection writes them go in without a copy, and come out, and their gradient, the same way."""
    x = draw(2, 7, 4, 8).transpose(1, 2)
    cos, sin = (draw(7, 4, grad=False) for _ in range(2))
    y = rope.operator(x, cos, sin)
    assert y.transpose(1, 2).reshape(2, 7, 32).data_ptr() == y.data_ptr()
    assert torch.autograd.grad(y.sum(), x)[0].transpose(1, 2).is_contiguous()
    with pytest.MonkeyPatch.context() as patch:
        addresses = []
        patch.setattr(launch, "launch", lambda kernel, grid, x, *rest, **options: addresses.append(x.data_ptr()))
        rope.forward(x[:, :, 3:], cos[3:], sin[3:])
    assert addresses == [x[:, :, 3:].data_ptr()]


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_16_bits_are_turned_by_angles_of_32(interleaved):
    x = draw(2, 3, 5, 64, dtype=torch.bfloat16, grad=False)
    cos, sin = (part(torch.arange(5.0)[:, None] * torch.linspace(0.01, 1, 32)) for part in (torch.cos, torch.sin))
    y = rope.operator(x, cos, sin, interleaved)
    torch.testing.assert_close(y, ops.rope(x, cos, sin, interleaved), rtol=0, atol=0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_nothing_is_turned(shape):
    x, table = torch.ones(shape, requires_grad=True), torch.ones(shape[2], 4)
    y = rope.operator(x, table, table)
    assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_separate_operators_add_before_they_normalize():
    x, residual, weight, bias = draw(3, 8), draw(3, 8), draw(8), draw(8)
    for operators in (ops.TORCH, ops.choose("triton")):
        separate = ops.separate(operators)
        for fused, apart, rest in (
            (operators.add_layer_norm, separate.add_layer_norm, (weight, bias, 1e-5)),
            (operators.add_rms_norm, separate.add_rms_norm, (weight, 1e-6)),
        ):
            assert apart is not fused
            torch.testing.assert_close(apart(x, residual, *rest), fused(x, residual, *rest))


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_attention_of_nothing(shape):
    qkv = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    y = attention.operator(*qkv)
    assert y.shape == shape
    assert all(gradient.shape == shape for gradient in torch.autograd.grad(y.sum(), qkv))


def test_queries_without_any_key_give_0():
    q, k = torch.ones(1, 2, 3, 8, requires_grad=True), torch.ones(1, 2, 0, 8, requires_grad=True)
    y = attention.operator(q, k, k, False)
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), q)[0].any()


@pytest.mark.parametrize("D", [1, 200, 256])
def test_the_narrowest_and_the_widest_heads(D):
    q, k, v = (draw(1, 2, 33, D, grad=False).double() for _ in range(3))
    torch.testing.assert_close(attention.operator(q, k, v), ops.attention(q, k, v))


class NoAnswer(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host asks the device for a number: it would have to wait for it."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(named or {}))


@LAYERS
def test_nothing_waits_for_the_device(layer):
    arguments = ARGUMENTS[layer]()
    with NoAnswer():
        first(layer.operator(*arguments)).sum().backward()


def test_a_target_out_of_range_makes_the_loss_nan_and_the_others_gradients_stay():
    logits, targets = draw(3, 5), torch.tensor([1, 5, 2])
    loss = cross_entropy.operator(logits, targets)
    assert loss.isnan()
    assert torch.autograd.grad(loss, logits)[0].isnan().any(dim=1).tolist() == [False, True, False]


def test_the_fused_loss_never_holds_all_logits(monkeypatch):
    """The largest tensor made at 8,192 x 50,257, beside the weight's gradient, is less than a quarter of the logits."""
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            made.extend(x.untyped_storage().nbytes() for x in autograd._as_tuple(result) if isinstance(x, torch.Tensor))
            return result

    N, C, V = 8192, 768, 50_257
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((N, C), (V, C)))
    with Sizes():
        _, saved = linear_cross_entropy.forward(x, weight, None, torch.empty(N, dtype=torch.int64, device="meta"))
        linear_cross_entropy.backward(torch.empty((), device="meta"), saved)
    assert max(made) == 4 * V * C, "dweight in float32"
    assert sorted(set(made))[-2] < 2 * N * V / 4


# Bad input: one line each, before any launch.


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: layer_norm.operator(torch.ones(2, 16_385), torch.ones(16_385), None),
            ValueError,
            "x: width of a row: expected at most 16384, got 16385",
        ),
        (
            lambda: layer_norm.operator(torch.ones(2, 3), torch.ones(4), None),
            ValueError,
            "weight: expected shape (3,), got (4,)",
        ),
        (
            lambda: layer_norm.operator(torch.ones(2, 3), torch.ones(3), torch.ones(1, 3)),
            ValueError,
            "bias: expected shape (3,), got (1, 3)",
        ),
        (
            lambda: layer_norm.operator(torch.ones(2, 3), torch.ones(3, device="meta"), None),
            ValueError,
            "weight: expected on cpu, where x is, got meta",
        ),
        (
            lambda: gelu.operator(torch.ones(3, dtype=torch.int64)),
            TypeError,
            "x: expected one of float32, float16, bfloat16, float64, got int64",
        ),
        (
            lambda: gelu.operator(torch.ones(3, dtype=torch.float8_e5m2)),
            TypeError,
            "x: expected one of float32, float16, bfloat16, float64, got float8_e5m2",
        ),
        (lambda: gelu.operator(torch.ones(3), "erf"), ValueError, "approximate: 'erf' is not one of none, tanh"),
        (
            lambda: bias_gelu.operator(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            "bias: expected shape (3,), got (2,)",
        ),
        (
            lambda: add_layer_norm.operator(torch.ones(2, 3), torch.ones(3), torch.ones(3), None),
            ValueError,
            "residual: expected shape (2, 3), got (3,)",
        ),
        (
            lambda: rms_norm.operator(torch.ones(2, 16_385), torch.ones(16_385)),
            ValueError,
            "x: width of a row: expected at most 16384, got 16385",
        ),
        (
            lambda: rms_norm.operator(torch.ones(2, 3), torch.ones(4)),
            ValueError,
            "weight: expected shape (3,), got (4,)",
        ),
        (
            lambda: add_rms_norm.operator(torch.ones(2, 3), torch.ones(3), torch.ones(3)),
            ValueError,
            "residual: expected shape (2, 3), got (3,)",
        ),
        (
            lambda: swiglu.operator(torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            "up: expected shape (2, 3), got (2, 4)",
        ),
        (
            lambda: rope.operator(torch.ones(2, 3, 4), *(torch.ones(3, 2),) * 2),
            ValueError,
            "x: expected shape (B, H, T, D), got (2, 3, 4)",
        ),
        (
            lambda: rope.operator(torch.ones(1, 2, 3, 5), *(torch.ones(3, 2),) * 2),
            ValueError,
            "x: expected an even head_dim of at least 2, got 5",
        ),
        (
            lambda: rope.operator(torch.ones(1, 2, 3, 258), *(torch.ones(3, 129),) * 2),
            ValueError,
            "x: head_dim: expected at most 256, got 258",
        ),
        (
            lambda: rope.operator(torch.ones(2, 1, 3, 8), *(torch.ones(3, 8),) * 2),
            ValueError,
            "cos, sin: expected both (3, 4) or both (2, 3, 4), got (3, 8) and (3, 8)",
        ),
        (
            lambda: rope.operator(torch.ones(2, 1, 3, 8), torch.ones(3, 4), torch.ones(2, 3, 4)),
            ValueError,
            "cos, sin: expected both (3, 4) or both (2, 3, 4), got (3, 4) and (2, 3, 4)",
        ),
        (lambda: dropout.operator(torch.ones(2), 1.0, NOISE), ValueError, "rate: expected 0 <= rate < 1, got 1.0"),
        (
            lambda: dropout.forward(torch.ones(2), 0.5, np.ones(2, bool)),
            TypeError,
            "noise: kernels compute their masks, expected (key, first), got ndarray",
        ),
        (
            lambda: attention.operator(*(torch.ones(1, 1, 2, 257) for _ in range(3))),
            ValueError,
            "q: head_dim: expected at most 256, got 257",
        ),
        (
            lambda: attention.operator(torch.ones(1, 3, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)),
            ValueError,
            "k, v: expected both (1, G, S, 8) with G dividing 3, got (1, 2, 2, 8) and (1, 2, 2, 8)",
        ),
        (
            lambda: attention.operator(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8).half()),
            TypeError,
            "v: expected float32 like q, got float16",
        ),
        (
            lambda: attention.operator(*(torch.ones(1, 1, 2, 8) for _ in range(3)), True, -1.0),
            ValueError,
            "scale: expected a positive number, got -1.0",
        ),
        (
            lambda: cross_entropy.operator(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "targets: expected shape (2,), got (3,)",
        ),
        (
            lambda: cross_entropy.operator(torch.ones(2, 3), torch.zeros(2)),
            TypeError,
            "targets: expected int64 or int32, got float32",
        ),
        (
            lambda: linear_cross_entropy.operator(
                torch.ones(2, 3), torch.ones(5, 4), None, torch.zeros(2, dtype=torch.int64)
            ),
            ValueError,
            "weight: expected shape (5, 3), got (5, 4)",
        ),
        (
            lambda: launch.launch(None, (2**31,), torch.ones(1)),
            ValueError,
            "too large for one launch: a grid of (2147483648,), expected at most (2147483647, 65535)",
        ),
        (
            lambda: launch.check(x=torch.empty(2**31, 1, device="meta")),
            ValueError,
            "x: expected at most 2147483647 rows and columns, got shape (2147483648, 1)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_tensor_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", type(launch.INTERPRETED)(False))
    with pytest.raises(RuntimeError, match="^x: on the CPU.*TRITON_INTERPRET=1"):
        gelu.forward(torch.ones(3))
    with pytest.raises(TypeError, match="expected one of float32, float16, bfloat16, got float64"):
        launch.check(x=torch.ones(3, device="meta", dtype=torch.float64))


def test_signed_words_hold_the_bits_of_unsigned_ones():
    key, first_index, threshold, factor = philox.arguments(0.75, (2**64 - 1, 2**63))
    assert (key, first_index, threshold) == (-1, -(2**63), 3 * 2**30 - 2**32)
    assert factor == 4.0


def test_launches_are_recorded_instead_of_made():
    with launch.recorded() as launches:
        y, saved = layer_norm.forward(*(torch.empty(*shape, device="meta") for shape in ((4, 8), (8,), (8,))))
        layer_norm.backward(torch.empty_like(y), saved)
    assert [launched.kernel for launched in launches] == [layer_norm.forward_kernel, layer_norm.backward_kernel]
    assert launches[0].options["BLOCK"] == 16


def test_a_weight_s_gradient_over_many_rows_does_not_overflow_float16():
    """No smaller scale of the loss could mend it, for that is only applied in the backward pass."""
    x, weight = torch.full((1024, 4), 500.0, dtype=torch.float16), torch.zeros(8, 4, dtype=torch.float16)
    weight.requires_grad_()
    linear_cross_entropy.operator(x, weight, None, torch.zeros(1024, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((4,), -500 * 7 / 8), rtol=1e-3, atol=0)
