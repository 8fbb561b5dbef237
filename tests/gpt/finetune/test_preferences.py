"""Pairs of answers: both forms of entries, what is dropped and counted, batches to the token, kept files."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.examples import ExampleLoader, JsonEntries
from gpt.engine import IGNORE
from gpt.errors import UserError
from gpt.finetune.preferences import (
    Pair,
    PreferenceDataset,
    collate,
    filter_sources,
    load_pairs,
    pair_texts,
    save_pairs,
    split,
)
from gpt.prompts import format_prompt
from reference.torch_rng import Generator

END = 256
ENTRY = {"instruction": "Add.", "input": "1 1", "output": "2", "chosen": "It is 2.", "rejected": "2, stupid"}


def said(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CHAT = {"source": "a", "prompt": "Hello", "chosen": said("Hello", "Hi!"), "rejected": said("Hello", "What?")}


@pytest.fixture(scope="module")
def entries(data_folder):
    return JsonEntries(data_folder / "instruction-data-with-preference.json")


@pytest.fixture(scope="module")
def dataset(entries, gpt2):
    return PreferenceDataset(entries, gpt2)


def pair(chosen, rejected, prompt=3, reference=None):
    return Pair(np.array(chosen, np.int32), np.array(rejected, np.int32), prompt, prompt, reference)


def equal(one, other):
    return (
        all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True)) and one.reference == other.reference
    )


def test_exactly_the_answers_tokens_are_predicted():
    """A prompt of three tokens; an answer of three, and the same with an end token behind it."""
    batch = collate([pair([1, 2, 3, 7, 8, 9], [1, 2, 3, 4, END])], END, "orpo", 0.1)
    assert batch.inputs.tolist() == [[1, 2, 3, 7, 8], [1, 2, 3, 4, END]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 7, 8, 9], [IGNORE, IGNORE, 4, END, IGNORE]]
    assert (batch.targets != IGNORE).sum(axis=1).tolist() == [3, 2]
    assert (batch.objective, batch.beta, batch.reference, batch.counted) == ("orpo", 0.1, None, 1)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64


answers = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(
    pairs=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), answers, answers), min_size=1, max_size=4
    ),
    limit=st.none() | st.integers(5, 12),
)
def test_a_batch_is_its_definition_row_by_row(pairs, limit):
    """Padding is 3, which is a token of the rows as well."""
    made = [pair(prompt + chosen, prompt + rejected, len(prompt)) for prompt, chosen, rejected in pairs]
    batch = collate(made, 3, "dpo", 0.1, limit)
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    assert batch.inputs.shape == batch.targets.shape == (2 * len(pairs), min(longest, limit or longest))
    for (prompt, answer), x, y in zip(rows, batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        room = len(x) - (len(prompt) - 1)
        assert x == ((prompt + answer)[:-1] + [3] * 12)[: len(x)]
        assert y == ([IGNORE] * (len(prompt) - 1) + answer[:room] + [IGNORE] * 12)[: len(y)]


def test_references_go_with_their_pairs_chosen_first():
    rows = ([1, 2, 3, 4], [1, 2, 3, 5])
    batch = collate([pair(*rows, reference=(-1.0, -2.0)), pair(*rows, reference=(-3.0, -4.0))], END, "dpo", 0.1)
    assert batch.reference.tolist() == [-1, -3, -2, -4]
    with pytest.raises(UserError, match="reference: expected the log-probabilities of 2 pairs, got those of 1"):
        collate([pair(*rows, reference=(-1.0, -2.0)), pair(*rows)], END, "dpo", 0.1)


def test_an_answer_that_is_cut_off_is_refused():
    with pytest.raises(UserError, match="row 1 of the batch: no token of the answer is among its 3 tokens"):
        collate([pair([1, 2, 3, 4], [1, 2, 3])], END, "dpo", 0.1)
    with pytest.raises(UserError, match="row 0 of the batch: no token of the answer is among its 3 tokens"):
        collate([pair([1, 2, 3, 4], [1, 2, 3, 4])], END, "dpo", 0.1, max_length=2)


def test_the_data_set_is_whole_and_six_of_its_pairs_are_twice_the_same(entries, dataset, gpt2):
    assert len(dataset) == len(entries) == 1100
    assert dataset.dropped == []
    assert len(dataset.identical) == 6
    for number in dataset.identical:
        assert entries[number - 1]["chosen"] == entries[number - 1]["rejected"]
    for entry, made in zip(entries, dataset, strict=True):
        prompt = format_prompt(entry)
        for ids, length, key in (
            (made.chosen, made.chosen_prompt, "chosen"),
            (made.rejected, made.rejected_prompt, "rejected"),
        ):
            assert gpt2.decode(ids[:length]) == prompt
            assert gpt2.decode(ids[length:-1]) == entry[key]
            assert ids[-1] == gpt2.eot


def test_what_is_dropped_is_counted_with_its_reason(entries, dataset, gpt2):
    different = PreferenceDataset(entries, gpt2, drop_identical=True)
    assert [number for number, _ in different.dropped] == different.identical == dataset.identical
    assert len(different) == 1094

    prompts = [len(gpt2.encode(format_prompt(entry))) for entry in entries]
    short = PreferenceDataset(entries, gpt2, max_prompt_tokens=50, cache=False)
    assert [number for number, _ in short.dropped] == [i for i, n in enumerate(prompts, 1) if n >= 50]
    assert len(short) + len(short.dropped) == 1100
    assert max(made.chosen_prompt for made in short) == 49
    number, reason = short.dropped[0]
    assert reason == f"the prompt has {prompts[number - 1]} tokens, expected fewer than 50"

    narrow = PreferenceDataset(entries, gpt2, max_length=60)
    assert [number for number, _ in narrow.dropped] == [i for i, n in enumerate(prompts, 1) if n > 60]
    batch = collate(narrow[:], gpt2.eot, "dpo", 0.1)
    assert batch.inputs.shape == (2 * len(narrow), 60)
    assert (batch.targets != IGNORE).any(axis=1).all()
    assert 0 < len(narrow) < 1100

    with pytest.raises(UserError, match="none of 1100 entries can be learnt from; entry 1: the prompt has"):
        PreferenceDataset(entries, gpt2, max_length=10)


def test_without_the_cache_the_pairs_are_the_same(entries, dataset, gpt2):
    lazy = PreferenceDataset(entries[:50], gpt2, cache=False)
    assert all(equal(one, other) for one, other in zip(lazy, dataset[:50], strict=True))


def test_a_loader_gives_batches_of_pairs(dataset, gpt2):
    dataset.reference = np.arange(2200.0).reshape(1100, 2)
    try:
        make = functools.partial(collate, pad_id=gpt2.eot, objective="dpo", beta=0.1)
        loader = ExampleLoader(dataset, make, 8, True, True, Generator(123))
        assert len(loader) == 137
        batch = next(iter(loader))
        assert batch.counted == 8
        assert batch.reference[:8].tolist() == [value - 1 for value in batch.reference[8:]]
    finally:
        dataset.reference = None


def test_messages_are_put_into_a_template(bytes_tokenizer):
    longer = {"chosen": said("a", "b", "c", " d"), "rejected": said("a", "b", "c", "e\n")}
    made = PreferenceDataset([CHAT, longer], bytes_tokenizer, "chatml")
    for entry, ids, prompt, answer in [
        (CHAT, made[0].chosen, made[0].chosen_prompt, "Hi!"),
        (CHAT, made[0].rejected, made[0].rejected_prompt, "What?"),
        (longer, made[1].chosen, made[1].chosen_prompt, " d"),
        (longer, made[1].rejected, made[1].rejected_prompt, "e\n"),
    ]:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in entry["chosen"][:-1])
        assert bytes_tokenizer.decode(ids[:prompt]) == text + "<|im_start|>assistant\n"
        assert bytes_tokenizer.decode(ids[prompt:-1]) == answer + "<|im_end|>"
        assert ids[-1] == END


def test_a_template_that_writes_the_end_token_has_it_once(bytes_tokenizer):
    made = PreferenceDataset([CHAT], bytes_tokenizer, "zephyr")
    assert bytes_tokenizer.decode(made[0].chosen) == "<|user|>\nHello<|endoftext|>\n<|assistant|>\nHi!<|endoftext|>"
    assert made[0].chosen[made[0].chosen_prompt :].tolist() == [*b"Hi!", END]
    assert list(made[0].chosen).count(END) == 2


def test_an_instruction_may_be_put_into_a_template():
    texts = pair_texts(ENTRY, "here", "chatml")
    assert texts.prompt == "<|im_start|>user\nAdd.\n1 1<|im_end|>\n<|im_start|>assistant\n"
    assert texts.chosen == "It is 2.<|im_end|>"
    assert pair_texts(ENTRY, "here", "alpaca").prompt == format_prompt(ENTRY)


@pytest.mark.parametrize(
    "entry, style, message",
    [
        ({"instruction": "a", "chosen": "b"}, "alpaca", "lacks rejected; it has chosen, instruction"),
        ({**ENTRY, "rejected": 3}, "alpaca", "expected a text as rejected, got int"),
        ({**ENTRY, "instruction": ""}, "alpaca", "the instruction is empty"),
        ({**ENTRY, "chosen": "\ud800"}, "alpaca", "the lone surrogate"),
        (
            CHAT,
            "alpaca",
            "style alpaca puts single instructions, and these are messages: expected one of llama3, chatml",
        ),
        (CHAT, "chatmll", "template: 'chatmll' is neither .*did you mean chatml"),
        ({**CHAT, "rejected": "no"}, "chatml", "expected a list of messages as rejected, got str"),
        ({"chosen": CHAT["chosen"]}, "chatml", "expected a list of messages as rejected, got NoneType"),
        ({**CHAT, "rejected": said("Bye", "What?")}, "chatml", "differ before their last message"),
        (
            {**CHAT, "chosen": said("Hello")},
            "chatml",
            "expected the messages of chosen to be a prompt and, last, the ass",
        ),
        ({**CHAT, "chosen": []}, "chatml", "expected the messages of chosen to be a prompt and, last, the assistant"),
        (
            {
                "chosen": said("a", "b", roles=("cook", "assistant")),
                "rejected": said("a", "c", roles=("cook", "assistant")),
            },
            "chatml",
            "the role of message 1 is 'cook'",
        ),
        (CHAT, "{{ messages | length }}", "the chat template does not begin a conversation with the prompt"),
    ],
)
def test_an_unsound_entry_is_named(tmp_path, bytes_tokenizer, entry, style, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (ENTRY, entry)))
    entries = JsonEntries(path)[1:]
    with pytest.raises(UserError, match=rf"pairs\.jsonl: entry 2: .*{message}") as caught:
        PreferenceDataset(entries, bytes_tokenizer, style)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("entry 2") == 1


def test_an_answer_of_nothing_is_the_end_token_or_dropped(bytes_tokenizer):
    nothing = {**ENTRY, "rejected": ""}
    made = PreferenceDataset([nothing], bytes_tokenizer)[0]
    assert made.rejected[made.rejected_prompt :].tolist() == [END]
    endless = type("Endless", (type(bytes_tokenizer),), {"eot": None})()
    made = PreferenceDataset([nothing, ENTRY], endless)
    assert made.dropped == [(1, "an answer is empty")]
    assert made[0].chosen[made[0].chosen_prompt :].tolist() == list(b"It is 2.")


def test_sources_are_left_out_by_name(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([{**CHAT, "source": source} for source in "abacab"] + [{"chosen": []}]))
    left = filter_sources(JsonEntries(path), ["a", "c"])
    assert [entry.get("source") for entry in left] == ["b", "b", None]
    assert left.rows.tolist() == [1, 5, 6]
    numbered = filter_sources([{"source": 5}, {"source": "b"}], ["5"])  # as a flag says it
    assert numbered.rows.tolist() == [1]
    with pytest.raises(UserError, match="source: 'toxic' is not one of None, a, b, c"):
        filter_sources(JsonEntries(path), ["a", "toxic"])


@pytest.mark.parametrize("n, train", [(43_704, 41_518), (1100, 1045), (21, 19), (2, 1)])
def test_the_split_is_shuffled_and_of_known_sizes(n, train):
    entries = [{"i": i} for i in range(n)]
    parts = split(entries)
    assert [len(part) for part in parts] == [train, n - train]
    order = [entry["i"] for part in parts for entry in part]
    assert order == Generator(42).randperm(n).tolist()
    assert [entry["i"] for part in split(entries, seed=None) for entry in part] == list(range(n))


@pytest.mark.parametrize("n, fraction", [(1, 0.05), (0, 0.05), (10, 0.0), (10, 1.0), (10, 0.95)])
def test_a_split_that_leaves_a_part_empty_is_refused(n, fraction):
    with pytest.raises(UserError, match=f"leaves some of {n} entries, got {fraction}"):
        split([ENTRY] * n, fraction)


def test_kept_pairs_come_back(tmp_path, dataset):
    path, made_from = tmp_path / "new" / "pairs.safetensors", {"style": "alpaca", "tokenizer": {"name": "gpt2"}}
    save_pairs(path, dataset, made_from)
    assert [file.name for file in path.parent.iterdir()] == ["pairs.safetensors"]
    kept = load_pairs(path, {"tokenizer": {"name": "gpt2"}, "style": "alpaca"})
    assert len(kept) == 1100
    assert all(equal(one, other) for one, other in zip(kept, dataset, strict=True))
    with pytest.raises(UserError, match="was made from other data, or with other settings: make it again"):
        load_pairs(path, {**made_from, "style": "phi3"})


def test_kept_references_come_back(tmp_path):
    pairs = [pair([1, 2, 3, 4], [1, 2, 3, 5, 6], reference=(-1.5, -2.25)), pair([1, 2], [1, 3], 1, (-0.1, 0.0))]
    save_pairs(tmp_path / "pairs", pairs, {})
    kept = load_pairs(tmp_path / "pairs", {})
    assert all(equal(one, other) for one, other in zip(kept, pairs, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"nothing of the kind"), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"pairs":"1"', b'"pairs":"2"')), "in format 1"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"ends"', b'"mean"')), "holds no pairs of answers"),
        (lambda path: path.unlink(), "could not be read"),
    ],
)
def test_another_or_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "pairs"
    save_pairs(path, [pair([1, 2, 3, 4], [1, 2, 3, 5, 6])], {})
    change(path)
    with pytest.raises(UserError, match=message) as caught:
        load_pairs(path, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "ends, lengths",
    [
        ([4, 8], [3, 3]),
        ([9, 9], [3, 3]),
        ([4, 9], [4, 3]),
        ([4, 9], [-1, 3]),
        ([4, 9], [3]),
        ([9], [3]),
        ([9, 4], [3, 3]),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tmp_path, ends, lengths):
    from safetensors.numpy import save_file

    arrays = {
        "tokens": np.arange(9, dtype=np.int32),
        "ends": np.array(ends, np.int64),
        "prompt_lengths": np.array(lengths, np.int32),
    }
    save_file(arrays, tmp_path / "pairs", {"pairs": "1", "made_from": "{}"})
    with pytest.raises(UserError, match="is damaged: its rows do not fit together"):
        load_pairs(tmp_path / "pairs", {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*pairs"):
        save_pairs(tmp_path / "file" / "pairs", [pair([1, 2, 3, 4], [1, 2, 3, 5])], {})
