"""Windows against their definition in plain Python, the order of PyTorch's DataLoader, and continuing in the middle."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import BatchOrder, WindowLoader
from gpt.errors import UserError
from reference.torch_rng import Generator


def rows_of(batches):
    return [
        (list(x), list(y))
        for batch in batches
        for x, y in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    ]


def same(left, right):
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@given(
    n_tokens=st.integers(2, 60),
    batch_size=st.integers(1, 5),
    max_length=st.integers(1, 12),
    stride=st.integers(1, 15),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    dtype=st.sampled_from([None, np.uint16, np.uint32, np.int64]),
)
def test_windows_are_those_of_the_definition(n_tokens, batch_size, max_length, stride, drop_last, shuffle, dtype):
    ids = [7 * i % 61 for i in range(n_tokens)]
    expected = [
        (ids[i : i + max_length], ids[i + 1 : i + max_length + 1]) for i in range(0, n_tokens - max_length, stride)
    ]
    n_batches = len(expected) // batch_size if drop_last else -(-len(expected) // batch_size)
    given_ids = ids if dtype is None else np.array(ids, dtype)
    arguments = (given_ids, batch_size, max_length, stride, shuffle, drop_last, Generator(3) if shuffle else None)
    if n_batches == 0:
        with pytest.raises(UserError):
            WindowLoader(*arguments)
        return
    loader = WindowLoader(*arguments)
    batches = list(loader)
    assert len(batches) == len(loader) == n_batches
    assert all(part.dtype == np.int64 and part.flags.c_contiguous for batch in batches for part in batch)
    assert {len(batch.inputs) for batch in batches[:-1]} <= {batch_size}
    rows = rows_of(batches)
    if shuffle:
        assert all(row in expected for row in rows)
        if not drop_last:
            assert sorted(rows) == sorted(expected)
    else:
        assert rows == (expected[: n_batches * batch_size] if drop_last else expected)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_order_and_draws_are_those_of_torch_data_loader(shuffle, drop_last):
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader

    torch.manual_seed(123)
    theirs = DataLoader(range(23), batch_size=4, shuffle=shuffle, drop_last=drop_last)
    generator = Generator(123)
    ours = BatchOrder(23, 4, shuffle, drop_last, generator)
    for _ in range(3):
        assert [rows.tolist() for rows in ours] == [rows.tolist() for rows in theirs]
    first = next(iter(theirs)).tolist()  # a pass that is given up has drawn its seeds all the same
    assert next(iter(ours)).tolist() == first
    iter(theirs)  # one that is never asked has drawn the base seed only
    iter(ours)
    assert generator.randint64() == torch.empty((), dtype=torch.int64).random_().item()


def loader_of(generator, shuffle=True, batch_size=3, stride=2):
    return WindowLoader(np.arange(50), batch_size, 4, stride, shuffle, False, generator)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 5, 8, 9])
def test_a_continued_run_gets_the_batches_that_would_have_come(shuffle, taken):
    """Stopped after `taken` batches of the second epoch: 8 is its last, at 9 the loader has said that it is over."""
    generator = Generator(5)
    loader = loader_of(generator, shuffle)
    assert len(loader) == 8
    list(loader)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator, None)
    saved = json.loads(json.dumps([loader.state(), generator.state()]))

    expected_rest = list(iterator)
    expected_next = list(loader)
    after = generator.randint64()

    generator = Generator.from_state(saved[1])
    loader = loader_of(generator, shuffle)
    loader.load_state(saved[0])
    assert loader.state() == saved[0]
    if taken < 9:
        assert same(list(loader), expected_rest)
    assert same(list(loader), expected_next)
    assert generator.randint64() == after


def test_loading_takes_back_a_pass_of_the_same_loader():
    generator = Generator(5)
    loader = loader_of(generator)
    iterator = iter(loader)
    next(iterator)
    state = loader.state()
    expected = list(iterator)
    loader.load_state(state)
    assert same(list(loader), expected)
    assert len(list(loader)) == 8  # and then a new pass begins


def test_iter_begins_a_new_pass_where_nothing_was_loaded():
    loader = loader_of(None, shuffle=False)
    next(iter(loader))
    assert len(list(loader)) == 8


def test_an_evaluation_pass_does_not_move_the_tracked_one():
    loader = loader_of(Generator(5))
    iterator = iter(loader)
    next(iterator)
    state = loader.state()
    assert len(list(loader.epoch())) == 8
    assert loader.state() == state
    assert len(list(iterator)) == 7


def test_batches_are_copies():
    ids = np.arange(50)
    loader = WindowLoader(ids, 2, 4, 4, False, False)
    next(iter(loader)).inputs[:] = -1
    assert np.array_equal(ids, np.arange(50))


@pytest.mark.parametrize("changed", [{"batch_size": 2}, {"stride": 3}])
def test_a_position_of_another_loader_is_refused(changed):
    with pytest.raises(UserError, match="cannot continue"):
        loader_of(Generator(5), **changed).load_state(loader_of(Generator(5)).state())


@pytest.mark.parametrize("argument", ["batch_size", "max_length", "stride"])
def test_sizes_below_one_are_refused_by_name(argument):
    sizes = {"batch_size": 1, "max_length": 1, "stride": 1, argument: 0}
    with pytest.raises(UserError, match=f"{argument} must be at least 1, got 0"):
        WindowLoader(range(9), **sizes, shuffle=False, drop_last=False)


def test_short_and_empty_texts_are_refused():
    assert len(WindowLoader(range(5), 1, 4, 1, False, False)) == 1
    with pytest.raises(UserError, match="has 4 tokens, but a window of 4 and its next token need 5"):
        WindowLoader(range(4), 1, 4, 1, False, False)
    with pytest.raises(UserError, match="empty"):
        WindowLoader([], 1, 4, 1, False, False)
    with pytest.raises(UserError, match="drop_last leaves no batch: there are 5 rows, fewer than batch_size 6"):
        WindowLoader(range(9), 6, 4, 1, False, True)


@pytest.mark.parametrize("wrong, position", [(10, 3), (-1, 0), (2**31, 7)])
def test_ids_outside_the_vocabulary_are_named(wrong, position):
    ids = np.arange(10)
    ids[position] = wrong
    with pytest.raises(UserError, match=f"token id {wrong} at position {position} is outside the vocabulary of 10"):
        WindowLoader(ids, 1, 2, 1, False, False, vocab_size=10)
    WindowLoader(np.arange(10), 1, 2, 1, False, False, vocab_size=10)


@pytest.mark.parametrize("ids", [[0.5, 1.5, 2.5], [[0, 1], [2, 3]]])
def test_ids_that_are_no_row_of_integers_are_refused(ids):
    with pytest.raises(UserError, match="one row of integers"):
        WindowLoader(ids, 1, 1, 1, False, False)


def test_shuffling_needs_a_generator():
    with pytest.raises(UserError, match="generator"):
        WindowLoader(range(9), 1, 2, 1, True, False)


def test_only_what_a_batch_covers_is_read_of_a_memory_map(tmp_path):
    """A sparse file of 64 GiB: copying or reading all of it would not end, nor fit."""
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(64 << 30)
    ids = np.memmap(path, np.uint16, mode="r")
    loader = WindowLoader(ids, 4, 1024, 1 << 25, True, False, Generator(1))
    assert np.shares_memory(loader.tokens, ids)
    for batch in itertools.islice(loader, 3):
        assert batch.inputs.shape == (4, 1024)


def test_a_position_in_other_data_is_refused():
    def loader(data):
        return WindowLoader(range(30), 2, 4, 4, True, False, Generator(5), data=data)

    first = loader("30 tokens with checksum 00000001")
    next(iter(first))
    state = json.loads(json.dumps(first.state()))
    with pytest.raises(
        UserError, match="^cannot continue: the data has changed .* it was 30 tokens .*1, and is 30 .*2$"
    ):
        loader("30 tokens with checksum 00000002").load_state(state)
    loader(None).load_state(state)
    loader("30 tokens with checksum 00000002").load_state(loader(None).state())
