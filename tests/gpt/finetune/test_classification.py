"""Labelled texts: the book's rows, draws and splits; files that are wrong; batches."""

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.examples import ExampleLoader
from gpt.engine import IGNORE
from gpt.errors import UserError
from gpt.finetune.classification import (
    Classification,
    balance,
    collate,
    read_csv,
    read_rows,
    read_tsv,
    split,
    write_csvs,
)
from reference.torch_rng import Generator

FIRST_TRAINING_ROWS = [
    (0, "Dude how do you like the buff wind."),
    (
        0,
        "Tessy..pls do me a favor. Pls convey my birthday wishes to Nimya..pls dnt forget it. Today is her birthday "
        "Shijas",
    ),
    (
        1,
        "Reminder: You have not downloaded the content you have already paid for. Goto http://doit. mymoby. tv/ to "
        "collect your content.",
    ),
    (
        1,
        "Got what it takes 2 take part in the WRC Rally in Oz? U can with Lucozade Energy! Text RALLY LE to 61200 "
        "(25p), see packs or lucozade.co.uk/wrc & itcould be u!",
    ),
    (
        1,
        "Shop till u Drop, IS IT YOU, either 10K, 5K, £500 Cash or £100 Travel voucher, Call now, 09064011000. NTT PO "
        "Box CR01327BT fixedline Cost 150ppm mobile vary",
    ),
]


@pytest.fixture(scope="module")
def messages(data_folder):
    return read_tsv(data_folder / "SMSSpamCollection.tsv")


@pytest.fixture(scope="module")
def parts(messages):
    return split(balance(messages))


def test_the_messages_are_those_that_pandas_reads(messages):
    """5,574 lines; a text that begins with a quote and goes on for three lines makes two fewer rows."""
    assert len(messages) == 5572
    assert Counter(label for label, _ in messages) == {0: 4825, 1: 747}
    assert [text.count("\n") for _, text in messages if "\n" in text] == [2]


def test_balance_and_split_are_the_books(messages, parts):
    balanced = balance(messages)
    assert [label for label, _ in balanced] == [0] * 747 + [1] * 747
    assert balanced[747:] == [row for row in messages if row[0] == 1]
    assert set(balanced[:747]) <= set(messages)
    train, validation, test = parts
    assert [len(part) for part in parts] == [1045, 149, 300]
    assert sum(label for label, _ in train) == 517
    assert train[:5] == FIRST_TRAINING_ROWS
    assert sorted([*train, *validation, *test]) == sorted(balanced)


def test_batches_are_the_books(parts, gpt2):
    train = Classification(parts[0], gpt2, context_length=1024)
    assert train.max_length == 120
    others = [Classification(part, gpt2, train.max_length) for part in parts[1:]]
    make = functools.partial(collate, pad_id=gpt2.eot, max_length=train.max_length)
    loaders = [ExampleLoader(train, make, 8, True, True, Generator(123))]
    loaders += [ExampleLoader(part, make, 8, False, False) for part in others]
    assert [len(loader) for loader in loaders] == [130, 19, 38]
    for loader in loaders[:2]:
        *whole, last = loader
        assert {batch.inputs.shape for batch in whole} == {(8, 120)}
        assert {batch.counted for batch in whole} == {8}
        assert last.inputs.shape == ((8, 120) if loader is loaders[0] else (149 % 8, 120))
    batch = next(loaders[1].epoch())
    ids = gpt2.encode(parts[1][0][1])
    assert batch.inputs[0].tolist() == (ids + [50256] * 120)[:120]
    assert batch.targets[:, -1].tolist() == [label for label, _ in parts[1][:8]]


def test_a_width_of_1024_pads_and_one_beyond_the_context_is_refused(parts, gpt2):
    wide = Classification(parts[0][:9], gpt2, 1024, context_length=1024)
    assert wide.max_length == 1024
    assert collate(wide[:2], 50256, 1024).inputs.shape == (2, 1024)
    with pytest.raises(UserError, match="max_length has 1025 tokens, the model's context 1024: choose .* at most 1024"):
        Classification(parts[0], gpt2, 1025, context_length=1024)
    with pytest.raises(
        UserError, match="the longest text has 120 tokens, the model's context 64: choose .* at most 64"
    ):
        Classification(parts[0], gpt2, context_length=64)


def test_csvs_hold_what_was_written(tmp_path, parts):
    paths = write_csvs(tmp_path / "new", *parts)
    assert [path.name for path in paths] == ["train.csv", "validation.csv", "test.csv"]
    assert (
        paths[0].read_text(encoding="utf-8").startswith("Label,Text\n0,Dude how do you like the buff wind.\n0,Tessy..")
    )
    assert [read_csv(path) for path in paths] == list(parts)
    assert read_rows(paths[0]) == parts[0]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip) | st.sampled_from(
    ['"', 'a "quoted" word', "two\nlines", "a,b", "a\tb", '"open', " spaces ", "end,of,file", "a\r\nb", "\ufeff"]
)
rows = st.lists(st.tuples(st.integers(0, 1), texts), min_size=1, max_size=10)


@given(rows=rows)
def test_any_text_comes_back_from_a_csv(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("csv")
    for path in write_csvs(folder, rows, rows, rows):
        assert read_csv(path) == rows


@pytest.mark.parametrize(
    "content, message",
    [
        ("ham\tfine\nspam no tab\n", "line 2: expected a label, a tab and a text, got no tab"),
        ("ham\tfine\nspam\ta\tb\n", "line 2: expected a label, a tab and a text, got 3 fields"),
        ("ham\tfine\n\n\nspam\t \n", "line 4: the text is empty"),
        ("ham\t", "line 1: the text is empty"),
        ("ham\tfine\nhan\tfine", "line 2: the label 'han' is not one of ham, spam; did you mean ham?"),
        ("2\tfine", "line 1: the label '2' is not one of ham, spam"),
        ('ham\t"two\nlines"\nother\tfine', "line 3: the label 'other' is not one of"),
        (
            'ham\tfine\nspam\t"never closed\nham\tlost\n',
            "line 2: a text begins with a quote, and no other quote ends it",
        ),
        (b"ham\t\xff", "is not UTF-8: byte 4"),
        ("ham\t" + "a" * 200_000, "line 1: field larger than field limit"),
    ],
)
def test_a_tsv_that_is_wrong_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "texts.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_tsv(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "expected the first line Label,Text, got an empty file"),
        ("ham,fine\n", "expected the first line Label,Text, got 'ham,fine'"),
        ("Label,Text\n0,fine\n1\n", "line 3: expected a label, a comma and a text, got no comma"),
        ("Label,Text\n0,fine\n1,a,b\n", "line 3: expected a label, a comma and a text, got 3 fields"),
        ("Label,Text\n2,fine\n", "line 2: the label '2' is not one of ham, spam"),
        ("Label,Text\n1,\n", "line 2: the text is empty"),
    ],
)
def test_a_csv_that_is_wrong_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_other_labels_and_the_byte_order_mark_of_windows(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_bytes("\ufeffgood\tfine\r\nbad\tpoor\r\n0\tworse".encode())
    assert read_rows(path, labels=("bad", "good")) == [(1, "fine"), (0, "poor"), (0, "worse")]
    assert read_rows(path, labels=("good", "0", "bad")) == [(0, "fine"), (2, "poor"), (1, "worse")]


def test_labels_that_are_numbers_are_not_taken_for_their_places(tmp_path):
    labels = ("1", "2", "3")
    rows = [(0, "poor"), (1, "fair"), (2, "good")]
    path = write_csvs(tmp_path, rows, rows, rows, labels)[0]
    assert path.read_text() == "Label,Text\n1,poor\n2,fair\n3,good\n"
    assert read_rows(path, labels) == rows
    path.write_text("Label,Text\n0,poor\n")
    with pytest.raises(UserError, match="line 2: the label '0' is not one of 1, 2, 3"):
        read_rows(path, labels)


@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=60).filter(lambda labels: len(set(labels)) > 1))
def test_balance_gives_every_label_the_count_of_the_rarest(labels):
    rows = [(label, f"text {i}") for i, label in enumerate(labels)]
    counts = Counter(labels)
    n = min(counts.values())
    made = balance(rows, seed=7)
    assert Counter(label for label, _ in made) == dict.fromkeys(counts, n)
    assert len(set(made)) == len(made)
    assert set(made) <= set(rows)
    assert balance(rows, seed=7) == made


def test_what_cannot_be_balanced_or_split_is_refused():
    with pytest.raises(UserError, match="balance: expected texts of at least two labels, got 2 of 1"):
        balance([(0, "a"), (0, "b")])
    with pytest.raises(UserError, match="split: 5 texts are too few, .* sets of 3, 0, 2"):
        split([(0, "a")] * 5)
    with pytest.raises(UserError, match="split: expected fractions above 0 .* got 0.9 and 0.1"):
        split([(0, "a")] * 50, 0.9, 0.1)


def test_rows_that_are_wrong_are_named(bytes_tokenizer):
    with pytest.raises(UserError, match="row 2: expected a label from 0 to 1, got 2"):
        Classification([(0, "a"), (2, "b")], bytes_tokenizer)
    with pytest.raises(UserError, match="row 1: the text is empty"):
        Classification([(0, "")], bytes_tokenizer)
    with pytest.raises(UserError, match="max_length must be at least 1, got 0"):
        Classification([(0, "a")], bytes_tokenizer, 0)
    assert Classification([(2, "b")], bytes_tokenizer, n_labels=3)[0].label == 2


@pytest.mark.parametrize("position, column", [("last", -1), ("first", 0)])
def test_one_position_of_each_row_counts(bytes_tokenizer, position, column):
    examples = Classification([(1, "abc"), (0, "a"), (1, "abcdef")], bytes_tokenizer, 4)
    assert [len(ids) for ids, _ in examples] == [3, 1, 4]
    batch = collate(examples[:], bytes_tokenizer.eot, 4, position)
    assert batch.inputs.tolist() == [[97, 98, 99, 256], [97, 256, 256, 256], [97, 98, 99, 100]]
    assert batch.targets[:, column].tolist() == [1, 0, 1]
    assert batch.counted == 3
    assert np.count_nonzero(batch.targets == IGNORE) == 9
    assert batch.inputs.dtype == batch.targets.dtype == np.int64


def test_an_unknown_position_is_refused():
    with pytest.raises(UserError, match="position: 'middle' is not one of last, first"):
        collate([], 0, 4, "middle")
