"""Byte pairs of one's own, and tokenizer.json of every kind, against the library that defines it."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import LLM, tokenizers
from gpt.errors import UserError
from gpt.text_stream import TextStream
from gpt.tokenizers import END_OF_TEXT, BPETokenizer, HuggingFaceTokenizer, train_bpe
from reference.config import GPTConfig

library = pytest.importorskip("tokenizers")

TEXT = "It was the best of times, it was the worst of times, we'll see 1775;\n\n  the épochs of belief…\n" * 5
# Llama 3's (Meta's llama3 repository, llama/tokenizer.py).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Letters of old standing: what newer editions of Unicode call a letter differs between two libraries.
plain = st.text(st.characters(max_codepoint=0x24F)) | st.text("the 'll\n\t1é…☃", max_size=30)


def assert_one_line(error):
    assert str(error)
    assert "\n" not in str(error)


def bytes_like_gpt2(size=300):
    """What `train_bpe` makes, in the library's own hands."""
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    trained.add_special_tokens([END_OF_TEXT])
    return trained


def like_llama3():
    """Its own split, then bytes; special tokens after the vocabulary; a post-processor that writes the first."""
    trained = library.Tokenizer(library.models.BPE(ignore_merges=True))
    trained.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(LLAMA3), behavior="isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [TEXT], library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    trained.add_special_tokens(LLAMA3_SPECIAL)
    begin = ("<|begin_of_text|>", trained.token_to_id("<|begin_of_text|>"))
    trained.post_processor = library.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return trained


def like_llama2():
    """Pieces with byte fallback and a space before the text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *"▁thewasbof", "▁t", "he", "▁the"]
    vocabulary = {name: id for id, name in enumerate(names)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = library.Tokenizer(
        library.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    decoders = library.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(scope="module")
def theirs():
    return {"gpt2": bytes_like_gpt2(), "llama3": like_llama3(), "llama2": like_llama2()}


@pytest.fixture(scope="module")
def ours(theirs):
    return {
        "gpt2": train_bpe(TEXT, 300),
        **{name: HuggingFaceTokenizer(theirs[name].to_str()) for name in ("llama3", "llama2")},
    }


every = pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2"])


@every
@given(text=plain)
def test_the_library_gives_the_same_ids_and_text(theirs, ours, name, text):
    ids = ours[name].encode(text)
    assert ids == theirs[name].encode(text, add_special_tokens=False).ids
    assert ours[name].decode(ids) == theirs[name].decode(ids, skip_special_tokens=False)


@every
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(ours, name, text):
    text = text.replace("▁", "")  # which Llama 2's file takes for a space
    ids = ours[name].encode(text)
    assert ours[name].decode_bytes(ids) == text.encode()
    prompt = ours[name].encode("the ")
    stream = TextStream(ours[name], prompt)
    rest = getattr(ours[name], "encode_continued", ours[name].encode)(text)
    assert "".join([*map(stream.push, rest), stream.close()]) == text


def test_a_trained_vocabulary_is_bytes_merges_and_the_end(theirs, ours):
    trained = ours["gpt2"]
    assert (trained.name, trained.n_vocab, trained.eot) == ("bpe", 300, 299)
    assert sorted(trained.tokens[bytes((value,))] for value in range(256)) == list(range(256))
    assert trained.encode(f"the{END_OF_TEXT}", allowed_special={END_OF_TEXT})[-1] == 299
    assert train_bpe([TEXT], 300).spec() == trained.spec()
    assert len(trained.encode(TEXT)) < len(TEXT.encode()) / 2


@pytest.mark.parametrize(
    "text, size, message",
    [
        ("", 300, "there is no text"),
        (TEXT, 256, "vocab_size: expected at least 257"),
        (TEXT, 9000, r"vocab_size: the text gives \d+ tokens at most, got 9000"),
        ("ab\ud800", 300, "lone surrogate"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(text, size, message):
    with pytest.raises(UserError, match=message) as caught:
        train_bpe(text, size)
    assert "\n" not in str(caught.value)


def test_special_tokens_are_text_unless_they_are_allowed(theirs, ours):
    text = "<|start_header_id|>user<|end_header_id|>\n\nthe best<|eot_id|>"
    tokenizer = ours["llama3"]
    allowed = tokenizer.encode(text, allowed_special=tokenizer.special)
    assert allowed == theirs["llama3"].encode(text, add_special_tokens=False).ids
    assert (allowed[0], allowed[-1]) == (tokenizer.special["<|start_header_id|>"], tokenizer.special["<|eot_id|>"])
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
    assert tokenizer.decode(allowed) == tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"a{END_OF_TEXT}", allowed_special={END_OF_TEXT})[-1] == tokenizer.eot
    with pytest.raises(UserError, match="special tokens only"):
        tokenizer.encode(text, allowed_special={"<|pad|>"})


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_after_a_special_token_there_is_a_space_only_where_the_library_puts_one(scheme):
    theirs = like_llama2()
    theirs.normalizer = None
    theirs.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    ours = HuggingFaceTokenizer(theirs.to_str())
    for text in ("<s>the</s>\nthe", "the</s>the<s><s>", " </s> the", "<unk>t</s>"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizers.encode_special(ours, text) == ids
        assert tokenizers.encode_special(ours, text.replace("</s>", END_OF_TEXT)) == ids
        assert not {1, 2} & set(ours.encode(text))


@pytest.mark.parametrize("added", [True, False])
def test_what_ends_a_text_is_special_whatever_the_file_says(theirs, added):
    settings_ = json.loads(theirs["llama2"].to_str())
    settings_["added_tokens"][2]["special"] = False
    if not added:
        del settings_["added_tokens"][2]
    ours = HuggingFaceTokenizer(json.dumps(settings_), "</s>")
    assert (ours.eot, ours.n_vocab) == (2, theirs["llama2"].get_vocab_size())
    assert tokenizers.encode_special(ours, "the</s>")[-1] == 2
    assert 2 not in ours.encode("the</s>")


def test_what_a_text_begins_with_is_known_and_a_model_s_prompts_have_it(theirs, ours):
    assert ours["llama3"].begin == theirs["llama3"].encode("x").ids[:1]
    assert ours["llama3"].begin[0] in ours["llama3"].special.values()

    class Engine:
        config = GPTConfig(ours["llama3"].n_vocab, 8, 4, 1, 1)

    llm = LLM(Engine(), ours["llama3"])
    assert llm.encode("hello") == theirs["llama3"].encode("hello").ids
    name = next(name for name, id in ours["llama3"].special.items() if id == ours["llama3"].begin[0])
    assert llm.encode(name + "hello") == llm.encode("hello")  # as a chat template writes it


def test_specification_restores_the_tokenizer(ours):
    for tokenizer in ours.values():
        restored = tokenizers.from_spec(json.loads(json.dumps(tokenizer.spec())))
        assert restored.spec() == tokenizer.spec()
        assert (restored.name, restored.n_vocab, restored.eot) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot)
        assert restored.encode(TEXT) == tokenizer.encode(TEXT)
    assert ours["llama3"].eot == ours["llama3"].special["<|end_of_text|>"]
    assert ours["llama2"].eot == 2


def test_a_folder_is_read_as_what_it_holds(theirs, ours, tmp_path):
    def spec(name, **files):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, text in {"tokenizer.json": theirs[name].to_str(), **files}.items():
            (folder / file.replace("__", ".")).write_text(text, encoding="utf-8")
        return tokenizers.huggingface_spec(folder)

    assert spec("gpt2") == ours["gpt2"].spec()
    assert spec("llama2") == ours["llama2"].spec()
    assert spec("llama3") == ours["llama3"].spec()
    assert tokenizers.load(tmp_path / "llama3" / "tokenizer.json").spec() == ours["llama3"].spec()
    # The file beside it knows what ends a text; files of GPT-2's kind do not know the split.
    files = {"tokenizer_config__json": json.dumps({"eos_token": {"content": "<|eot_id|>"}})}
    files |= {"vocab__json": json.dumps(theirs["llama3"].get_vocab()), "merges__txt": ""}
    made = tokenizers.from_spec(spec("llama3", **files))
    assert (made.name, made.eot) == ("huggingface", made.special["<|eot_id|>"])
    written = tokenizers.huggingface_files(made.spec(), 8)
    assert json.loads(written["tokenizer_config.json"])["eos_token"] == "<|eot_id|>"
    assert written["tokenizer.json"] == theirs["llama3"].to_str()
    with pytest.raises(UserError, match=r"tokenizer\.json: the end of a text, '<x>', is no token"):
        spec("llama3", tokenizer_config__json=json.dumps({"eos_token": "<x>"}))


CHAT = "<|im_start|>user\nthe best<|im_end|>\n<|endoftext|>"


@pytest.fixture
def chat(theirs, tmp_path):
    """GPT-2's two files, and beside them tokens that were added and a token of theirs that ends a text."""
    transformers = pytest.importorskip("transformers")
    theirs["gpt2"].model.save(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps(theirs["gpt2"].get_vocab()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 300, "<|im_end|>": 301}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"})
    )
    return tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_added_tokens_and_the_end_of_a_text_are_read_from_old_and_new_files(chat):
    folder, peer = chat
    peer.save_pretrained(folder / "new")
    for place in (folder, folder / "new"):
        ours = tokenizers.from_spec(tokenizers.huggingface_spec(place))
        assert (ours.name, ours.n_vocab, ours.eot) == ("bpe", len(peer), peer.eos_token_id)
        assert tokenizers.encode_special(ours, CHAT) == peer.encode(CHAT)
        assert tokenizers.from_spec(json.loads(json.dumps(ours.spec()))).eot == ours.eot
    for name in ("vocab.json", "merges.txt"):
        (folder / "new" / name).write_bytes((folder / name).read_bytes())
    assert tokenizers.huggingface_spec(folder / "new") == ours.spec()


def test_what_is_written_of_several_special_tokens_is_read_by_transformers_and_here(chat):
    folder, peer = chat
    ours = tokenizers.from_spec(tokenizers.huggingface_spec(folder))
    for tokenizer in (ours, BPETokenizer(ours.tokens, {})):
        place = folder / f"out{tokenizer.eot}"
        place.mkdir()
        for name, text in tokenizers.huggingface_files(tokenizer.spec(), 8).items():
            (place / name).write_text(text, encoding="utf-8")
        again = type(peer).from_pretrained(place)
        assert (len(again), again.eos_token_id) == (tokenizer.n_vocab, tokenizer.eot)
        assert again.encode(CHAT) == tokenizers.encode_special(tokenizer, CHAT)
        assert tokenizers.huggingface_spec(place) == tokenizer.spec()


def test_a_file_of_ours_is_read(ours, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(ours["gpt2"].spec()))
    assert isinstance(tokenizers.load(path), BPETokenizer)
    assert tokenizers.load(str(path)).spec() == ours["gpt2"].spec()
    for text in ("", "[]", "{}", '{"name": "bpe"}', '{"name": "x"}', '{"model": 3}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="own.json") as caught:
            tokenizers.load(path)
        assert "\n" not in str(caught.value)


def test_a_specification_never_opens_a_file(tmp_path):
    with pytest.raises(UserError, match="unknown tokenizer"):
        tokenizers.from_spec({"name": str(tmp_path / "x.model")})


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_a_line(theirs, data):
    settings_ = json.loads(theirs[data.draw(st.sampled_from(["llama3", "llama2"]))].to_str())
    values = st.none() | st.integers(-1, 500) | st.text(max_size=3) | st.just([]) | st.just({})
    part = settings_
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key in part if isinstance(part[key], dict)]
        part = part[data.draw(st.sampled_from(inner))] if inner else part
    if part:
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(values)
    try:
        tokenizer = HuggingFaceTokenizer(json.dumps(settings_))
    except UserError as error:
        assert_one_line(error)
    else:
        assert tokenizer.n_vocab
        tokenizer.decode(range(tokenizer.n_vocab))


@pytest.mark.parametrize("spec", [{}, {"json": 3}, {"json": "{}"}, {"json": "{}", "end": 3}])
def test_a_damaged_specification_is_refused(spec):
    with pytest.raises(UserError):
        tokenizers.from_spec({"name": "huggingface", **spec})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'twingrad\[tokenizers\]'"):
        train_bpe(TEXT, 300)
