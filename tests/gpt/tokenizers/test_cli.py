"""`twingrad tokenizer`: files that the other commands take, and one line for what is wrong."""

import pytest

from gpt import cli, tokenizers
from gpt.data import load_text, open_tokens
from gpt.train.checkpoint import find_checkpoint
from gpt.weights.load import load

pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

TEXT = (
    "It was the best of times, it was the worst of times;  it was the age of wisdom, the age of été, of foolishness.\n"
    * 40
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind, file", [("sentencepiece", "own.model"), ("bpe", "own.json")])
def test_a_trained_tokenizer_encodes_and_trains(kind, file, text, tmp_path, capsys):
    path = tmp_path / file
    assert run("tokenizer", "train", "--kind", kind, "--data", text, "--vocab_size", 300, "--out", path) == 0
    assert f"{kind}, 300 tokens" in capsys.readouterr().out
    assert run("tokenizer", "train", "--kind", kind, "--data", text, "--vocab_size", 290, "--out", path) == 2
    assert f"out: {path} exists already" in capsys.readouterr().err
    tokenizer = tokenizers.load(path)
    assert tokenizer.n_vocab == 300
    assert tokenizer.decode(tokenizer.encode(TEXT)) == load_text(text)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["text.txt", file])  # nothing half written

    assert run("data", "prepare", text, "--out", tmp_path / "text.tokens", "--tokenizer", path) == 0
    assert tokenizer.decode(open_tokens(tmp_path / "text.tokens", tokenizer).ids) == TEXT

    flags = ["--preset", "bytes-tiny", "--engine", "numpy", "--steps", 1, "--max_length", 8, "--eval_every", 0]
    assert run("train", "--data", text, "--tokenizer", path, "--out", tmp_path / "run", *flags) == 0
    saved = load(find_checkpoint(tmp_path / "run", "last"))
    assert saved.config.vocab_size == 300
    assert saved.tokenizer == tokenizer.spec()
    capsys.readouterr()
    asked = ["--prompt", "It was", "--max_new_tokens", 3, "--engine", "numpy"]
    assert run("generate", "--model", tmp_path / "run", *asked) == 0
    assert capsys.readouterr().out.startswith("It was")


def test_extra_spaces_are_forgotten_on_request(text, tmp_path):
    path = tmp_path / "x.model"
    flags = ["--vocab_size", 300, "--remove_extra_whitespaces"]
    assert run("tokenizer", "train", "--data", text, "--out", path, *flags) == 0
    assert tokenizers.load(path).decode(tokenizers.load(path).encode("  a   b ")) == "a b"


def test_show(text, tmp_path, capsys):
    run("tokenizer", "train", "--data", text, "--vocab_size", 300, "--out", tmp_path / "x.model")
    capsys.readouterr()
    assert run("tokenizer", "show", tmp_path / "x.model", "--text", "It  was é") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("x.model: sentencepiece, 300 tokens, 2 ends a text")
    assert lines[-1] == f"{len(lines) - 2} tokens, which decode to the same text"
    assert run("tokenizer", "show", "bytes", "--text", "é") == 0
    assert capsys.readouterr().out.splitlines()[1:3] == ["195  bytes c3", "169  bytes a9"]
    assert run("tokenizer", "show", "bytes") == 0
    assert capsys.readouterr().out == "bytes: bytes, 257 tokens, 256 ends a text\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--kind bpp", "kind: 'bpp' is not one of sentencepiece, bpe; did you mean bpe?"),
        ("--kind bpe --out x.model", "out: expected a name that ends in .json for bpe, got x.model"),
        ("--kind bpe --out x.json --vocab_size 9999", "vocab_size: the text gives"),
        ("--kind bpe --out x.json --remove_extra_whitespaces", "means nothing to bpe"),
        ("--vocab_size 9999", "vocab_size: the text gives"),
        ("--vocab_size x", "invalid int value: 'x'"),
        ("--data missing", "'missing' is neither a file nor"),
        ("--out text.txt/x.model --vocab_size 300", "cannot write text.txt/x.model"),
        ("--oui x", "has no option --oui"),
    ],
)
def test_one_line_says_what_is_wrong(flags, message, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tokenizer", "train", "--data", "text.txt", "--out", "x.model", *flags.split()) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
