"""A language model to talk to: `LLM.load(...)`, then `generate`. And the commands generate and chat.

from gpt import LLM

llm = LLM.load("gpt2-small")
print(llm.generate("Every effort moves you", max_new_tokens=25))
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt import chat as templates
from gpt import memory, options, prompts, tokenizers
from gpt.engine import Engine, create_engine
from gpt.errors import UserError
from gpt.generate import Sampling, Writer
from gpt.text_stream import TextStream
from gpt.tokenizers import Tokenizer
from reference.torch_rng import Generator

__all__ = ["LLM", "ChatConfig", "GenerateConfig", "chat", "generate"]

Prompt = str | Mapping[str, Any]  # a text, or an entry of a data set of instructions


class LLM:
    """An engine and its tokenizer. Deleting it frees its memory."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, style: str | None = None) -> None:
        """`style`: what the model was finetuned with, a prompt style or a chat template; None: nothing."""
        if tokenizer.n_vocab > engine.config.vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, "
                f"the model an embedding of {engine.config.vocab_size}: they do not belong together"
            )
        if engine.config.n_outputs != engine.config.vocab_size:
            raise UserError(
                f"the model tells {engine.config.n_outputs} classes apart, and writes no text; "
                "ask it with: twingrad classify"
            )
        self.engine, self.tokenizer, self.finetuned = engine, tokenizer, style
        self.style = style if style in prompts.STYLES else "alpaca"  # of entries

    def __del__(self) -> None:
        self.__dict__.clear()
        memory.return_freed()

    @classmethod
    def load(
        cls,
        source: str | Path,
        engine: str = "auto",
        dtype: str | None = None,
        device: str = "auto",
        adapter: str | Path | None = None,
    ) -> LLM:
        """A model from a name of `twingrad weights list`, a Hugging Face repository's name, a folder or a file.

        `engine` is numpy, torch, triton, or auto: torch where it is installed. `dtype` is float32 or float64, by
        default float64 for weights that are stored so, else float32. `adapter`: a file of low-rank adapters that were
        trained beside these weights (gpt/finetune/adapters.py). The prompt style is the one that the model was
        finetuned with. Raises UserError with what is wrong and where.
        """
        from gpt.weights.load import load

        saved = load(source)
        tokenizer = saved.tokenizer
        if tokenizer is None:
            raise UserError(f"{source}: holds no tokenizer, so text means nothing to this model")
        if adapter is not None:
            from gpt.finetune.adapters import load_adapter

            params, config = load_adapter(adapter, saved.params, saved.config)
            saved = saved._replace(params=params, config=config)
        if dtype is None:
            dtype = "float64" if all(p.dtype == np.float64 for p in saved.params.values()) else "float32"
        return cls(
            create_engine(engine, saved.config, saved.params, dtype=dtype, device=device),
            tokenizers.from_spec(tokenizer),
            (saved.task or {}).get("style"),
        )

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 100,
        *,
        stream: bool = False,
        samples: int = 1,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Any:
        """The continuation of a prompt, without the prompt itself: a str. Of several prompts a list, in their order.

        An entry of a data set of instructions, a mapping, is put into the model's prompt style (gpt/prompts.py).
        `samples` above 1 gives a list of so many for each prompt, the i-th drawn from seed + i. `stream` gives an
        iterator over pieces of the text, for one prompt and one sample. A text ends with the tokenizer's end of text,
        before a text of `stop`, or after `max_new_tokens`. `sampling`: temperature, top_k and all other fields of
        gpt.generate.Sampling. Raises UserError for an empty prompt and impossible settings.
        """
        chosen = options.from_dict(Sampling, {"max_new_tokens": max_new_tokens, **sampling})
        if samples < 1:
            raise UserError(f"samples: expected at least 1, got {samples}")
        single = isinstance(prompt, (str, Mapping))
        given: list[Prompt] = [prompt] if isinstance(prompt, (str, Mapping)) else list(prompt)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stream:
            if not single or samples > 1:
                raise UserError("stream: expected one prompt and one sample; more than one text has no single stream")
            pieces = self._pieces(given, chosen, stops, 1)
            return (piece for _, piece in pieces)
        texts = [""] * (len(given) * samples)
        for row, piece in self._pieces(given, chosen, stops, samples):
            texts[row] += piece
        if samples > 1:
            groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
            return groups[0] if single else groups
        return texts[0] if single else texts

    def chat(
        self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 100, *, template: str, **others: Any
    ) -> Any:
        """The assistant's answer to a conversation, messages of a "role" and a "content" (gpt/chat.py).

        `template`: llama3, chatml, zephyr, or the text of a template. `others`: as for `generate`.
        """
        end = self.tokenizer.decode([self.tokenizer.eot]) if self.tokenizer.eot is not None else ""
        text = templates.render(messages, template, eos_token=end, add_generation_prompt=True)
        return self.generate(text, max_new_tokens, **others)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a text, or of an entry in the model's prompt style. UserError for an empty one."""
        text = prompt if isinstance(prompt, str) else prompts.format_prompt(prompt, self.style)
        ids = tokenizers.encode_special(self.tokenizer, text)
        if not ids:
            raise UserError("prompt: expected a text to continue, got an empty one")
        return tokenizers.begun(self.tokenizer, ids)

    def _pieces(
        self, given: Sequence[Prompt], sampling: Sampling, stop: Sequence[str], samples: int
    ) -> Iterator[tuple[int, str]]:
        """Checks at once; then (row, text) as the texts grow, prompt by prompt, its samples in turn."""
        if sampling.stop_token is None:
            sampling = dataclasses.replace(sampling, stop_token=self.tokenizer.eot)
        encoded = [ids for ids in map(self.encode, given) for _ in range(samples)]
        generators = [Generator(sampling.seed + i) for _ in given for i in range(samples)]
        streams = [TextStream(self.tokenizer, ids, stop) for ids in encoded]
        rows = [np.array(ids, np.int64) for ids in encoded]
        writer = Writer(self.engine, rows, sampling, generators, vocab_size=self.tokenizer.n_vocab)

        def write() -> Iterator[tuple[int, str]]:
            while writer.running:
                for row, token in writer.step().items():
                    if piece := streams[row].push(token):
                        yield row, piece
                    if streams[row].ended and row in writer.running:
                        writer.end(row)
            for row, text in enumerate(streams):
                if piece := text.close():
                    yield row, piece

        return write()


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a text with a model, trained here or loaded."""

    model: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a folder or file of weights, or a name (weights list)."""
    prompt: str = ""
    """The text to continue."""
    adapter: str | None = None
    """A file of low-rank adapters that were trained beside these weights."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    samples: int = 1
    """How many texts; they differ where the temperature is above 0."""
    stop: tuple[str, ...] = ()
    """A text that ends the answer, and is no part of it; may be given several times."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError('prompt: expected a text to continue, got none; give one with --prompt "..."')
        if self.samples < 1:
            raise UserError(f"samples: expected at least 1, got {self.samples}")


def generate(config: GenerateConfig) -> None:
    """Print the prompt and its continuation: one sample as it is written, several when they are."""
    llm = LLM.load(config.model, config.engine, adapter=config.adapter)
    settings = {"samples": config.samples, "stop": config.stop, **dataclasses.asdict(config.sampling)}
    if config.samples > 1:
        print(*(config.prompt + text for text in llm.generate(config.prompt, **settings)), sep="\n\n")
        return
    pieces = llm.generate(config.prompt, stream=True, **settings)  # wrong settings show before the prompt is printed
    print(config.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model. q or the end of the input leaves, Ctrl-C stops an answer."""

    model: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a folder or file of weights, or a name (weights list)."""
    adapter: str | None = None
    """A file of low-rank adapters that were trained beside these weights."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy. triton: PyTorch on the kernels."""
    style: Literal["auto", "plain", "alpaca", "phi3", "llama3", "chatml", "zephyr"] = "auto"
    """How a prompt is put to the model: as it is, or in the words it was finetuned with; auto: in those that its file
    names, else plain. plain, alpaca and phi3 put each prompt by itself, the others the whole conversation."""
    stop: tuple[str, ...] = ()
    """A text that ends the answer, and is no part of it; may be given several times."""
    sampling: Sampling = field(default_factory=Sampling)


def chat(config: ChatConfig) -> None:
    """The loop behind `twingrad chat`: reads prompts from standard input, writes answers to standard output."""
    llm = LLM.load(config.model, config.engine, adapter=config.adapter)
    style = (llm.finetuned or "plain") if config.style == "auto" else config.style
    keeps = style not in prompts.STYLES  # those put each prompt by itself
    if not keeps:
        llm.style = style
    said: list[dict[str, str]] = []
    settings = {"stop": config.stop, **dataclasses.asdict(config.sampling)}
    TextStream(llm.tokenizer, stop=config.stop)  # wrong settings show now, not after the first prompt
    llm.generate([], **settings)
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "q":
            return
        if not line:
            continue
        asked = [*said, {"role": "user", "content": line}]
        try:
            if keeps:
                pieces = llm.chat(asked, template=style, stream=True, **settings)
            else:
                pieces = llm.generate({"instruction": line}, stream=True, **settings)
        except UserError as error:  # such as a word that the tokenizer does not know
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        if keeps:  # without markers that the model wrote: among the template's own they would say who speaks
            said = [*asked, {"role": "assistant", "content": templates.clean_response(answer)}]
        print(flush=True)
