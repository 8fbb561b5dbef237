"""Finetuning on instructions (Raschka, chapter 7): data, masks and answers on the one trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpt.data.examples import Entries, ExampleLoader, JsonEntries, Subset, fingerprint, number, where
from gpt.engine import Engine
from gpt.finetune import instructions as data
from gpt.finetune.config import InstructConfig
from gpt.finetune.respond import KEY, respond, show
from gpt.finetune.run import Task, data_file, end_token
from gpt.llm import LLM
from gpt.prompts import format_prompt
from gpt.tokenizers import Tokenizer, begun, encode_special
from gpt.train.progress import Progress
from gpt.train.trainer import evaluate
from gpt.weights import registry
from reference.config import GPTConfig
from reference.torch_rng import Generator

__all__ = ["RESPONSES", "Instruct"]

RESPONSES = "instruction-data-with-response.json"


class Instruct(Task):
    """See gpt.finetune.config.InstructConfig."""

    sample_tokens = 50  # of an answer that is shown in training, at most

    def __init__(self, config: InstructConfig, tokenizer: Tokenizer, model: GPTConfig, generator: Generator) -> None:
        self.config, self.tokenizer = config, tokenizer
        length = min(config.loader.max_length or model.context_length, model.context_length)
        train, held_out, self.test = self.parts(config)
        entries = len(train) + len(self.test) + (0 if held_out is self.test else len(held_out))
        pad = end_token(tokenizer)
        collate = partial(data.collate, pad_id=pad, allowed_max_length=length, mask_instruction=config.mask_instruction)
        size, shuffle, drop = config.loader.batch_size, config.loader.shuffle, config.loader.drop_last
        sets = [
            data.InstructionDataset(part, tokenizer, config.style, length, cache=config.keep_tokens)
            for part in (train, held_out)
        ]
        self.longest = sets[0].longest
        self.length = min(self.longest, length)
        learnt = fingerprint(*self.files(config))
        self.train_loader = ExampleLoader(sets[0], collate, size, shuffle, drop, generator, learnt)
        self.validation_loader = ExampleLoader(sets[1], collate, size, False, False, generator)
        self.held_out = held_out
        self.answerable, self.unanswered = self._prompts(model.context_length)
        self.dropped = [entry for part in sets for entry in part.dropped]
        too_long = f", {len(self.dropped)} left out, whose prompts are too long" if self.dropped else ""
        self.data = f"{config.data}: {entries:,} entries, {len(sets[0]):,} to train on{too_long}"
        self.spec = {"kind": "instructions", "style": config.style}

    def files(self, config: Any) -> list[Path]:
        """Where the entries are."""
        return [data_file(config.data)]

    def parts(self, config: Any) -> tuple[Entries, Entries, Entries]:
        """Entries to learn from, to measure the validation loss on, and to answer when training is done."""
        entries = JsonEntries(*self.files(config))
        train, validation, test = data.split(entries, config.train_fraction, config.test_fraction)
        return train, validation if len(validation) else test, test

    def example(self) -> Mapping[str, Any]:
        """The entry whose answer is shown in training: the first that is held out."""
        return self.held_out[0]

    def sample(self, engine: Engine) -> str:
        """The answer to the example."""
        llm = LLM(engine, self.tokenizer, self.config.style)
        entry = self.example()
        if len(llm.encode(entry)) > engine.config.context_length:
            return ""
        return f"{entry['instruction']} -> {llm.generate(entry, self.sample_tokens).strip()}".replace("\n", " ")

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """The validation loss on all entries, and answers to the test entries, in a file."""
        results: dict[str, Any] = {
            "validation_loss": evaluate(engine, self.validation_loader),
            "dropped": [{"entry": entry, "reason": reason} for entry, reason in self.dropped],
            "unanswered": [{"entry": entry, "reason": reason} for entry, reason in self.unanswered],
        }
        llm = LLM(engine, self.tokenizer, self.config.style)
        if len(self.answerable):
            out = Path(self.config.out, RESPONSES)
            out.unlink(missing_ok=True)  # of an earlier end of this run
            progress.line(f"Answering {len(self.answerable)} test entries ...")
            answered = respond(llm, self.answerable, out, KEY, self.config.max_new_tokens)
            show(answered[:3], KEY, progress.line)
            progress.line(f"All answers: {out}")
        return results

    def _prompts(self, context: int) -> tuple[Subset, list[tuple[int, str]]]:
        """The test entries that will be answered, and those whose prompts leave no room: number and reason."""
        rows, unanswered = list[int](), list[tuple[int, str]]()
        for i in range(len(self.test)):
            if len(rows) == self.config.responses:
                break
            entry = self.test[i]
            data.check_entry(entry, where(self.test, i))
            length = len(begun(self.tokenizer, encode_special(self.tokenizer, format_prompt(entry, self.config.style))))
            if length <= context:
                rows.append(i)
            else:
                unanswered.append(
                    (number(self.test, i), f"the prompt has {length} tokens, the model's context {context}")
                )
        return Subset(self.test, rows), unanswered

    def file_name(self, weights: str) -> str:
        """As the book's gpt2-medium355M-sft: the model's name and size, without spaces and parentheses."""
        return f"{plain_name(weights)}-sft"


def plain_name(weights: str) -> str:
    """A name for files of what began with these weights: of the registry's models with the size, as in the book."""
    size = registry.ENTRIES[weights].size if weights in registry.ENTRIES else ""
    path = Path(weights)
    name = path.stem if path.suffix in (".safetensors", ".bin", ".pt", ".pth") else path.resolve().name
    return re.sub(r"^\.+|[ ()]", "", name) + size
