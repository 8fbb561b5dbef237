import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import torch_rng
from reference.torch_rng import Generator

needs_torch = "PyTorch is not installed"
SEEDS = [0, 123, 2**32 + 5, 2**63 - 1, -1]


@pytest.fixture(name="torch", scope="module")
def _torch():
    return pytest.importorskip("torch", reason=needs_torch)


@pytest.fixture(params=SEEDS)
def pair(request, torch):
    """The same stream twice: ours, PyTorch's."""
    return Generator(request.param), torch.Generator().manual_seed(request.param)


def assert_same_normals(torch, ours, theirs):
    """Equal bits where PyTorch runs its AVX2 code; elsewhere it rounds differently."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)


def test_known_numbers_without_torch():
    assert Generator(123).rand(3).tolist() == [0.29611194133758545, 0.516562283039093, 0.2516707181930542]
    assert Generator(123).normal((2, 3)).tolist() == [
        [-0.11146711558103561, 0.12036294490098953, -0.3696345090866089],
        [-0.2404179722070694, -1.1969243288040161, 0.20926935970783234],
    ]
    assert Generator(123).randperm(5).tolist() == [2, 0, 1, 3, 4]
    assert Generator(123).normal(20)[-3:].tolist() == [-1.4095724821090698, -0.4076268672943115, 0.7953261137008667]
    assert Generator(123).randint64() == 3624216819017203053


# A sequence of draws, so that each also finds the stream where the one before left it.
def test_a_mixed_sequence_follows_torch(pair, torch):
    ours, theirs = pair
    for n in (1, 7, 1000):
        np.testing.assert_array_equal(ours.rand(n), torch.rand(n, generator=theirs))
        np.testing.assert_array_equal(
            ours.rand((n, 2), np.float64), torch.rand(n, 2, dtype=torch.float64, generator=theirs)
        )
        assert_same_normals(torch, ours.normal(n), torch.randn(n, generator=theirs).numpy())
        assert ours.randint64() == torch.empty((), dtype=torch.int64).random_(generator=theirs).item()
        np.testing.assert_array_equal(ours.randint(-3, 10, n), torch.randint(-3, 10, (n,), generator=theirs))
        np.testing.assert_array_equal(ours.randperm(n), torch.randperm(n, generator=theirs))
        np.testing.assert_array_equal(ours.exponential(n), torch.empty(n).exponential_(generator=theirs))
        np.testing.assert_array_equal(
            ours.keep_mask((n, 3), 0.1), torch.empty(n, 3).bernoulli_(0.9, generator=theirs).bool()
        )
        assert_same_normals(torch, ours.normal((3,)), torch.randn(3, generator=theirs).numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("low, high", [(-1 / 768**0.5, 1 / 768**0.5), (0.3, 1.7), (1000, 1001), (2, 2)])
def test_uniform(pair, torch, low, high, dtype):
    ours, theirs = pair
    expected = torch.empty(40_001, dtype=getattr(torch, dtype)).uniform_(low, high, generator=theirs)
    np.testing.assert_array_equal(ours.uniform(40_001, low, high, dtype), expected)


# Either side of 16, and of a multiple of it; a piece is 16384 elements.
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31, 32, 18, 37, 1000, 16384, 16399, 50_000])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.3, 0.02)])
def test_normal(pair, torch, n, mean, std):
    ours, theirs = pair
    for _ in range(2):  # an odd number below 16 leaves a sine for the second time
        assert_same_normals(
            torch, ours.normal(n, mean, std), torch.empty(n).normal_(mean, std, generator=theirs).numpy()
        )


def test_normal_is_exact_for_a_million_elements(torch):
    assert_same_normals(
        torch,
        Generator(7).normal((1000, 1003)),
        torch.randn(1000, 1003, generator=torch.Generator().manual_seed(7)).numpy(),
    )


@pytest.mark.parametrize("n", [7, 16, 37, 20_000])
def test_normal_in_float64(pair, torch, n):
    ours, theirs = pair
    expected = torch.empty(n, dtype=torch.float64).normal_(0.3, 2.0, generator=theirs)
    np.testing.assert_allclose(ours.normal(n, 0.3, 2.0, np.float64), expected, rtol=0, atol=1e-14)


def test_small_normals_wait_across_larger_draws(pair, torch):
    ours, theirs = pair
    for n in (3, 20, 1, 5, 16, 2):
        assert_same_normals(torch, ours.normal(n), torch.randn(n, generator=theirs).numpy())


@pytest.mark.parametrize("n", [0, 1, 2, 5, 1000, 30_001])
def test_randperm(pair, torch, n):
    ours, theirs = pair
    np.testing.assert_array_equal(ours.randperm(n), torch.randperm(n, generator=theirs))
    assert ours.randint64() == torch.empty((), dtype=torch.int64).random_(generator=theirs).item()


@pytest.mark.parametrize("low, high", [(0, 2), (0, 50257), (5, 5 + 2**28 - 1), (5, 5 + 2**28), (-(2**62), 2**62)])
def test_randint(pair, torch, low, high):
    ours, theirs = pair
    np.testing.assert_array_equal(ours.randint(low, high, (50, 7)), torch.randint(low, high, (50, 7), generator=theirs))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential(pair, torch, dtype):
    ours, theirs = pair
    expected = torch.empty(20_001, dtype=getattr(torch, dtype)).exponential_(3.0, generator=theirs).numpy()
    np.testing.assert_allclose(ours.exponential(20_001, 3.0, dtype), expected, rtol=0 if dtype == "float32" else 1e-15)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_keep_mask_is_torch_dropout(torch, rate):
    torch.manual_seed(123)
    ours = Generator(123)
    for shape in ((3, 5), (2, 3, 50, 70)):  # the second takes more than a piece
        dropped = torch.nn.functional.dropout(torch.ones(shape), rate)
        keep = ours.keep_mask(shape, rate)
        assert keep.dtype == bool
        np.testing.assert_array_equal(keep, dropped != 0)
        np.testing.assert_array_equal(ours.rand(3), torch.rand(3))


def test_stream_noise_draws_in_call_order(torch):
    torch.manual_seed(5)
    noise = torch_rng.StreamNoise(Generator(5))
    for layer, site in ((1, 2), (0, 0)):
        expected = torch.nn.functional.dropout(torch.ones(2, 3, 4), 0.4) != 0
        np.testing.assert_array_equal(noise(layer, site, (2, 3, 4), 0.4), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_samples, replacement", [(1, False), (1, True), (6, False), (6, True)])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 500)])
def test_multinomial(pair, torch, shape, num_samples, replacement, dtype):
    ours, theirs = pair
    probs = np.random.default_rng(1).random(shape).astype(dtype) ** 3
    probs[..., 2] = 0
    for _ in range(3):
        expected = torch.multinomial(torch.from_numpy(probs), num_samples, replacement, generator=theirs)
        drawn = ours.multinomial(probs, num_samples, replacement)
        assert drawn.dtype == np.int64
        np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("n", [10, 1003])
def test_the_order_of_a_shuffling_data_loader(torch, n):
    torch.manual_seed(123)
    loader = torch.utils.data.DataLoader(torch.arange(n), batch_size=4, shuffle=True)
    ours = Generator(123)
    for _ in range(2):
        epoch = torch.cat(list(loader))
        ours.randint64()  # the seed of worker processes, drawn with or without them
        np.testing.assert_array_equal(Generator(ours.randint64()).randperm(n), epoch)


@pytest.mark.parametrize("draw", ["rand", "normal", "keep_mask", "exponential"])
def test_pieces_do_not_show(draw, monkeypatch):
    def all_at_once():
        generator = Generator(3)
        arguments = (0.5,) if draw == "keep_mask" else ()
        return getattr(generator, draw)((5, 101), *arguments), generator.randint64()

    whole, after = all_at_once()
    monkeypatch.setattr(torch_rng, "_PIECE", 48)
    pieces, after_pieces = all_at_once()
    np.testing.assert_array_equal(whole, pieces)
    assert after == after_pieces


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 700), max_size=4), st.integers(1, 15))
@settings(max_examples=30)
def test_state_is_restored_bit_for_bit(seed, draws, odd):
    generator = Generator(seed)
    for n in draws:
        generator.rand(n)
    generator.normal(odd)
    state = json.loads(json.dumps(generator.state()))

    def following(generator):
        return [generator.normal(4), generator.rand(700), generator.normal(33), generator.randperm(20)]

    expected = following(generator)
    for restored in (Generator.from_state(state), generator):
        restored.set_state(state)
        for a, b in zip(following(restored), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_float32_fused_multiply_add_rounds_once():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x, y = rng.standard_normal((2, 300)).astype(dtype)
        z = (-x * y).astype(dtype)  # all but cancels the product: two roundings would give 0
        found = torch_rng._fma(x, y, z)
        exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
        np.testing.assert_array_equal(found, np.array([float(e) for e in exact], dtype))
        assert np.any(found != 0)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda g: g.uniform(3, 1, 0), "low"),
        (lambda g: g.uniform(3, dtype=np.int64), "dtype"),
        (lambda g: g.normal(3, std=-1.0), "std"),
        (lambda g: g.exponential(3, 0.0), "rate"),
        (lambda g: g.keep_mask(3, 1.5), "rate"),
        (lambda g: g.randint(3, 3, 1), "low"),
        (lambda g: g.randperm(-1), "n"),
        (lambda g: g.randperm(2**31), "n"),
        (lambda g: g.multinomial(np.array(0.5)), "probs"),
        (lambda g: g.multinomial(np.array([])), "probs"),
        (lambda g: g.multinomial(np.array([0.5, -0.5])), "probs"),
        (lambda g: g.multinomial(np.array([0.5, np.nan])), "probs"),
        (lambda g: g.multinomial(np.array([[0.5, 0.5], [0.0, 0.0]])), "probs"),
        (lambda g: g.multinomial(np.array([0.5, 0.5]), 3), "num_samples"),
        (lambda g: g.set_state({"words": "00"}), "state"),
        (lambda g: g.set_state({"words": "00" * 8, "position": 0, "next_normal": None}), "state"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(Generator(0))
