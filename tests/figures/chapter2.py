"""Chapter 2 and the workshop's first part: text, tokens, windows."""

from __future__ import annotations

import numpy as np

from gpt import tokenizers
from gpt.data import load_text
from gpt.data.windows import WindowLoader
from gpt.tokenizers import simple
from reference.torch_rng import Generator
from tests.figures.engines import Layers
from tests.figures.registry import figure

WITHOUT_COLON = simple.PUNCTUATION.replace(":", "")
WITHOUT_COLON_AND_SEMICOLON = WITHOUT_COLON.replace(";", "")
TEA = "Hello, do you like tea? <|endoftext|> In the sunlit terraces"
PRIDE = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'


def verdict() -> str:
    return load_text("the-verdict")


def verdict_ids() -> list[int]:
    return tokenizers.load("gpt2").encode(verdict())


def verdict_batches(batch_size: int, max_length: int, stride: int) -> WindowLoader:
    return WindowLoader(verdict_ids(), batch_size, max_length, stride, shuffle=False, drop_last=True)


def encode(text: str) -> list[int]:
    return tokenizers.load("gpt2").encode(text, allowed_special={tokenizers.END_OF_TEXT})


@figure("ch02.verdict.n_chars")
def n_characters() -> int:
    return len(verdict())


@figure("ch02.verdict.last99")
def last_characters() -> str:
    return verdict()[-99:]


@figure("ch02.split.whitespace")
def split_at_whitespace() -> list[str]:
    return simple.split("Hello, world. This, is a test.", simple.WHITESPACE, keep_whitespace=True)


@figure("ch02.split.punct_nows")
def split_at_commas_and_periods() -> list[str]:
    return simple.split("Hello, world. This, is a test.", simple.COMMA_AND_PERIOD)


@figure("ch02.split.full")
def split_at_punctuation() -> list[str]:
    return simple.split("Hello, world. Is this-- a test?", WITHOUT_COLON)


@figure("ch02.regex.n_tokens.with_colon")
def n_words() -> int:
    return len(simple.split(verdict()))


@figure("ch02.regex.first30")
def first_words() -> list[str]:
    return simple.split(verdict())[:30]


@figure("ch02.regex.vocab_size.no_colon_no_semicolon")
def vocabulary_of_the_smaller_class() -> int:
    return len(simple.build_vocabulary(simple.split(verdict(), WITHOUT_COLON_AND_SEMICOLON)))


@figure("ch02.vocab.last5.1161")
def last_words_of_the_vocabulary() -> list[list]:
    tokenizer = simple.SimpleTokenizerV2.from_text(verdict(), WITHOUT_COLON_AND_SEMICOLON)
    return [[word, tokenizer.vocabulary[word]] for word in tokenizer.words[-5:]]


@figure("ch02.tokenizerV1.encode")
def word_ids() -> dict[str, list[int]]:
    classes = {
        "v1130_colon": simple.PUNCTUATION,
        "v1146": WITHOUT_COLON,
        "v1159": WITHOUT_COLON_AND_SEMICOLON,
    }
    return {name: simple.SimpleTokenizerV1.from_text(verdict(), c).encode(PRIDE) for name, c in classes.items()}


@figure("ch02.tokenizerV1.decode")
def words_back() -> str:
    tokenizer = simple.SimpleTokenizerV1.from_text(verdict())
    return tokenizer.decode(tokenizer.encode(PRIDE))


@figure("ws.regex.n_tokens_keep_ws")
def n_words_and_spaces() -> int:
    return len(simple.split(verdict(), keep_whitespace=True))


@figure("ws.regex.first38")
def first_words_and_spaces() -> list[str]:
    return simple.split(verdict(), keep_whitespace=True)[:38]


@figure("ws.regex.last20")
def last_words_and_spaces() -> list[str]:
    return sorted(set(simple.split(verdict(), keep_whitespace=True)))[-20:]


@figure("ws.tokenizerV1.decode")
def first_sentence_back() -> str:
    tokenizer = simple.SimpleTokenizerV1.from_text(verdict())
    return tokenizer.decode(
        tokenizer.encode("I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow")
    )


@figure("ch02.bpe.encode.of_some")
def byte_pair_ids() -> list[int]:
    return encode(f"{TEA} of someunknownPlace.")


@figure("ch02.bpe.decode")
def byte_pairs_back() -> str:
    return tokenizers.load("gpt2").decode(byte_pair_ids())


@figure("ws.bpe.encode.terracesof")
def byte_pair_ids_without_the_space() -> list[int]:
    return encode(f"{TEA}of someunknownPlace.")


@figure("ws.encode.after_a_year")
def byte_pair_ids_of_a_prompt() -> list[int]:
    return encode("After a year of working hard")


@figure("ch02.bpe.n_vocab")
def byte_pair_vocabulary() -> dict[str, int | None]:
    tokenizer = tokenizers.load("gpt2")
    return {"n_vocab": tokenizer.n_vocab, "eot": tokenizer.eot}


@figure("ch02.window.text")
def contexts_and_what_comes_next() -> list[list[str]]:
    decode, sample = tokenizers.load("gpt2").decode, verdict_ids()[50:]
    return [[decode(sample[:i]).strip(), decode(sample[i : i + 1]).strip()] for i in range(1, 5)]


@figure("ch02.loader.bs1_len4_stride1.first")
def first_batch() -> list:
    return [part.tolist() for part in next(iter(verdict_batches(1, 4, 1)))]


@figure("ch02.loader.bs1_len4_stride1.second")
def second_batch() -> list:
    batches = iter(verdict_batches(1, 4, 1))
    next(batches)
    return [part.tolist() for part in next(batches)]


@figure("ch02.loader.bs8_len4_stride4.inputs")
def inputs_of_eight() -> list:
    return next(iter(verdict_batches(8, 4, 4))).inputs.tolist()


@figure("ch02.loader.bs8_len4_stride4.targets")
def targets_of_eight() -> list:
    return next(iter(verdict_batches(8, 4, 4))).targets.tolist()


@figure("ch02.loader.lengths")
def lengths() -> dict[str, dict[str, int]]:
    sizes = ((1, 4, 1), (8, 4, 4), (4, 2, 2), (4, 8, 2), (2, 256, 256), (4, 256, 128))
    loaders = {f"bs{b}_len{n}_stride{s}": verdict_batches(b, n, s) for b, n, s in sizes}
    return {name: {"dataset": loader.n_windows, "batches": len(loader)} for name, loader in loaders.items()}


@figure("ch02.embedding.lookup3")
def embedding_of_token_3(layers: Layers) -> list:
    return layers.embedding(np.array([3]), Generator(123).normal((6, 3))).tolist()
