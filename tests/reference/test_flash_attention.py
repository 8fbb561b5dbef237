"""FlashAttention against plain attention: the same numbers, whatever the tiles."""

import numpy as np
import pytest

from reference import attention, flash_attention

# B, H, G, T, S, D: around a tile, more keys than queries, more queries than keys, grouped heads
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 7, 5),
    (1, 4, 2, 63, 64, 8),
    (2, 2, 1, 64, 64, 3),
    (1, 2, 2, 65, 127, 5),
    (1, 6, 3, 70, 9, 4),
    (1, 2, 1, 1, 66, 7),
]


def problem(size, dtype=np.float64):
    B, H, G, T, S, D = size
    rng = np.random.default_rng(size)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D), (B, H, T, D)
    return [(1.3 * rng.normal(size=shape) + 0.4).astype(dtype) for shape in shapes]


def run(layer, qkv, dy, **settings):
    y, saved = layer.forward(*qkv, **settings)
    return y, *layer.backward(dy, saved)


def assert_same(results, expected):
    for result, truth in zip(results, expected, strict=True):
        assert result.shape == truth.shape
        np.testing.assert_allclose(result, truth, rtol=0, atol=1e-12 * max(1.0, np.abs(truth).max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_it_is_attention(size, causal, rate):
    *qkv, dy = problem(size)
    settings = {"causal": causal, "rate": rate, "noise": (0xFEDCBA9876543210, 5)}
    assert_same(run(flash_attention, qkv, dy, **settings), run(attention, qkv, dy, **settings))


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (8, 2), (128, 128)])
@pytest.mark.parametrize("size", [(1, 2, 1, 11, 13, 5), (1, 2, 1, 13, 11, 5)])
def test_the_tiles_do_not_matter(size, tiles):
    *qkv, dy = problem(size)
    settings = {"rate": 0.2, "noise": (3, 0), "scale": 0.7}
    flash = run(flash_attention, qkv, dy, **settings, block_q=tiles[0], block_k=tiles[1])
    assert_same(flash, run(attention, qkv, dy, **settings))


def test_a_mask_can_be_given():
    *qkv, dy = problem((2, 3, 3, 7, 7, 5))
    settings = {"rate": 0.5, "noise": np.random.default_rng(0).random((2, 3, 7, 7)) < 0.5}
    settings["block_q"] = settings["block_k"] = 4
    flash = run(flash_attention, qkv, dy, **settings)
    del settings["block_q"], settings["block_k"]
    assert_same(flash, run(attention, qkv, dy, **settings))


@pytest.mark.filterwarnings("error")
def test_large_values_stay_finite_and_float32_stays_float32():
    *qkv, dy = problem((1, 2, 2, 65, 70, 8), np.float32)
    for result in run(flash_attention, [1e4 * x for x in qkv], dy):
        assert result.dtype == np.float32
        assert np.isfinite(result).all()


def test_what_is_saved_of_the_softmax_is_one_number_for_each_query():
    *qkv, _ = problem((2, 3, 3, 7, 9, 5))
    _, saved = flash_attention.forward(*qkv, causal=False)
    s = qkv[0] @ qkv[1].swapaxes(-1, -2) / np.sqrt(5)
    lse = saved[2]
    assert lse.shape == (2, 3, 7)
    np.testing.assert_allclose(lse, np.log2(np.exp(s).sum(axis=-1)), rtol=1e-13)


def test_a_loop_can_be_watched():
    """Its last step holds what the pass returns, and earlier ones are not overwritten."""
    *qkv, dy = problem((1, 2, 1, 11, 13, 5))
    y, saved = flash_attention.forward(*qkv, block_q=4, block_k=4)
    launch, _, lse = saved
    dq, dk, dv = flash_attention.backward(dy, saved)
    delta, rows, columns = (y * dy).sum(axis=-1), np.arange(4, 8), np.arange(4, 8)
    forward = list(flash_attention.forward_steps(launch, 0, 1, rows))
    assert [step.columns[0] for step in forward] == [0, 4, 8]
    assert forward[-1].o / forward[-1].l[:, None] == pytest.approx(y[0, 1, rows], rel=1e-14)
    assert len({step.o.tobytes() for step in forward}) == 3
    queries = list(flash_attention.backward_queries_steps(launch, dy, lse, delta, 0, 1, rows))
    assert np.array_equal(queries[-1].dq * launch.scale, dq[0, 1, rows])
    assert len({step.dq.tobytes() for step in queries}) == 3
    keys = list(flash_attention.backward_keys_steps(launch, dy, lse, delta, 0, 0, columns))
    assert np.array_equal(keys[-1].dk * launch.scale, dk[0, 0, columns])
    assert np.array_equal(keys[-1].dv, dv[0, 0, columns])
    assert len({step.dk.tobytes() for step in keys}) == len(keys) == 6
