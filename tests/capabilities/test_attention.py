"""What chapter 3 of the book, and the course's look into attention, show about it, on both engines' layers."""

import numpy as np
import pytest

from gpt.engine import create_engine
from reference import GPTConfig, attention
from reference.init import initialize
from reference.torch_rng import Generator
from tests.figures import engines
from tests.figures.chapter3 import BATCH, INPUTS, attend, linear_projections, weights
from tests.figures.chapter4 import of_block
from tests.figures.engines import BOOK, draw_linear

RNG = np.random.default_rng(4)


@pytest.fixture(params=["numpy", "torch"])
def layers(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return engines.layers(request.param)


def test_loops_over_queries_give_what_the_matrix_product_gives(layers):
    all_at_once = layers.attention(*[INPUTS[None, None]] * 3, causal=False, scale=1.0)[0, 0]
    for query, context in zip(INPUTS, all_at_once, strict=True):
        scores = np.array([query @ key for key in INPUTS])
        p = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(context, sum(w * x for w, x in zip(p, INPUTS, strict=True)), rtol=1e-5)


def test_softmax_survives_large_scores(layers):
    q = np.array([[1e4], [-1e4]], np.float32)
    p = weights(layers, q, q, scale=1.0, causal=False)
    np.testing.assert_array_equal(p, np.eye(2))


def test_a_score_is_one_dot_product_and_a_context_one_weighted_sum(layers):
    q, k, v = (RNG.normal(size=(7, 4)).astype(np.float32) for _ in range(3))
    scores = layers.linear(q, k)
    np.testing.assert_allclose(q[5] @ k[3], scores[5, 3], rtol=1e-5)
    p = weights(layers, q, k, causal=True)
    y = layers.attention(q[None, None], k[None, None], v[None, None], causal=True)[0, 0]
    for t in range(7):
        np.testing.assert_allclose(y[t], sum(p[t, s] * v[s] for s in range(t + 1)), rtol=1e-4, atol=1e-6)


def test_no_weight_lies_above_the_diagonal_and_rows_sum_to_one(layers):
    p = weights(layers, INPUTS, INPUTS, causal=True)
    np.testing.assert_array_equal(np.triu(p, 1), 0)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-6)
    assert p[0, 0] == 1


def test_a_changed_future_token_changes_no_earlier_bit(layers):
    changed = BATCH.copy()
    changed[:, 4:] += 1
    before, after = (attend(layers, x, linear_projections(), causal=True) for x in (BATCH, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(before[:, 4:] != after[:, 4:])


def test_dropout_keeps_the_mean_and_is_absent_in_evaluation(layers):
    ones, generator = np.ones((6, 6), np.float32), Generator(1)
    draws = np.stack([layers.dropout(ones, 0.5, generator.keep_mask((6, 6), 0.5)) for _ in range(10_000)])
    assert set(np.unique(draws)) == {0.0, 2.0}
    np.testing.assert_allclose(draws.mean(axis=0), 1, atol=0.05)  # five standard deviations
    np.testing.assert_array_equal(layers.dropout(ones, 0.5, None), ones)


def test_causal_attention_takes_batches_and_shorter_texts(layers):
    whole = attend(layers, BATCH, linear_projections(), causal=True)
    assert whole.shape == (2, 6, 2)
    shorter = attend(layers, BATCH[:, :4], linear_projections(), causal=True)
    np.testing.assert_allclose(shorter, whole[:, :4], rtol=1e-6)


def test_the_causal_mask_is_no_parameter_and_needs_no_moving():
    torch = pytest.importorskip("torch")
    from gpt.model import GPT

    config = GPTConfig(11, 8, 12, 2, 3)
    model = GPT(config)
    assert list(model.state_dict()) == list(config.parameter_shapes())
    assert not list(model.buffers())
    tokens = torch.arange(5)[None]
    assert torch.equal(model.double()(tokens).argmax(-1), model.float()(tokens).argmax(-1))


def test_a_batched_product_is_the_product_of_each_head(layers):
    a = RNG.random((1, 2, 3, 4)).astype(np.float32)
    eye = np.tile(np.eye(4, dtype=np.float32)[:3], (1, 2, 1, 1))
    batched = a @ a.swapaxes(2, 3)
    for head in range(2):
        np.testing.assert_allclose(layers.linear(a[0, head], a[0, head]), batched[0, head], rtol=1e-6)
    together = layers.attention(a, a, eye, causal=False)
    for head in range(2):
        one = layers.attention(a[:, head : head + 1], a[:, head : head + 1], eye[:, :1], causal=False)
        np.testing.assert_allclose(together[:, head], one[:, 0], rtol=1e-6)


def test_heads_of_one_projection_equal_heads_side_by_side(layers):
    projections = tuple(RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(3))
    together = attend(layers, BATCH, projections, heads=2, causal=True)
    apart = [attend(layers, BATCH, tuple(w[2 * h : 2 * h + 2] for w in projections), causal=True) for h in range(2)]
    np.testing.assert_allclose(together, np.concatenate(apart, axis=-1), rtol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="n_heads: 5 does not divide emb_dim 12"):
        GPTConfig(11, 8, 12, 2, 5)


def test_attention_of_gpt2s_size():
    assert of_block("attn") == 2_360_064
    assert of_block("attn", BOOK.replace(qkv_bias=True)) == 2_362_368
    generator = Generator(1)
    q, k, v = (generator.normal((1, 12, 1024, 64)) for _ in range(3))
    assert attention.forward(q, k, v)[0].shape == (1, 12, 1024, 64)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_seven_heads_of_fifty_four_in_a_width_of_384(name):
    """The heads' total width, 378, need not be the model's."""
    if name == "torch":
        pytest.importorskip("torch")
    config = GPTConfig(11, 8, 384, 1, 7, head_dim=54, qkv_bias=True)
    assert config.parameter_shapes()["blocks.0.attn.out.weight"] == (384, 378)
    assert create_engine(name, config, initialize(config, Generator(1))).logits(np.arange(8)[None]).shape == (1, 11)


def test_projections_are_stored_as_pytorch_stores_them(layers):
    torch = pytest.importorskip("torch")
    torch.manual_seed(789)
    theirs = torch.nn.Linear(3, 2, bias=False)
    weight, _ = draw_linear(Generator(789), 3, 2, bias=False)
    np.testing.assert_array_equal(weight, theirs.weight.detach().numpy())
    expected = theirs(torch.from_numpy(INPUTS)).detach().numpy()
    np.testing.assert_allclose(layers.linear(INPUTS, weight), expected, rtol=1e-6, atol=1e-7)
