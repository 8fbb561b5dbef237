"""`twingrad tokenizer`: train a vocabulary of one's own, and see what a tokenizer makes of a text."""

from __future__ import annotations

import json
from pathlib import Path

from gpt import tokenizers
from gpt.data.files import atomic_write
from gpt.data.text import load_text
from gpt.errors import UserError
from gpt.options import Parser, did_you_mean, run_command

_KINDS = {"sentencepiece": tokenizers.MODEL, "bpe": tokenizers.JSON}


def train(argv: list[str]) -> None:
    """Train a tokenizer on a text, and write it as a file that --tokenizer takes."""
    parser = Parser(prog="twingrad tokenizer train", description=train.__doc__)
    parser.add_argument("--kind", default="sentencepiece", help="sentencepiece or bpe [sentencepiece]")
    parser.add_argument("--data", required=True, help="a text file, or a name of twingrad data list")
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="how many tokens [4096]")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="NAME.model for sentencepiece, NAME.json for bpe"
    )
    parser.add_argument(
        "--remove_extra_whitespaces",
        action="store_true",
        help="sentencepiece: forget all spaces but one between words, as its own default is; texts then come back so",
    )
    arguments = parser.parse_args(argv)
    kind, out, size = arguments.kind, arguments.out, arguments.vocab_size
    if kind not in _KINDS:
        raise UserError(f"kind: {kind!r} is not one of {', '.join(_KINDS)}{did_you_mean(kind, _KINDS)}")
    if out.suffix != _KINDS[kind]:
        raise UserError(f"out: expected a name that ends in {_KINDS[kind]} for {kind}, got {out}")
    if arguments.remove_extra_whitespaces and kind != "sentencepiece":
        raise UserError(f"remove_extra_whitespaces: means nothing to {kind}, which keeps every space")
    if out.exists():  # texts may be encoded with it
        raise UserError(f"out: {out} exists already; choose another name, or remove it")
    text = load_text(arguments.data)
    made: tokenizers.Tokenizer
    if kind == "sentencepiece":
        made = pieces = tokenizers.train_pieces(text, size, arguments.remove_extra_whitespaces)
        data = pieces.model()
    else:
        made = tokenizers.train_bpe(text, size)
        data = json.dumps(made.spec()).encode()
    with atomic_write(out) as file:
        file.write(data)
    print(f"{out}: {_describe(made)}; {arguments.data} is {len(made.encode(text)):,} of them")


def show(argv: list[str]) -> None:
    """Show what a tokenizer is, and the tokens of a text."""
    parser = Parser(prog="twingrad tokenizer show", description=show.__doc__)
    parser.add_argument("tokenizer", metavar="FILE", help="a file .model or .json, or a name, gpt2 or bytes")
    parser.add_argument("--text", help="a text to encode")
    arguments = parser.parse_args(argv)
    tokenizer = tokenizers.load(arguments.tokenizer)
    print(f"{arguments.tokenizer}: {_describe(tokenizer)}")
    if arguments.text is None:
        return
    ids = tokenizer.encode(arguments.text)
    width, written = len(str(tokenizer.n_vocab - 1)), 0
    for count, id in enumerate(ids, 1):
        # What a token adds to the text before it; by itself it may be written differently.
        data = tokenizer.decode_bytes(ids[:count])
        piece, written = data[written:], len(data)
        try:
            shown = repr(piece.decode("utf-8"))
        except UnicodeDecodeError:
            shown = f"bytes {piece.hex(' ')}"
        print(f"{id:>{width}}  {shown}")
    again = "the same text" if tokenizer.decode(ids) == arguments.text else repr(tokenizer.decode(ids))
    print(f"{len(ids)} tokens, which decode to {again}")


def _describe(tokenizer: tokenizers.Tokenizer) -> str:
    end = "no token ends a text" if tokenizer.eot is None else f"{tokenizer.eot} ends a text"
    return f"{tokenizer.name}, {tokenizer.n_vocab:,} tokens, {end}"


def main(argv: list[str]) -> int:
    """Run one of the commands train and show."""
    return run_command("twingrad tokenizer", {"train": train, "show": show}, argv)
