"""Learning preferences on the one trainer: direct preference optimization, and the odds ratio's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpt.chat import TEMPLATES
from gpt.data.examples import Entries, ExampleLoader, JsonEntries, fingerprint, number, where
from gpt.engine import Engine, Preferences
from gpt.finetune import preferences as data
from gpt.finetune.config import PreferConfig
from gpt.finetune.instruct import plain_name
from gpt.finetune.run import Task, data_file, end_token, write_json
from gpt.llm import LLM
from gpt.tokenizers import Tokenizer
from gpt.train.progress import Progress
from gpt.train.trainer import measured
from reference import dpo, orpo
from reference.config import GPTConfig
from reference.torch_rng import Generator

__all__ = ["ANSWERS", "Prefer", "measure_preferences"]

ANSWERS = "answers-before-and-after.json"


class Prefer(Task):
    """See gpt.finetune.config.PreferConfig.

    metrics     accuracy  share of pairs whose margin is above 0
                margin    dpo: beta times how much more the chosen answer has gained than the rejected one, in
                          log-probability; orpo: how much more probable a token of the chosen one is, in logarithms
                log_odds  the logarithm of the odds ratio of the two answers
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "log_odds")

    def __init__(self, config: PreferConfig, tokenizer: Tokenizer, model: GPTConfig, generator: Generator) -> None:
        self.config, self.tokenizer, self.pad = config, tokenizer, end_token(tokenizer)
        path = data_file(config.data)
        entries: Entries = JsonEntries(path)
        total = len(entries)
        if config.drop_sources:
            entries = data.filter_sources(entries, config.drop_sources)
        parts = data.split(entries, config.validation_fraction, config.split_seed)
        length = min(config.loader.max_length or model.context_length, model.context_length)
        self.sets = [
            data.PreferenceDataset(
                part, tokenizer, config.style, length, config.max_prompt_tokens, config.drop_identical
            )
            for part in parts
        ]
        self.objective, self.length = config.objective, self.sets[0].longest - 1
        self.counted = min(self.sets[0].longest_answer, self.length)
        self.held_out = parts[1]
        self.collate = partial(
            data.collate, pad_id=self.pad, objective=config.objective, beta=config.beta, max_length=length
        )
        size, shuffle, drop = config.loader.batch_size, config.loader.shuffle, config.loader.drop_last
        self.train_loader = ExampleLoader(self.sets[0], self.collate, size, shuffle, drop, generator, fingerprint(path))
        self.validation_loader = ExampleLoader(self.sets[1], self.collate, size, False, False, generator)
        self.dropped = [entry for part in self.sets for entry in part.dropped]
        self.identical = [entry for part in self.sets for entry in part.identical]
        notes = [
            f"{len(found)} {what}"
            for found, what in ((self.dropped, "left out"), (self.identical, "with equal answers"))
            if found
        ]
        self.data = ", ".join([f"{config.data}: {total:,} pairs, {len(self.sets[0]):,} to train on", *notes])
        self.spec = {"kind": "preferences", "style": config.style}
        self.before: list[str] = []

    def begin(self, engine: Engine, progress: Progress) -> None:
        """What the model thinks and says before it is trained."""
        if self.config.objective == "dpo":
            progress.line("Measuring the answers' log-probabilities before training ...")
            for part in self.sets:
                part.reference = self._reference(engine, part)
        self.asked = self._prompts(engine)
        self.before = self._answers(engine)

    def measure(self, engine: Engine, batch: Preferences) -> Mapping[str, float]:
        return measure_preferences(engine, batch)

    def finish(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """The metrics on all validation pairs, and answers before and after, side by side in a file."""
        results: dict[str, Any] = {
            f"validation_{name}": value
            for name, value in measured(engine, self.validation_loader, None, self.measure).items()
        }
        results["dropped"] = [{"entry": entry, "reason": reason} for entry, reason in self.dropped]
        results["identical"] = self.identical
        answers = [
            {"entry": entry, **texts._asdict(), "before": before, "after": after}
            for (entry, texts), before, after in zip(self.asked, self.before, self._answers(engine), strict=True)
        ]
        if answers:
            out = Path(self.config.out, ANSWERS)
            write_json(out, answers)
            for answer in answers[:2]:
                progress.line("")
                for name in ("prompt", "chosen", "rejected", "before", "after"):
                    progress.line(f"  {name + ':':<10}{' '.join(str(answer[name]).split())[:160]}")
            progress.line(f"Answers before and after: {out}")
        return results

    def file_name(self, weights: str) -> str:
        return f"{plain_name(weights)}-{self.config.objective}"

    def _reference(self, engine: Engine, pairs: Sequence[data.Pair]) -> np.ndarray | None:
        """Log-probabilities (N, 2) of the chosen and the rejected answers."""
        size, found = self.config.loader.batch_size, []
        for start in range(0, len(pairs), size):
            batch = self.collate(pairs[start : start + size])
            found.append(engine.token_logps(batch).logps.sum(axis=1).reshape(2, -1).T)
        return np.concatenate(found) if found else None

    def _prompts(self, engine: Engine) -> list[tuple[int, data.Texts]]:
        """The first held-out entries whose prompts fit the model: their numbers and texts."""
        llm, found = LLM(engine, self.tokenizer, self.config.style), list[tuple[int, data.Texts]]()
        end = self.tokenizer.decode([self.pad])
        for i in range(len(self.held_out)):
            if len(found) >= self.config.responses:
                break
            texts = data.pair_texts(self.held_out[i], where(self.held_out, i), self.config.style, end)
            if texts.prompt and len(llm.encode(texts.prompt)) <= engine.config.context_length:
                found.append((number(self.held_out, i), texts))
        return found

    def _answers(self, engine: Engine) -> list[str]:
        llm = LLM(engine, self.tokenizer, self.config.style)
        given = [texts.prompt for _, texts in self.asked]
        stop = ("<|",) if self.config.style in TEMPLATES else ()
        return [text.strip() for text in llm.generate(given, self.config.max_new_tokens, stop=stop)] if given else []


def measure_preferences(engine: Engine, batch: Preferences) -> dict[str, float]:
    """The objective's loss and the metrics of `Prefer`, from one pass in evaluation mode."""
    sums = engine.token_logps(batch).logps.sum(axis=1)
    a, b = (sums / batch.lengths).reshape(2, -1)
    log_odds = (a - b) - (np.log(orpo.not_probability(a)) - np.log(orpo.not_probability(b)))
    if batch.objective == "dpo":
        assert batch.reference is not None
        (chosen, rejected), (chosen0, rejected0) = sums.reshape(2, -1), batch.reference.reshape(2, -1)
        loss = float(dpo.forward(chosen, rejected, chosen0, rejected0, batch.beta)[0])
        margins = batch.beta * ((chosen - chosen0) - (rejected - rejected0))
    else:
        loss, margins = float(orpo.forward(a, b, batch.beta)[0]), a - b
    return {
        "loss": loss,
        "accuracy": float(np.mean(margins > 0)),
        "margin": float(np.mean(margins)),
        "log_odds": float(np.mean(log_odds)),
    }
