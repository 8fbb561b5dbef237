"""Instructions: the book's tables, splits and lengths; prompts in front of answers; what is dropped or refused."""

import functools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.examples import ExampleLoader, JsonEntries
from gpt.engine import IGNORE
from gpt.errors import UserError
from gpt.finetune.instructions import InstructionDataset, check_entry, collate, pad_rows, shift, split, write_splits
from gpt.prompts import format_prompt
from reference.torch_rng import Generator

END = 50256
ROWS = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
INPUTS = [[0, 1, 2, 3, 4], [5, 6, END, END, END], [7, 8, 9, END, END]]
ENTRY = {"instruction": "Add.", "input": "1 1", "output": "2"}


@pytest.fixture(scope="module")
def entries(data_folder):
    return JsonEntries(data_folder / "instruction-data.json")


@pytest.fixture(scope="module")
def parts(entries):
    return split(entries)


@pytest.fixture(scope="module")
def datasets(parts, gpt2):
    return [InstructionDataset(part, gpt2) for part in parts]


def examples(rows):
    return [(row, 0) for row in rows]


def test_the_books_three_tables():
    padded = pad_rows(ROWS, END)
    assert padded[:, :-1].tolist() == INPUTS
    inputs, targets = shift(padded)
    assert inputs.tolist() == INPUTS
    assert targets.tolist() == [[1, 2, 3, 4, END], [6, END, END, END, END], [8, 9, END, END, END]]
    inputs, targets = collate(examples(ROWS))
    assert inputs.tolist() == INPUTS
    ignored = [IGNORE] * 3
    assert targets.tolist() == [[1, 2, 3, 4, END], [6, END, *ignored], [8, 9, END, *ignored[1:]]]
    assert inputs.dtype == targets.dtype == np.int64


def test_padding_never_hides_an_end_token():
    _, targets = collate(examples([[1, END, 2, END], [3], [END]]), pad_id=END)
    assert targets.tolist() == [[END, 2, END, END], [END, *[IGNORE] * 3], [END, *[IGNORE] * 3]]


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 9)), min_size=1, max_size=5
    ),
    limit=st.none() | st.integers(1, 11),
    mask=st.booleans(),
)
def test_a_batch_is_its_definition_position_by_position(rows, limit, mask):
    rows = [(ids, min(prompt, len(ids))) for ids, prompt in rows]
    inputs, targets = collate(rows, 3, IGNORE, limit, mask)
    width = max(len(ids) for ids, _ in rows)
    assert inputs.shape == targets.shape == (len(rows), min(width, limit or width))
    for (ids, prompt), x, y in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        learnt = [*ids, 3]
        for t in range(len(x)):
            assert x[t] == (ids[t] if t < len(ids) else 3)
            counts = t + 1 < len(learnt) and not (mask and t + 1 < prompt)
            assert y[t] == (learnt[t + 1] if counts else IGNORE)


def test_a_batch_may_have_no_target_at_all():
    batch = collate([([1, 2, 3, 4], 4)], allowed_max_length=2, mask_instruction=True)
    assert batch.inputs.tolist() == [[1, 2]]
    assert batch.counted == 0


def test_the_splits_are_the_books(entries, parts):
    assert len(entries) == 1100
    assert [len(part) for part in parts] == [935, 55, 110]
    train, validation, test = parts
    assert train[0] == entries[0]
    assert test[0] == entries[935]
    assert validation[0] == entries[1045]
    assert validation[0]["instruction"].endswith("'The chef cooks the meal every day.'")
    train, validation, test = split(entries, test=None)
    assert [len(part) for part in (train, validation, test)] == [935, 0, 165]
    assert test[-1] == entries[1099]


def test_written_splits_come_back(tmp_path, entries):
    train, _, test = split(entries, test=None)
    paths = write_splits(tmp_path, train, test)
    assert [path.name for path in paths] == ["train.json", "test.json"]
    assert json.loads(paths[1].read_text()) == list(test)
    assert list(JsonEntries(paths[0])) == list(train)
    write_splits(tmp_path, [{"instruction": "\ud800 é"}], [])
    assert json.loads(paths[0].read_text()) == [{"instruction": "\ud800 é"}]
    assert json.loads(paths[1].read_text()) == []


@pytest.mark.parametrize(
    "n, train, test, message",
    [
        (5, 0.85, 0.1, "5 entries are too few, they make .* sets of 4, 1, 0"),
        (1, 0.85, None, "1 entries are too few, they make .* sets of 0, 0, 1"),
        (10, 0.9, 0.1, "expected fractions above 0"),
        (10, 1.0, None, "expected fractions above 0"),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_refused(n, train, test, message):
    with pytest.raises(UserError, match=message):
        split([ENTRY] * n, train, test)


def test_lengths_and_batches_are_the_books(datasets, gpt2):
    lengths = [[len(ids) for ids, _ in dataset] for dataset in datasets]
    measures = [(min(part), max(part), sum(part)) for part in lengths]
    assert measures == [(40, 91, 52760), (42, 76, 3116), (41, 85, 6149)]
    assert all(not dataset.dropped for dataset in datasets)
    loader = ExampleLoader(
        datasets[0], functools.partial(collate, allowed_max_length=1024), 8, True, True, Generator(123)
    )
    batches = list(loader)
    assert len(batches) == 116
    assert [batch.inputs.shape for batch in batches[:5]] == [(8, 61), (8, 76), (8, 73), (8, 68), (8, 65)]
    for batch in batches:  # the longest row of each has no padding
        assert (batch.targets != IGNORE).sum(axis=1).max() == batch.inputs.shape[1]


def test_the_text_of_an_entry_is_prompt_and_output(entries, gpt2):
    dataset = InstructionDataset(entries[999:1000], gpt2)
    assert gpt2.decode(dataset[0].ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is an antonym of 'complicated'?\n\n### Response:\n"
        "An antonym of 'complicated' is 'simple'."
    )


@pytest.mark.parametrize("style", ["alpaca", "phi3"])
def test_every_prompt_of_the_data_set_ends_where_its_answer_begins(entries, gpt2, style):
    dataset = InstructionDataset(entries, gpt2, style)
    assert len(dataset) == 1100
    for entry, (ids, length) in zip(entries, dataset, strict=True):
        prompt = format_prompt(entry, style)
        assert gpt2.decode(ids[:length]) == prompt
        assert ids[:length].tolist() == gpt2.encode(prompt)
        assert gpt2.decode(ids[length:]) == entry["output"]


def test_without_the_cache_the_examples_are_the_same_and_little_is_held(parts, gpt2):
    tracemalloc.start()
    lazy = InstructionDataset(parts[0], gpt2, cache=False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 * 52760 / 4
    kept = InstructionDataset(parts[0], gpt2)
    for one, other in zip(lazy, kept, strict=True):
        assert one.ids.dtype == other.ids.dtype == np.int32
        assert np.array_equal(one.ids, other.ids)
        assert one.prompt_length == other.prompt_length


@pytest.mark.parametrize("cache", [True, False])
def test_a_prompt_that_leaves_no_room_for_its_answer_is_dropped(bytes_tokenizer, cache):
    short, long = ({**ENTRY, "instruction": "a" * n} for n in (10, 40))
    prompt = len(format_prompt(short).encode())
    made = InstructionDataset([long, short, long], bytes_tokenizer, max_length=prompt, cache=cache)
    assert len(made) == 1
    assert bytes_tokenizer.decode(made[0].ids) == format_prompt(short) + "2"
    assert [number for number, _ in made.dropped] == [1, 3]
    assert made.dropped[0][1] == f"the prompt has {prompt + 30} tokens, which leaves none of {prompt} to answer in"
    batch = collate(made[:], 256, allowed_max_length=prompt, mask_instruction=True)
    assert batch.inputs.shape == (1, prompt)
    assert batch.targets[batch.targets != IGNORE].tolist() == [ord("2")]
    with pytest.raises(UserError, match="none of 3 entries can be learnt from; entry 1: the prompt has"):
        InstructionDataset([long, short, long], bytes_tokenizer, max_length=prompt - 1, cache=cache)


def test_an_empty_output_teaches_the_end(bytes_tokenizer):
    made = InstructionDataset([{"instruction": "Say nothing.", "output": ""}], bytes_tokenizer)
    batch = collate(made[:], 256, mask_instruction=True)
    assert batch.targets[batch.targets != IGNORE].tolist() == [256]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"instruction": "a"}, "lacks output; it has instruction"),
        ({}, "lacks instruction, output; it has nothing"),
        ({"instruction": " \n", "output": "b"}, "the instruction is empty"),
        ({"instruction": "a", "output": 7}, "expected a text as output, got int"),
        ({"instruction": "a", "input": None, "output": "b"}, "expected a text as input, got NoneType"),
        ({"instruction": ["a"], "output": "b"}, "expected a text as instruction, got list"),
        ({"instruction": "a", "output": "\ud800"}, "the lone surrogate U\\+D800"),
    ],
)
def test_an_unsound_entry_is_named_by_file_and_number(tmp_path, bytes_tokenizer, entry, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([ENTRY, ENTRY, entry]))
    with pytest.raises(UserError, match=rf"mine\.json: entry 3: .*{message}") as caught:
        InstructionDataset(JsonEntries(path)[1:], bytes_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_sound_entry_may_lack_an_input_and_hold_more():
    check_entry({"instruction": "a", "output": "b", "id": 7}, "here")
    check_entry(ENTRY, "here")


def test_an_unknown_style_is_named(bytes_tokenizer):
    with pytest.raises(UserError, match="style: 'alpac' is not one of plain, alpaca, phi3; did you mean alpaca"):
        InstructionDataset([ENTRY], bytes_tokenizer, "alpac")
