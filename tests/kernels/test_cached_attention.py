"""Attention over a cache where the table of operators does not go: splits, a cache's memory, PyTorch, and bad input.

Results at the table's sizes are held against the reference in tests/gpt/parity.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.library import opcheck  # noqa: E402

from gpt import ops  # noqa: E402
from kernels import attention, cached_attention, launch  # noqa: E402
from reference import cached_attention as reference  # noqa: E402


def draw(*shape, dtype=torch.float64):
    """Not centred, so that no mean is 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (1.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.4).to(dtype)


def problem(B, H, G, T, S, D, dtype=torch.float64):
    """q, k, v and starts, from rows without a past to rows that fill the cache."""
    q, k, v = draw(B, H, T, D, dtype=dtype), draw(B, G, S, D, dtype=dtype), draw(B, G, S, D + 1, dtype=dtype)[..., 1:]
    return q, k, v, torch.linspace(0, S - T, B).round().long()


def run(*arguments, **named):
    return cached_attention.forward(*arguments, **named)[0]


def assert_same(result, expected):
    """To 1e-11 of the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def splits_of(monkeypatch, programs, fewest=32):
    """Have a device of so many programs, and splits of few keys."""
    monkeypatch.setattr(launch, "programs", lambda device, each: programs)
    monkeypatch.setattr(cached_attention, "FEWEST_KEYS", fewest)


# Rows.


@pytest.mark.parametrize("H, G, T", [*((H, G, T) for H, G in [(2, 2), (6, 2), (5, 1)] for T in (1, 4)), (4, 2, 33)])
def test_a_row_among_others_is_attended_to_as_if_it_were_alone(H, G, T):
    q, k, v, starts = problem(5, H, G, T, 140, 8)
    together = run(q, k, v, starts)
    for b, start in enumerate(starts.tolist()):
        own = slice(0, start + T)
        assert_same(together[b : b + 1], attention.forward(q[b : b + 1], k[b : b + 1, :, own], v[b : b + 1, :, own])[0])


def test_what_lies_after_a_row_s_own_keys_is_not_even_read():
    q, k, v, starts = problem(4, 2, 2, 3, 200, 8)
    before = run(q, k, v, starts)
    after = (torch.arange(200) >= starts[:, None] + 3)[:, None, :, None]
    assert torch.equal(run(q, k.masked_fill(after, torch.nan), v.masked_fill(after, torch.nan), starts), before)


@pytest.mark.parametrize("starts", [[-1, -5], [69, 1000], [-(2**31), 2**31 - 9]])
def test_starts_out_of_range_touch_nothing_outside(starts):
    q, k, v, _ = problem(2, 2, 1, 2, 70, 8)
    k, v = (torch.full((2, 1, 90, 8), torch.nan).double()[:, :, 10:80].copy_(x) for x in (k, v))
    assert run(q, k, v, torch.tensor(starts)).isfinite().all()


# Splits.


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
@pytest.mark.parametrize("S", [31, 64, 65, 300, 1000])
def test_one_split_and_many_give_the_same(monkeypatch, programs, S):
    """More splits too than are added up at a time."""
    arguments = problem(3, 4, 2, 2, S, 8)
    splits_of(monkeypatch, programs)
    assert_same(run(*arguments), reference.forward(*(x.numpy() for x in arguments))[0])


def test_splits_follow_from_shapes_and_the_device():
    def splits(B, T, S):
        q, k = (torch.empty(B, 12, length, 64, device="meta", dtype=torch.bfloat16) for length in (T, S))
        with launch.recorded() as launches:
            cached_attention.forward(q, k, k, torch.empty(B, dtype=torch.int64, device="meta"))
        return launches[0].arguments[4].shape[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "programs", lambda device, each: each * 132)
        assert splits(1, 1, 100) == 1
        assert splits(1, 1, 1024) == 8  # as many as there are keys for
        assert splits(1, 1, 100_000) == 44  # as many as the device has programs for
        assert splits(16, 1, 1024) == 3
        assert splits(64, 1, 100_000) == 1
        assert splits(1, 1024, 1024) == 1


def test_the_same_bits_twice(monkeypatch):
    splits_of(monkeypatch, 1000)
    arguments = problem(3, 4, 2, 5, 300, 16, torch.bfloat16)
    assert torch.equal(run(*arguments), run(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_pytorchs_over_many_splits(monkeypatch, dtype):
    splits_of(monkeypatch, 1000)
    arguments = problem(2, 4, 2, 17, 600, 64, dtype)
    true = reference.forward(*(x.double().numpy() for x in arguments[:3]), arguments[3].numpy())[0]
    ours, theirs = (y.double().numpy() - true for y in (run(*arguments), ops.cached_attention(*arguments)))
    assert np.linalg.norm(ours) <= 2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values_stay_finite(monkeypatch, dtype):
    splits_of(monkeypatch, 1000)
    q, k, v, starts = problem(2, 2, 1, 3, 200, 16, dtype)
    assert run(1e4 * q, 1e4 * k, 1e4 * v, starts).isfinite().all()


# Memory.


@pytest.mark.parametrize("heads_inside", [True, False])
def test_a_part_of_a_larger_cache_needs_no_copy(monkeypatch, heads_inside):
    """Its first columns, as they are; heads before positions in memory, or after them."""
    q, k, v, starts = problem(3, 4, 2, 2, 70, 16)
    expected, addresses, sound = run(q, k, v, starts), [], launch.launch

    def part(x):
        cache = torch.full((3, 2, 100, 16), torch.nan, dtype=x.dtype)
        cache = cache if heads_inside else cache.transpose(1, 2).contiguous().transpose(1, 2)
        cache[:, :, :70] = x
        return cache[:, :, :70]

    def note(kernel, grid, *arguments, **options):
        addresses.extend(x.data_ptr() for x in arguments[:4] if isinstance(x, torch.Tensor))
        sound(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "launch", note)
    q, k, v = q.transpose(1, 2).contiguous().transpose(1, 2), part(k), part(v)
    assert torch.equal(run(q, k, v, starts), expected)
    assert addresses[:4] == [x.data_ptr() for x in (q, k, v, starts)]


def test_any_strides():
    q, k, v, starts = problem(3, 4, 2, 5, 70, 12)
    expected = run(q, k, v, starts)
    views = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v)]
    assert torch.equal(run(*views, starts.repeat_interleave(2)[::2]), expected)
    assert torch.equal(run(q, k, v, starts.int()), expected)


def test_heads_are_joined_without_a_copy():
    assert run(*problem(2, 4, 2, 5, 9, 8)).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("size", [(0, 2, 1, 1, 7, 4), (2, 2, 1, 0, 7, 4), (2, 2, 1, 0, 0, 4)])
def test_nothing_to_do(size):
    B, H, _, T, _, D = size
    assert run(*problem(*size)).shape == (B, H, T, D)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 17, 200, 256])
def test_head_dimensions_from_end_to_end(head_dim):
    arguments = problem(2, 2, 1, 3, 40, head_dim)
    assert_same(run(*arguments, 0.3), reference.forward(*(x.numpy() for x in arguments), 0.3)[0])


def test_what_is_compiled_does_not_depend_on_lengths():
    def launches(B, T, S):
        q, k = (torch.empty(B, length, 4, 64, device="meta", dtype=torch.bfloat16) for length in (T, S))
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        with launch.recorded() as made:
            cached_attention.forward(q, k, k, torch.empty(B, dtype=torch.int64, device="meta"))
        return [(launched.kernel, launched.options) for launched in made]

    assert launches(1, 1, 1) == launches(3, 512, 8192)
    assert len(launches(1, 1, 1)) == 2


# PyTorch.


def arguments(dtype=torch.float32):
    return problem(3, 4, 2, 2, 70, 8, dtype)


def test_opcheck():
    """Schema, the fake implementation, and tracing with dynamic shapes."""
    outcome = opcheck(torch.ops.twingrad.cached_attention.default, (*arguments(), None))
    assert set(outcome.values()) == {"SUCCESS"}


def test_a_compiled_function_gives_the_same_while_a_text_grows():
    compiled = torch.compile(cached_attention.operator, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (5, 70, 300):
        given = problem(2, 4, 2, 3, S, 8)
        assert_same(compiled(*given), ops.cached_attention(*given))


def test_autocast_follows_pytorch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cached_attention.operator(*arguments()).dtype == torch.bfloat16


def test_a_gradient_that_is_asked_for_is_an_error():
    q, k, v, starts = arguments()
    assert not cached_attention.operator(q, k, v, starts).requires_grad
    y = cached_attention.operator(q.requires_grad_(), k, v, starts)
    with pytest.raises(NotImplementedError, match="^cached_attention: has no gradient$"):
        y.sum().backward()


class NoAnswer(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host asks the device for a number: it would have to wait for it."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(named or {}))


def test_nothing_waits_for_the_device():
    with NoAnswer():
        cached_attention.operator(*arguments())


# Bad input: one line each, before any launch.


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(3, 2, 8)}, ValueError, "q: expected shape (B, H, T, D), got (3, 2, 8)"),
        (
            {"k": torch.ones(3, 3, 70, 8)},
            ValueError,
            "k, v: expected both (3, G, S, 8) with G dividing 4, got (3, 3, 70, 8) and (3, 2, 70, 8)",
        ),
        ({"v": torch.ones(3, 2, 70, 8).half()}, TypeError, "v: expected float32 like q, got float16"),
        (
            {"k": torch.ones(3, 2, 1, 8), "v": torch.ones(3, 2, 1, 8)},
            ValueError,
            "k, v: expected the keys of all 2 queries at least, got 1",
        ),
        (
            {"q": torch.ones(3, 4, 2, 257), "k": torch.ones(3, 2, 70, 257), "v": torch.ones(3, 2, 70, 257)},
            ValueError,
            "q: head_dim: expected at most 256, got 257",
        ),
        ({"starts": torch.zeros(4, dtype=torch.int64)}, ValueError, "starts: expected shape (3,), got (4,)"),
        ({"starts": torch.zeros(3)}, TypeError, "starts: expected int64 or int32, got float32"),
        ({"starts": torch.zeros(3, dtype=torch.bool)}, TypeError, "starts: expected int64 or int32, got bool"),
        (
            {"starts": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            "starts: expected on cpu, where q is, got meta",
        ),
        ({"scale": -1.0}, ValueError, "scale: expected a positive number, got -1.0"),
    ],
)
@pytest.mark.parametrize("function", [cached_attention.forward, cached_attention.operator])
def test_bad_input(function, change, error, message):
    given = dict(zip(("q", "k", "v", "starts"), arguments(), strict=True)) | change
    with pytest.raises(error) as caught:
        function(**given)
    assert str(caught.value) == message
