"""Random windows: shifted targets, the draws of torch.randint, and continuing in the middle."""

import itertools
import json

import numpy as np
import pytest

from gpt.data import RandomBatches
from gpt.errors import UserError
from reference.torch_rng import Generator

IDS = np.arange(100, 160, dtype=np.uint16)


def take(batches, count):
    return [tuple(part.tolist() for part in batch) for batch in itertools.islice(batches, count)]


def test_targets_are_the_inputs_one_token_later():
    for batch in itertools.islice(RandomBatches(IDS, 5, 8, Generator(0)), 20):
        assert batch.inputs.shape == batch.targets.shape == (5, 8)
        assert batch.inputs.dtype == np.int64
        assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert np.array_equal(batch.targets, batch.inputs + 1)  # IDS counts up, so this is the true next token


def test_every_start_comes_and_none_runs_over_the_end():
    starts = {row[0] - 100 for inputs, _ in take(RandomBatches(IDS, 50, 57, Generator(0)), 4) for row in inputs}
    assert starts == {0, 1, 2}


def test_draws_are_those_of_torch_randint():
    torch = pytest.importorskip("torch")
    torch.manual_seed(42)
    loader = RandomBatches(IDS, 4, 8, Generator(42))
    for inputs, _ in take(loader, 3):
        assert [row[0] - 100 for row in inputs] == torch.randint(len(IDS) - 8, (4,)).tolist()


def test_a_seed_gives_the_same_batches_again():
    first, again, other = (take(RandomBatches(IDS, 4, 8, Generator(seed)), 3) for seed in (1, 1, 2))
    assert first == again != other


def test_length():
    assert len(list(RandomBatches(IDS, 4, 8, Generator(0), steps_per_epoch=7))) == 7
    assert len(list(RandomBatches(IDS, 4, 8, Generator(0), steps_per_epoch=7).epoch())) == 7
    with pytest.raises(TypeError, match="never end"):
        len(RandomBatches(IDS, 4, 8, Generator(0)))


@pytest.mark.parametrize("steps_per_epoch, taken", [(6, 0), (6, 4), (6, 6), (6, 7), (None, 9)])
def test_a_continued_run_gets_the_batches_that_would_have_come(steps_per_epoch, taken):
    generator = Generator(3)
    loader = RandomBatches(IDS, 2, 8, generator, steps_per_epoch)
    iterator = iter(loader)
    take(iterator, taken)
    saved = json.loads(json.dumps([loader.state(), generator.state()]))
    rest = take(iterator, 10)
    after = take(loader, 3)

    generator = Generator.from_state(saved[1])
    loader = RandomBatches(IDS, 2, 8, generator, steps_per_epoch)
    loader.load_state(saved[0])
    if taken != 7:
        assert take(loader, 10) == rest
    assert take(loader, 3) == after


def test_iter_begins_a_new_pass_where_nothing_was_loaded():
    loader = RandomBatches(IDS, 2, 8, Generator(3), steps_per_epoch=5)
    next(iter(loader))
    state = loader.state()
    assert len(list(loader)) == 5
    loader.load_state(state)
    next(iter(loader))
    assert len(list(loader)) == 5


def test_an_evaluation_pass_does_not_move_the_tracked_one():
    loader = RandomBatches(IDS, 2, 8, Generator(3), steps_per_epoch=5)
    iterator = iter(loader)
    next(iterator)
    take(loader.epoch(), 3)
    assert len(list(iterator)) == 4


@pytest.mark.parametrize("argument", ["batch_size", "max_length", "steps_per_epoch"])
def test_sizes_below_one_are_refused_by_name(argument):
    sizes = {"batch_size": 2, "max_length": 8, "steps_per_epoch": 3, argument: 0}
    with pytest.raises(UserError, match=f"{argument} must be at least 1, got 0"):
        RandomBatches(IDS, generator=Generator(0), **sizes)


def test_too_little_text_and_wrong_ids_are_refused():
    assert take(RandomBatches(IDS[:9], 1, 8, Generator(0)), 1) == [([list(range(100, 108))], [list(range(101, 109))])]
    with pytest.raises(UserError, match="has 8 tokens, but a window of 8 and its next token need 9"):
        RandomBatches(IDS[:8], 1, 8, Generator(0))
    with pytest.raises(UserError, match="token id 150 at position 50 is outside the vocabulary of 150"):
        RandomBatches(IDS, 1, 8, Generator(0), vocab_size=150)


def test_a_position_of_another_text_is_refused():
    state = RandomBatches(IDS, 2, 8, Generator(3)).state()
    with pytest.raises(UserError, match="cannot continue"):
        RandomBatches(IDS[:-1], 2, 8, Generator(3)).load_state(state)


def test_a_position_in_other_data_is_refused():
    state = RandomBatches(IDS, 2, 8, Generator(3), data="these").state()
    with pytest.raises(UserError, match="^cannot continue: the data has changed .* it was these, and is those$"):
        RandomBatches(IDS, 2, 8, Generator(3), data="those").load_state(state)
    RandomBatches(IDS, 2, 8, Generator(3), data="these").load_state(state)
