"""Every layer, by the table of operators: each row through each gate. And what a layer does at its edges."""

import math

import numpy as np
import pytest

from gpt.parity import check
from gpt.parity.gates import GATES
from gpt.parity.ops import ROWS
from reference import (
    attention,
    cached_attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    pieces,
    token_logps,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


PASSES = [(row, gate) for row in ROWS.values() for gate in GATES.values() if gate.cases(row)]


def test_only_a_layer_without_gradients_is_spared_a_gate():
    spared = {(row.layer, gate.name) for row in ROWS.values() for gate in GATES.values() if (row, gate) not in PASSES}
    assert spared == {("cached_attention", "differences")}


@pytest.mark.parametrize("row, gate", PASSES, ids=[f"{row.name}-{gate.name}" for row, gate in PASSES])
def test_every_layer_passes_every_gate(row, gate):
    if check.missing(gate.needs):
        pytest.skip(f"{gate.needs} is not installed")
    results = [result for case in gate.cases(row) for result in gate.results(row, case)]
    assert results
    assert not [str(result) for result in results if not result.passed]


def rng():
    return np.random.default_rng(0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_values_of_1e4_stay_finite_without_a_warning(row, dtype):
    for case in row.cases:
        if case.scale == 1e4:
            assert all(np.isfinite(tensor).all() for tensor in row.problem(case, dtype).run().values())


# ---------------------------------------------------------------- embedding


@pytest.mark.parametrize("wrong", [-1, 7])
def test_embedding_refuses_an_id_that_it_has_no_row_for(wrong):
    with pytest.raises(ValueError, match=rf"ids: {wrong} is outside the embedding, expected 0 <= id < 7"):
        embedding.forward(np.array([[0, wrong, 3]]), np.ones((7, 5)))


def test_embedding_adds_its_gradient_to_what_is_there():
    ids, weight = rng().integers(0, 7, (3, 5)), rng().normal(size=(7, 2))
    y, saved = embedding.forward(ids, weight)
    alone = embedding.backward(y, saved)
    there = np.full(weight.shape, 0.5)
    assert embedding.backward(y, saved, there) is there
    np.testing.assert_allclose(there, alone + 0.5, rtol=1e-14)


def test_embedding_of_no_ids_has_no_gradient():
    y, saved = embedding.forward(np.zeros((0,), int), np.ones((7, 5)))
    assert y.shape == (0, 5)
    assert not embedding.backward(y, saved).any()


# ---------------------------------------------------------------- linear, layer norm, gelu


def test_linear_writes_its_weight_gradient_where_it_is_told():
    x, weight = rng().normal(size=(3, 5, 7)), rng().normal(size=(2, 7))
    y, saved = linear.forward(x, weight)
    expected, out = linear.backward(y, saved)[1], np.empty_like(weight)
    assert linear.backward(y, saved, out)[1] is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000])
def test_rows_are_summed_whatever_their_number(rows):
    x = rng().normal(size=(rows, 3))
    np.testing.assert_allclose(pieces.sum_rows(x), x.sum(axis=0), atol=1e-12)


def test_rounding_of_a_sum_of_rows_does_not_grow_with_their_number():
    x = rng().random((1 << 17, 3), np.float32) + 1
    np.testing.assert_allclose(pieces.sum_rows(x), x.sum(axis=0, dtype=np.float64), rtol=3e-6)


def test_layer_norm_of_a_constant_row_is_its_bias():
    y, saved = layer_norm.forward(np.full((2, 5), 7.0), np.arange(5.0), np.arange(5.0))
    np.testing.assert_array_equal(y, [np.arange(5.0)] * 2)
    assert np.isfinite(layer_norm.backward(y, saved)[0]).all()


@pytest.mark.parametrize("dtype, digits", [(np.float32, 3e-7), (np.float64, 1e-15)])
def test_the_normal_distribution_function_keeps_its_digits_in_both_tails(dtype, digits):
    x = np.linspace(-12, 12, 2001).astype(dtype)
    x = x[np.abs(x) > 1e-6]
    true = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    # The argument's own rounding, times how fast the tail falls, belongs to the result's error.
    steepness = 1 + np.minimum(x.astype(np.float64) ** 2, 200)
    normal = true > np.finfo(dtype).tiny * 100
    error = np.abs(gelu.normal_cdf(x).astype(np.float64) - true) / true
    assert (error[normal] <= digits * steepness[normal]).all()


def test_gelu_refuses_an_unknown_approximation():
    with pytest.raises(ValueError, match="approximate: 'fast' is not one of none, tanh"):
        gelu.forward(np.ones(3), "fast")


def test_gelu_of_a_large_array_does_not_depend_on_its_pieces():
    x = rng().normal(size=(3 * pieces.PIECE // 100, 101)).astype(np.float32)
    for approximate in ("none", "tanh"):
        y, saved = gelu.forward(x, approximate)
        dx = gelu.backward(x, saved)
        for rows in (slice(0, 5), slice(-5, None)):
            few, saved_few = gelu.forward(x[rows], approximate)
            np.testing.assert_array_equal(y[rows], few)
            np.testing.assert_array_equal(dx[rows], gelu.backward(x[rows], saved_few))


# ---------------------------------------------------------------- attention


def test_a_query_that_sees_no_key_gives_zero_and_receives_no_gradient():
    q, k, v = (rng().normal(size=(1, 2, T, 5)) for T in (7, 4, 4))  # the first three queries come before any key
    y, saved = attention.forward(q, k, v)
    dq, _, _ = attention.backward(np.ones_like(y), saved)
    assert not y[:, :, :3].any()
    assert y[:, :, 3:].all()
    assert not dq[:, :, :4].any()  # the fourth query sees one key, and one weight that is always 1
    assert dq[:, :, 4:].any()


def test_causal_attention_is_attention_over_each_prefix():
    q, k, v = (rng().normal(size=(2, 3, 6, 5)) for _ in range(3))
    whole, _ = attention.forward(q, k, v)
    for t in range(6):
        prefix, _ = attention.forward(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], causal=False)
        np.testing.assert_allclose(whole[:, :, t : t + 1], prefix, rtol=1e-12)


def test_grouped_heads_are_repeated_keys_and_values():
    q, k, v = (rng().normal(size=(2, heads, 7, 5)) for heads in (6, 3, 3))
    grouped, _ = attention.forward(q, k, v)
    repeated, _ = attention.forward(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(grouped, repeated, rtol=1e-13)


def test_a_scale_that_is_given_is_used():
    q, k, v = (rng().normal(size=(1, 1, 3, 4)) for _ in range(3))
    usual, _ = attention.forward(q, k, v)
    np.testing.assert_array_equal(usual, attention.forward(q, k, v, scale=0.5)[0])
    uniform, _ = attention.forward(q, k, v, causal=False, scale=0.0)
    np.testing.assert_allclose(uniform, np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape))


# ---------------------------------------------------------------- cached attention


def test_several_new_tokens_are_attended_to_as_if_they_came_one_by_one():
    q, k, v = (rng().normal(size=(2, heads, length, 5)) for heads, length in ((6, 4), (3, 9), (3, 9)))
    starts = np.array([5, 2])
    whole, _ = cached_attention.forward(q, k, v, starts)
    for t in range(4):
        one, _ = cached_attention.forward(q[:, :, t : t + 1], k, v, starts + t)
        np.testing.assert_allclose(whole[:, :, t : t + 1], one, rtol=1e-12)


def test_a_scale_of_a_cache_s_scores_that_is_given_is_used():
    q, k, v = (rng().normal(size=(1, 1, length, 4)) for length in (1, 3, 3))
    usual, _ = cached_attention.forward(q, k, v, np.array([2]))
    np.testing.assert_array_equal(usual, cached_attention.forward(q, k, v, np.array([2]), scale=0.5)[0])
    uniform, _ = cached_attention.forward(q, k, v, np.array([2]), scale=0.0)
    np.testing.assert_allclose(uniform, v.mean(axis=2, keepdims=True))


@pytest.mark.parametrize(
    "keys, starts, message",
    [
        ((2, 2, 7, 5), (2,), r"k, v: expected both \(2, G, S, 5\) with G dividing 3, got \(2, 2, 7, 5\)"),
        ((2, 3, 7, 5), (3,), r"starts: expected shape \(2,\), got \(3,\)"),
    ],
)
def test_cached_attention_refuses_shapes_that_do_not_fit(keys, starts, message):
    with pytest.raises(ValueError, match=message):
        cached_attention.forward(np.ones((2, 3, 1, 5)), np.ones(keys), np.ones(keys), np.zeros(starts, int))


# ---------------------------------------------------------------- dropout


def test_without_noise_or_rate_dropout_changes_nothing():
    x = rng().normal(size=(3, 5))
    for rate, noise in ((0.5, None), (0.0, (1, 0))):
        y, saved = dropout.forward(x, rate, noise)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(dropout.backward(x, saved), x)


def test_dropout_keeps_the_mean():
    y, _ = dropout.forward(np.ones((1000, 100), np.float32), 0.25, (17, 0))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.01  # five standard deviations


def test_a_part_of_a_batch_drops_what_the_whole_would_have():
    x = rng().normal(size=(5, 3, 7))
    whole, _ = dropout.forward(x, 0.5, (99, 0))
    np.testing.assert_array_equal(dropout.forward(x[2:], 0.5, (99, 2))[0], whole[2:])


# ---------------------------------------------------------------- cross entropy


@pytest.mark.parametrize("wrong", [-1, 5])
def test_cross_entropy_refuses_a_target_outside_the_vocabulary(wrong):
    with pytest.raises(ValueError, match=rf"targets: {wrong} is outside the vocabulary, expected 0 <= target < 5"):
        cross_entropy.forward(np.ones((3, 5)), np.array([0, wrong, -100]))


@pytest.mark.parametrize("loss", [cross_entropy, token_logps, linear_cross_entropy])
def test_losses_refuse_targets_of_another_shape(loss):
    weights = (rng().normal(size=(7, 5)), None) if loss is linear_cross_entropy else ()
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 5\), as \w+ ha\w+, got \(2, 4\)"):
        loss.forward(np.ones((2, 5, 5)), *weights, np.zeros((2, 4), int))


def test_all_targets_ignored_is_no_loss_and_no_gradient():
    loss, saved = cross_entropy.forward(rng().normal(size=(2, 3, 5)), np.full((2, 3), -100))
    assert loss == 0
    assert not cross_entropy.backward(1.0, saved).any()


def test_ignored_targets_change_neither_loss_nor_gradient():
    logits, targets = rng().normal(size=(7, 5)), rng().integers(0, 5, 7)
    loss, saved = cross_entropy.forward(logits[:4], targets[:4])
    more_loss, more_saved = cross_entropy.forward(logits, np.where(np.arange(7) < 4, targets, -100))
    assert more_loss == pytest.approx(loss, rel=1e-14)
    more = cross_entropy.backward(1.0, more_saved)
    np.testing.assert_allclose(more[:4], cross_entropy.backward(1.0, saved), rtol=1e-14)
    assert not more[4:].any()


def test_another_number_can_mean_ignored():
    logits = rng().normal(size=(3, 5))
    expected, _ = cross_entropy.forward(logits, np.array([1, -100, 2]))
    assert cross_entropy.forward(logits, np.array([1, 0, 2]), ignore_index=0)[0] == expected


def test_of_equal_logits_the_loss_is_the_logarithm_of_their_number():
    assert cross_entropy.forward(np.full((2, 50257), 3.0), np.array([0, 7]))[0] == pytest.approx(math.log(50257))
