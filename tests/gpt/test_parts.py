"""A batch in parts: the sums are those of the whole, always the same, and an error in one part ends all of them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import numpy_engine, parts
from gpt.engine import IGNORE, Batch, NonFiniteError, OptimizerConfig, create_engine
from gpt.work import cost, spans
from reference import attention
from reference.config import GPTConfig
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

GPT2 = GPTConfig(300, 32, 64, 2, 2, qkv_bias=True, tie_embeddings=True, shortcut_dropout=0.1, attn_dropout=0.2)
LLAMA = GPTConfig(
    300, 32, 64, 2, 4, 2, norm="rms_norm", mlp="swiglu", position="rope", bias=False, emb_dropout=0.1,
    lora={"rank": 2, "alpha": 4.0, "dropout": 0.1},
)  # fmt: skip


@pytest.fixture
def threads(monkeypatch):
    """Sets how many parts there may be, however short."""

    def of(count: int) -> None:
        parts._pool.cache_clear()
        monkeypatch.setattr(parts, "threads", lambda: count)
        monkeypatch.setattr(parts, "LEAST", 1)
        monkeypatch.setattr(parts, "LEAST_APART", 1)
        monkeypatch.setattr(parts, "MOST_APART", 0)

    yield of
    parts._pool.cache_clear()


@pytest.fixture(params=["threads", "processes"])
def cores(request, threads, monkeypatch):
    """The same for parts in threads, and for parts in processes of their own."""

    def of(count: int) -> None:
        threads(count)
        if request.param == "processes":
            monkeypatch.setattr(parts, "MOST_APART", 1 << 26)

    return of


def batch(rows: int = 5, T: int = 32) -> Batch:
    rng = np.random.default_rng(rows)
    tokens = rng.integers(0, 300, (rows, T + 1))
    targets = tokens[:, 1:].copy()
    targets[-1, 3:] = IGNORE
    targets[0] = IGNORE  # a part may have nothing that counts
    return Batch(tokens[:, :-1], targets)


def engine(config, dtype="float64", **more):
    rng = np.random.default_rng(1)
    params = {
        n: p + 0.02 * rng.normal(size=p.shape) for n, p in initialize(config, Generator(1), "gpt2").items()
    }  # adapters that are 0 would hide their gradients
    return create_engine("numpy", config, params, OptimizerConfig(), dtype, **more)


def step(config, **more):
    """Loss, gradients of two batches and the evaluation's loss."""
    e = engine(config, **more)
    losses = [
        e.accumulate(batch(), 0.25, PhiloxNoise(3, 1), last=False),
        e.accumulate(batch(3), 0.75, PhiloxNoise(3, 1, 5)),
    ]
    return [*losses, e.loss(batch())], {name: g.copy() for name, g in e.gradients().items()}


@pytest.mark.parametrize("config", [GPT2, LLAMA])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_give_the_gradients_of_the_whole(cores, config, count):
    cores(1)
    losses, gradients = step(config)
    cores(count)
    in_parts, gradients_in_parts = step(config)
    np.testing.assert_allclose(in_parts, losses, rtol=1e-14)
    assert gradients_in_parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradients_in_parts[name], gradient, rtol=1e-9, atol=1e-15 + 1e-13 * abs(gradient).max(), err_msg=name
        )


PLAIN = GPT2.replace(shortcut_dropout=0.0, attn_dropout=0.0)
ADAPTED = LLAMA.replace(emb_dropout=0.0, lora={"rank": 2, "alpha": 4.0})


def gradients_of(e, rows: int, T: int = 32) -> tuple[float, float, dict[str, np.ndarray]]:
    losses = e.accumulate(batch(rows, T), 0.5), e.loss(batch(rows, T))
    return *losses, {name: g.copy() for name, g in e.gradients().items()}


@pytest.mark.parametrize(
    "config, trained",
    [(PLAIN, ()), (LLAMA.replace(emb_dropout=0.0, lora=None), ()), (ADAPTED, ()), (PLAIN, ("blocks.1.mlp.*",))],
    ids=["gpt2", "llama", "adapters", "last block"],
)
@pytest.mark.parametrize("rows, count, spans", [(1, 2, 2), (1, 7, 7), (2, 7, 6), (3, 4, 3)])
def test_spans_of_a_text_give_its_gradients(cores, config, trained, rows, count, spans):
    def create():
        rng = np.random.default_rng(1)
        params = {n: p + 0.02 * rng.normal(size=p.shape) for n, p in initialize(config, Generator(1), "gpt2").items()}
        return create_engine("numpy", config, params, OptimizerConfig(trained=trained), "float64")

    cores(1)
    whole = gradients_of(create(), rows)
    cores(count)
    e = create()
    assert len(e._shares(batch(rows))) == spans
    in_spans = gradients_of(e, rows)
    np.testing.assert_allclose(in_spans[:2], whole[:2], rtol=1e-14)
    assert in_spans[2].keys() == whole[2].keys()
    for name, gradient in whole[2].items():
        np.testing.assert_allclose(
            in_spans[2][name], gradient, rtol=1e-9, atol=1e-15 + 1e-13 * abs(gradient).max(), err_msg=name
        )


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 32), count=st.integers(1, 9), layers=st.integers(1, 3), large=st.booleans())
def test_spans_are_the_text_once_and_of_the_same_cost(length, count, layers, large):
    config = PLAIN.replace(n_layers=layers, emb_dim=128 if large else 8)
    found = spans(config, length, count)
    assert found[-1].stop is None
    ends = [span.stop for span in found[:-1]] + [length]
    starts = [span.start for span in found]
    assert starts == [0, *ends[:-1]]
    assert all(start < end for start, end in zip(starts, ends, strict=True))
    assert len(found) <= min(count, length)
    costs = [cost(config, end) for end in [0, *ends]]
    dearest = cost(config, length) - cost(config, length - 1)
    assert max(np.diff(costs)) <= costs[-1] / count + dearest  # the last position's, which sees most


@pytest.mark.parametrize("failing", [0, 5, 20])
def test_a_span_that_fails_ends_those_that_wait_for_it(cores, failing):
    """It never gives its keys, its gradients or its turn."""
    cores(3)
    e = engine(PLAIN)
    bad = batch(1)
    bad.targets[:] = IGNORE
    bad.targets[0, failing] = 7
    e.parameters()["pos_emb.weight"][failing] = np.nan
    with pytest.raises(NonFiniteError, match=r"first in pos_emb\.weight"):
        e.accumulate(bad)
    assert e.gradients() == {}


def test_parts_add_up_in_the_same_order_each_time(cores):
    cores(4)
    (first, gradients), (again, others) = (step(GPT2, dtype="float32") for _ in range(2))
    assert first == again
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(others[name], gradient, err_msg=name)


def test_batches_of_several_threads_come_one_after_another(threads):
    """Or a part could wait for one that waits for a thread, which a part of another batch has, which waits as well."""
    threads(3)
    shares, at_work, together = parts.divide(3, 100), Counter[int](), set[tuple[int, ...]]()

    def run(batch: int) -> None:
        def work(part: parts.Part) -> None:
            at_work[batch] += 1
            time.sleep(0.01)
            together.add(tuple(sorted(+at_work)))
            with part.turn("a"):  # when all three have come
                at_work[batch] -= 1

        parts.run(work, shares)

    with ThreadPoolExecutor(3) as callers:
        list(callers.map(run, range(3)))
    assert together == {(0,), (1,), (2,)}


def test_turns_follow_the_parts_order_whoever_comes_first(threads):
    threads(3)
    order: dict[str, list[int]] = {"a": [], "b": []}
    late = threading.Event()

    def work(part: parts.Part) -> int:
        first = part.share.examples.start
        if first == 1:
            late.wait(0.2)  # the others are at their turn by then
        for name in order:
            with part.turn(name):
                order[name].append(first)
        return first

    assert parts.run(work, parts.divide(3, 100)) == [0, 1, 2]
    assert order == {"a": [0, 1, 2], "b": [0, 1, 2]}


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 9), seed=st.integers(0, 99))
def test_sums_are_the_same_to_the_last_bit_whoever_comes_first(count, seed):
    """In float32, where another order of adding up is another sum."""
    rng = np.random.default_rng(seed)
    arrays, pauses = rng.normal(size=(count, 50)).astype(np.float32), rng.permutation(count) / 500
    shares = [parts.Share(slice(n, n + 1)) for n in range(count)]

    def summed(pauses: np.ndarray) -> np.ndarray:
        def work(part: parts.Part) -> np.ndarray | None:
            number = part.share.examples.start
            time.sleep(pauses[number])
            return part.sum("x", arrays[number].copy())

        (total,) = [sum_ for sum_ in parts.run(work, shares) if sum_ is not None]
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "threads", lambda: count)
        parts._pool.cache_clear()
        first, second = summed(pauses), summed(pauses[::-1])
        parts._pool.cache_clear()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, arrays.sum(axis=0, dtype=np.float64), atol=1e-5)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_part_ends_all_and_is_raised(threads, failing):
    threads(3)

    def work(part: parts.Part) -> None:
        if part.share.examples.start == failing:
            raise MemoryError("no more")
        for name in "abc":
            with part.turn(name):
                pass

    with pytest.raises(MemoryError, match="no more"):
        parts.run(work, parts.divide(3, 100))
    assert parts.run(lambda part: part.share.examples.stop, parts.divide(3, 100)) == [
        1,
        2,
        3,
    ]  # and nothing is left behind


@given(examples=st.integers(1, 40), entries=st.integers(1, 1 << 20), cores=st.integers(1, 16))
def test_shares_are_all_examples_once_and_differ_by_one(examples, entries, cores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "threads", lambda: cores)
        shares = [share.examples for share in parts.divide(examples, entries)]
    assert 1 <= len(shares) <= min(cores, examples)
    assert len(shares) == 1 or entries // len(shares) >= parts.LEAST
    assert [n for share in shares for n in range(share.start, share.stop)] == list(range(examples))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_is_not_finite_names_its_tensor(cores, count):
    cores(count)
    e = engine(GPT2)
    e.parameters()["blocks.1.mlp.up.weight"][3, 4] = np.inf
    with pytest.raises(NonFiniteError, match=r"^loss is nan, first in blocks\.1\.mlp\.up\.weight$"):
        e.accumulate(batch())


@pytest.mark.parametrize("config", [GPT2, LLAMA, LLAMA.replace(lora=None)])
@pytest.mark.parametrize("count", [1, 2])
def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(cores, config, count):
    cores(count)
    losses, gradients = step(config)
    again, recomputed = step(config, checkpoint_activations=True)
    assert again == losses
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(recomputed[name], gradient, err_msg=name)


@pytest.mark.parametrize("config", [GPT2, GPT2.replace(tie_embeddings=False, head_bias=True)])
def test_large_vocabularies_need_no_logits(cores, config, monkeypatch):
    cores(2)
    losses, gradients = step(config)
    monkeypatch.setattr(numpy_engine, "LARGE", 1)
    monkeypatch.setattr("reference.linear_cross_entropy.CHUNK", 300 * 20)  # 20 rows
    monkeypatch.setattr("reference.model.cross_entropy", None)
    fused, same = step(config)
    np.testing.assert_allclose(fused, losses, rtol=1e-14)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            same[name], gradient, rtol=1e-9, atol=1e-15 + 1e-13 * abs(gradient).max(), err_msg=name
        )


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 12), S=st.integers(1, 48), block=st.integers(1, 13), causal=st.booleans(), group=st.booleans())
def test_attention_in_blocks_is_attention(T, S, block, causal, group):
    rng = np.random.default_rng(T * 100 + S)
    q, dy = rng.normal(size=(2, 2, 4, T, 3))
    k, v = rng.normal(size=(2, 2, 2 if group else 4, S, 3))

    def both(size: int):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "BLOCK", size)
            y, saved = attention.forward(q, k, v, causal, None, 0.25, (7, 0))
            return y, attention.weights(saved), *attention.backward(dy, saved)

    for whole, blocks in zip(both(100), both(block), strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=1e-12, atol=1e-14)
