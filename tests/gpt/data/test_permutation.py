"""Permutations: PyTorch's below the limit, one-to-one, even and without memory beyond it."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import BatchOrder, permutation
from gpt.data.permutation import LIMIT, Feistel
from reference.torch_rng import Generator


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_is_one_to_one(n, seed):
    positions = np.arange(n)
    rows = Feistel(n, seed)(positions)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), positions)
    assert np.array_equal(positions, np.arange(n))


@given(n=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_is_pytorch_s_up_to_the_limit(n, seed):
    rows = permutation.permutation(n, seed)(np.arange(n))
    assert np.array_equal(rows, Generator(seed).randperm(n))


def test_beyond_the_limit_any_part_of_the_order_can_be_asked_for_alone():
    order = permutation.permutation(LIMIT + 1, 5)
    rows = order(np.arange(LIMIT + 1))
    assert np.array_equal(np.sort(rows), np.arange(LIMIT + 1))
    assert np.array_equal(order(np.arange(700, 703)), rows[700:703])
    assert not np.array_equal(permutation.permutation(LIMIT + 1, 6)(np.arange(9)), rows[:9])
    # Neighbours do not stay neighbours: as far apart as two numbers drawn at random, a third of the whole.
    assert 0.32 < np.abs(np.diff(rows)).mean() / LIMIT < 0.35


def test_all_orders_are_about_equally_frequent():
    """Chi-square over the 24 orders of 4 rows, for 4800 seeds: 23 degrees of freedom, beyond 50 one time in 1000."""
    seen = Counter(tuple(Feistel(4, seed)(np.arange(4)).tolist()) for seed in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 50


@pytest.mark.parametrize("n", [10**9, 10**12])
def test_the_order_of_a_billion_rows_takes_no_memory(n):
    order = BatchOrder(n, 64, True, True, Generator(1))
    tracemalloc.start()
    rows = np.concatenate(list(itertools.islice(iter(order), 100)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(set(rows.tolist())) == 6400
    assert rows.min() >= 0
    assert rows.max() < n
    assert 0.28 < rows.std() / n < 0.30  # of even numbers, 1 / sqrt(12) = 0.289


def test_a_pass_beyond_the_limit_goes_on_and_draws_as_much_as_one_below(monkeypatch):
    monkeypatch.setattr(permutation, "LIMIT", 10)
    generators = [Generator(1), Generator(1)]
    large, small = (BatchOrder(n, 3, True, False, g) for n, g in zip((50, 9), generators, strict=True))
    batches = [rows.tolist() for rows in large]
    assert sorted(itertools.chain(*batches)) == list(range(50))
    list(small)
    assert generators[0].state() == generators[1].state()
    begun = iter(large)
    first = [next(begun).tolist() for _ in range(5)]
    resumed = BatchOrder(50, 3, True, False, generators[0])
    resumed.load_state(large.state())
    assert sorted(itertools.chain(*first, *(rows.tolist() for rows in resumed))) == list(range(50))
