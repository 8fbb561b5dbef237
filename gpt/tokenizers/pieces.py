"""SentencePiece (Kudo and Richardson 2018): pieces of raw text, in which a space is the character U+2581, "▁".

With byte fallback a character that is no piece is written as the pieces of its UTF-8 bytes, <0x00> to <0xFF>, so any
text comes back as it was. Three things of the library stand in the way of that, and this is what is done about each:

- It drops spaces at the beginning and the end, and all but one between words, unless a model is trained with
  remove_extra_whitespaces=false. So ours are trained so; it changes no piece.
- It puts a space before the text (add_dummy_prefix), so that a first word is written as it is elsewhere, and takes one
  away when it decodes. That loses nothing, but the prefix must come once: a text that is encoded part by part begins
  with `encode`, and goes on with `encode_continued`.
- "▁" in the text itself would come back as a space: it is encoded as its three bytes.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError, require
from gpt.tokenizers.base import END_OF_TEXT, checked_ids, checked_special, utf8

__all__ = ["SentencePieceTokenizer", "train_pieces"]

SPACE = "▁"
# NormalizerSpec, field 3 of the model, {add_dummy_prefix, field 3: false}. Protocol buffers merge what is appended.
_NO_PREFIX = bytes((3 << 3 | 2, 2, 3 << 3, 0))
_LONGEST_LINE = 4192  # bytes: the library's max_sentence_length; it leaves out what is longer


class SentencePieceTokenizer:
    """`model`: a serialized model, what a file NAME.model holds. UserError for what is none.

    `begins`: whether a model has read the beginning of a sentence, "<s>", before each text.
    The model's end of sentence stands for <|endoftext|>. A text that names a control piece, such as "</s>", is text.
    """

    name: str = "sentencepiece"
    special: Collection[str] = ()

    def __init__(self, model: bytes, begins: bool = False) -> None:
        self._model = bytes(model)
        library = require("sentencepiece", extra="sentencepiece")
        if not model:  # which the library takes for a model without pieces
            raise UserError("not a SentencePiece model: it is empty")
        try:
            self._processor = processor = library.SentencePieceProcessor(model_proto=self._model)
            self.n_vocab: int = processor.vocab_size()
            self._bytes = [self._bytes_of(id) for id in range(self.n_vocab)]
            self._has_prefix = processor.normalize("a").startswith(SPACE)
            self._drops_spaces = not processor.normalize("  a").startswith(2 * SPACE)
            # The ids of "▁" written in bytes; nothing where the model has no byte fallback.
            fallback = [processor.piece_to_id(f"<0x{value:02X}>") for value in SPACE.encode()]
            self._space_ids = fallback if all(map(processor.is_byte, fallback)) else []
        except (RuntimeError, ValueError):  # pieces that are not UTF-8 are ValueErrors
            raise UserError("not a SentencePiece model, or a damaged one") from None
        if not self.n_vocab:
            raise UserError("not a SentencePiece model: it has no pieces")
        begin, end = processor.bos_id(), processor.eos_id()
        self.begin: Sequence[int] = [begin] if begins and begin >= 0 else []
        self.eot: int | None = end if end >= 0 else None

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        utf8(text)
        if not checked_special(allowed_special) or self.eot is None:
            return self._encode(self._processor, text)
        first, *rest = text.split(END_OF_TEXT)
        ids = self._encode(self._processor, first)
        for part in rest:
            ids += [self.eot, *self._encode(self._processor, part)]
        return ids

    def encode_continued(self, text: str) -> list[int]:
        """Token ids of what follows in a text whose beginning was encoded before: as `encode`, without the prefix."""
        utf8(text)
        return self._encode(self._without_prefix, text)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        texts: list[list[bytes]] = [[]]
        for id in checked_ids(ids, self.n_vocab):
            if id == self.eot:
                texts.append([])
            else:
                texts[-1].append(self._bytes[id])
        return END_OF_TEXT.encode().join(self._unprefixed(b"".join(parts)) for parts in texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        begins = {"begins": True} if self.begin else {}
        return {"name": self.name, "model": base64.b64encode(self._model).decode(), **begins}

    def model(self) -> bytes:
        """What a file NAME.model holds."""
        return self._model

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SentencePieceTokenizer:
        try:
            model = base64.b64decode(spec["model"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the specification of tokenizer {cls.name} is damaged: {error!r}") from None
        return cls(model, bool(spec.get("begins")))

    @classmethod
    def from_file(cls, path: Path, begins: bool = False) -> SentencePieceTokenizer:
        """The tokenizer in a file NAME.model, also one that SentencePiece's own programs wrote."""
        try:
            return cls(Path(path).read_bytes(), begins)
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @cached_property
    def _without_prefix(self) -> Any:
        if not self._has_prefix:
            return self._processor
        library = require("sentencepiece", extra="sentencepiece")
        return library.SentencePieceProcessor(model_proto=self._model + _NO_PREFIX)

    def _encode(self, processor: Any, text: str) -> list[int]:
        if not self._space_ids:
            return processor.encode(text)
        first, *rest = text.split(SPACE)
        ids = processor.encode(first)
        for part in rest:
            ids += [*self._space_ids, *self._without_prefix.encode(part)]
        return ids

    def _bytes_of(self, id: int) -> bytes:
        """What a piece writes; a control piece writes nothing."""
        piece: str = self._processor.id_to_piece(id)
        if self._processor.is_control(id):
            return b""
        if self._processor.is_unknown(id):
            return self._processor.decode([id]).encode()
        return bytes((int(piece[1:-1], 16),)) if self._processor.is_byte(id) else piece.replace(SPACE, " ").encode()

    def _unprefixed(self, data: bytes) -> bytes:
        if self._drops_spaces:
            return data.lstrip(b" ")
        return data.removeprefix(b" ") if self._has_prefix else data


def train_pieces(
    texts: str | Iterable[str], vocab_size: int = 4096, remove_extra_whitespaces: bool = False
) -> SentencePieceTokenizer:
    """Byte-pair encoding with byte fallback, trained on the lines of texts: <unk> 0, <s> 1, </s> 2, 256 bytes, pieces.

    Digits stand alone, no piece crosses from one word into the next, and there may be pieces of spaces alone. Of all
    characters the rarest 0.5% of the text are left to the bytes. `remove_extra_whitespaces` is the library's default:
    the same pieces, but spaces are lost, as said above. UserError for a size that the texts do not give.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    lines = [line for text in texts for line in text.split("\n")]
    longest = max((len(utf8(line)) for line in lines), default=0)
    if not longest:
        raise UserError("there is no text to train a tokenizer on")
    if vocab_size < 1:
        raise UserError(f"vocab_size: expected at least 1, got {vocab_size}")
    library, model = require("sentencepiece", extra="sentencepiece"), io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            self_test_sample_size=0,
            input_format="text",
            character_coverage=0.995,
            num_threads=os.cpu_count() or 1,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_surface=r" \342\201\207 ",  # the backslashes are in it, as in the models that this is compared with
            normalization_rule_name="identity",
            remove_extra_whitespaces=remove_extra_whitespaces,
            max_sentence_length=max(longest, _LONGEST_LINE),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_reason(str(error), vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _reason(message: str, vocab_size: int) -> str:
    """What the library's trainer complains of, in a line of ours."""
    if most := re.search(r"Please set it to a value <= (\d+)", message):
        return f"vocab_size: the text gives {most[1]} pieces at most, got {vocab_size}"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size: the text's characters and the bytes alone are {least[1]} pieces, got {vocab_size}"
    return f"sentencepiece: {' '.join(message.split())}"
