"""Entries of JSON files against json.load, what is refused and how, memory; the loader against PyTorch's."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import examples as module
from gpt.data.examples import ExampleLoader, Examples, JsonEntries, Subset, number, where
from gpt.engine import IGNORE, Batch
from gpt.errors import UserError
from reference.torch_rng import Generator

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "\\", '{"', "]}", "é\U0001f600"]
)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
documents = st.lists(st.dictionaries(text, value, max_size=4), min_size=1, max_size=8)


def write(folder, content, name="data.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Files of a few bytes are read in several blocks, as large ones are."""
    monkeypatch.setattr("gpt.data.text.BLOCK", 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("entries")


@given(entries=documents, indent=st.none() | st.integers(0, 3), ascii=st.booleans(), bom=st.booleans(), data=st.data())
def test_an_array_is_what_json_makes_of_it(folder, entries, indent, ascii, bom, data):
    written = json.dumps(entries, indent=indent, ensure_ascii=ascii)
    space = data.draw(st.text(" \t\r\n", max_size=4))
    content = (b"\xef\xbb\xbf" if bom else b"") + (space + written + space).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.data.text.BLOCK", data.draw(st.integers(1, 64)))
        read = JsonEntries(write(folder, content))
    assert len(read) == len(entries)
    assert list(read) == json.loads(written)
    assert read[-1] == json.loads(written)[-1]


@given(
    entries=documents,
    ascii=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    last=st.booleans(),
    data=st.data(),
)
def test_json_lines_are_what_json_makes_of_each(folder, entries, ascii, end, last, data):
    lines = [json.dumps(entry, ensure_ascii=ascii) for entry in entries]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.data.text.BLOCK", data.draw(st.integers(1, 64)))
        read = JsonEntries(write(folder, end.join(lines) + (end if last else ""), "data.jsonl"))
    assert list(read) == [json.loads(line) for line in lines]


@given(entries=documents, data=st.data())
def test_a_truncated_array_is_refused_and_so_is_any_that_json_refuses(folder, entries, data):
    whole = json.dumps(entries, indent=1).encode()
    path = write(folder, whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=r"data\.json"):
        JsonEntries(path)
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + bytes([data.draw(st.integers(0, 127))]) + whole[at + 1 :]
    path = write(folder, damaged)
    try:
        expected = json.loads(damaged, parse_constant=lambda name: {}[name])
    except (ValueError, KeyError):
        expected = None
    if isinstance(expected, list) and expected and all(isinstance(entry, dict) for entry in expected):
        assert list(JsonEntries(path)) == expected
    else:
        with pytest.raises(UserError, match=r"data\.json"):
            JsonEntries(path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "content, message",
    [
        ("", "data.json: holds no entries"),
        (" \n ", "data.json: holds no entries"),
        ("[]", "data.json: holds no entries"),
        ("[", "entry 1, line 1: expected an object, the file ends: it is truncated"),
        (
            '[{"a": 1}, {"a"',
            "entry 2, line 1: expected a whole JSON object, got one that is wrong or truncated: Expect",
        ),
        ('[{"a": 1},\n{"a": "b}]', "entry 2, line 2: .*wrong or truncated: Unterminated string"),
        ('[{"a": 1}', "entry 1, line 1: expected a comma or ] after it, the file ends: it is truncated"),
        ('[{"a": 1},', "entry 2, line 1: expected an object, the file ends"),
        ('[{"a": 1} {"a": 2}]', "entry 1, line 1: expected a comma or ] after it, got '{'"),
        ('[{"a": 1},]', "entry 2, line 1: expected an object, got what begins with ']'"),
        ('[{"a": 1}, 7]', "entry 2, line 1: expected an object, got what begins with '7'"),
        ('[{"a": 1},\n"text"]', "entry 2, line 2: expected an object, got what begins with '\"'"),
        ('[{"a": 1}, [{"a": 2}]]', "entry 2, line 1: expected an object, got what begins with '.'"),
        ('[{"a": 1}]]', "line 1: expected the file to end after the array, got ']'"),
        ('[{"a": 1}]\n{"a": 1}', "line 2: expected the file to end after the array, got '{'"),
        ('[{"a": 1}, {"a": NaN}]', "entry 2, line 1: expected a JSON object: NaN is no JSON"),
        ('[{"a": -Infinity}]', "entry 1, line 1: expected a JSON object: -Infinity is no JSON"),
        ('[{"a": 1},\n\n{"a": tru}]', "entry 2, line 3: .*Expecting value"),
        ('[{"a": 1},\n{"b": 1,\n"c" 2}]', "entry 2, line 3: .*Expecting ':' delimiter"),
        ('[{"a": "b\nc"}]', "entry 1, line 1: .*Invalid control character"),
        ("[{'a': 1}]", "entry 1, line 1: .*Expecting property name"),
        ('{"a": 1} {"a": 2}', "entry 1, line 1: expected a new line after it, got '{'"),
        ('{"a": 1},\n{"a": 2}', "entry 1, line 1: expected a new line after it, got ','"),
        ('{"a": 1}\n{"a": 2', "entry 2, line 2: .*wrong or truncated"),
        ('{"a": 1}\n\n7', "entry 2, line 3: expected an object, got what begins with '7'"),
        ("a text", "entry 1, line 1: expected an object, got what begins with 'a'"),
        (b"\xef\xbb\xbf\xef\xbb\xbf[{}]", "entry 1, line 1: expected an object, got what begins with '.ufeff'"),
        (b'[{"a": 1}, {"a": "\xff"}]', "data.json is not UTF-8: byte 18"),
        ('[{"a": 1}]'.encode("utf-16"), "data.json is not UTF-8: byte 0"),
    ],
)
def test_what_is_no_file_of_entries_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        JsonEntries(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "value, why", [("[" * 100_000 + "]" * 100_000, "recursion"), ("1" * 5000, "4300 digits"), ("[" * 100_000, "")]
)
def test_what_python_cannot_hold_is_named(tmp_path, value, why):
    with pytest.raises(UserError, match=f"entry 2, line 2: expected a .*JSON object.*{why}"):
        JsonEntries(write(tmp_path, '[{"a": 1},\n{"a": ' + value + "}]"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.json: No such file"):
        JsonEntries(tmp_path / "none.json")


def test_an_entry_longer_than_the_limit_is_refused_before_the_file_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.data.text.BLOCK", 10)
    monkeypatch.setattr(module, "LONGEST", 50)
    long = {"a": "b" * 30}
    assert list(JsonEntries(write(tmp_path, json.dumps([long] * 5)))) == [long] * 5
    with pytest.raises(UserError, match="entry 2, line 1: .*in 5. characters"):
        JsonEntries(write(tmp_path, json.dumps([long, {"a": "b" * 1000}])))


@pytest.mark.parametrize("content", ["", "[]", "[{}, {}]", '[{"a": {"b"', "[[[[[[[[[[[[[[[[[[[[[[[["])
def test_a_file_that_changes_is_noticed_when_an_entry_is_read(tmp_path, content):
    path = write(tmp_path, '[{"a": 1}, {"a": 2}]')
    entries = JsonEntries(path)
    path.write_text(content)
    with pytest.raises(UserError, match="entry 2 is no longer where it was: the file has been changed"):
        entries[1]
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        entries[1]


def test_parts_of_parts_know_where_their_entries_are(tmp_path):
    entries = JsonEntries(write(tmp_path, json.dumps([{"i": i} for i in range(20)])))
    part = entries[3:15]
    assert isinstance(part, Subset)
    odd = part[1::2]
    assert [entry["i"] for entry in odd] == [4, 6, 8, 10, 12, 14]
    again = Subset(odd, np.array([5, 0]))
    assert [entry["i"] for entry in again] == [14, 4]
    assert again[-1] == {"i": 4}
    assert number(again, 0) == 15
    assert where(again, 1) == f"{entries.path}: entry 5"
    assert where([{}, {}], 1) == where(Subset([{}, {}], [1]), 0) == "entry 2"
    with pytest.raises(IndexError):
        entries[20]
    with pytest.raises(IndexError):
        again[2]


def test_a_large_file_is_never_held_in_memory(tmp_path):
    """52,000 entries, as many as Alpaca's, of 22 MB."""
    path = tmp_path / "alpaca.json"
    with open(path, "w") as file:
        for i in range(52_000):
            entry = {"instruction": f"Task {i}: " + "describe it. " * 10, "input": "", "output": "Done\n" * 45}
            file.write(("[" if i == 0 else ",\n") + json.dumps(entry, indent=4))
        file.write("]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    entries = JsonEntries(path)
    assert len(entries) == 52_000
    for i in (0, 25_999, 51_999, 12_345):
        assert entries[i]["instruction"].startswith(f"Task {i}:")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2_000_000
    assert peak < 8_000_000


class Counting(Examples):
    """A hundred numbers, and which of them were asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 100

    def example(self, index):
        self.asked.append(index)
        return index


def collate(rows):
    return Batch(np.array(rows)[:, None], np.full((len(rows), 1), IGNORE))


def loader_of(generator, shuffle=True, batch_size=12, drop_last=False):
    return ExampleLoader(Counting(), collate, batch_size, shuffle, drop_last, generator)


def rows_of(batches):
    return [batch.inputs[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_in_the_order_of_torch_data_loader(shuffle, drop_last):
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader

    torch.manual_seed(123)
    theirs = DataLoader(range(100), batch_size=12, shuffle=shuffle, drop_last=drop_last)
    ours = loader_of(Generator(123), shuffle, 12, drop_last)
    assert len(ours) == len(theirs)
    for _ in range(2):
        assert rows_of(ours) == [batch.tolist() for batch in theirs]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 8, 9])
def test_a_continued_run_gets_the_batches_that_would_have_come(shuffle, taken):
    generator = Generator(5)
    loader = loader_of(generator, shuffle)
    list(loader)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    saved = json.loads(json.dumps([loader.state(), generator.state()]))
    expected = rows_of(iterator), rows_of(loader)
    generator = Generator.from_state(saved[1])
    loader = loader_of(generator, shuffle)
    loader.load_state(saved[0])
    assert (rows_of(loader), rows_of(loader)) == expected


def test_only_what_a_batch_needs_is_asked_for():
    loader = loader_of(None, shuffle=False, batch_size=3)
    iterator = iter(loader)
    assert next(iterator).inputs.tolist() == [[0], [1], [2]]
    assert loader.examples.asked == [0, 1, 2]
    assert rows_of(loader.epoch())[0] == [0, 1, 2]
    assert loader.state()["epoch"]["next"] == 1


def test_what_cannot_be_loaded_is_refused():
    with pytest.raises(UserError, match="drop_last leaves no batch: there are 100 rows, fewer than batch_size 101"):
        loader_of(Generator(1), batch_size=101, drop_last=True)
    with pytest.raises(UserError, match="generator"):
        loader_of(None)
    with pytest.raises(UserError, match="there are no examples"):
        ExampleLoader([], collate, 1, False, False)
    with pytest.raises(UserError, match="cannot continue"):
        loader_of(Generator(5), batch_size=2).load_state(loader_of(Generator(5)).state())


def test_a_slice_is_a_list_and_an_index_in_range():
    assert Counting()[-3:] == [97, 98, 99]
    assert Counting()[-1] == 99
    with pytest.raises(IndexError):
        Counting()[100]
