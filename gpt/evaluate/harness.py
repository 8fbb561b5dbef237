"""A model of this project in EleutherAI's lm-evaluation-harness, with all of its tasks.

    from gpt.evaluate.harness import HarnessLM

    lm_eval.simple_evaluate(HarnessLM(LLM.load("gpt2-small")), tasks=["hellaswag"])

`HarnessLM` is a subclass of `lm_eval.api.model.LM`, and is made when it is first asked for: lm_eval is an extra, and
slow to import. Its conventions are those of the harness's own model "hf" (gpt/evaluate/likelihood.py), but that a
continuation longer than the context length is scored in windows, where that one stops.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.data.files import atomic_write
from gpt.errors import UserError, require
from gpt.evaluate.likelihood import continuation_logps, rolling_logps
from gpt.evaluate.progress import Progress
from gpt.llm import LLM
from gpt.options import did_you_mean

__all__ = ["evaluate_harness", "harness_class", "write_harness"]

DEFAULT_TOKENS = 256  # of an answer, where the task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the harness's order
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def __getattr__(name: str) -> Any:
    if name == "HarnessLM":
        return harness_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def harness_class() -> type:
    """HarnessLM. UserError where lm_eval is not installed."""
    os.environ.setdefault("USE_TF", "0")  # its libraries load TensorFlow, which beside PyTorch may end a process
    base: Any = require("lm_eval.api.model", extra="harness").LM

    class HarnessLM(base):
        """An LLM as the harness asks for one. Its requests have `args`; answers come in the order of the requests."""

        def __init__(self, llm: LLM, batch_size: int = 4, progress: Progress | None = None) -> None:
            super().__init__()
            self.llm, self.batch_size, self.progress = llm, int(batch_size), progress

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """args (context, continuation) -> (log-probability, whether it is what the model would write)."""
            pairs = [request.args for request in requests]
            found = continuation_logps(self.llm, pairs, self.batch_size, self.progress)
            return self._keep("loglikelihood", requests, [(score.logp, score.greedy) for score in found])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """args (text,) -> its log-probability."""
            found = rolling_logps(self.llm, [request.args[0] for request in requests], self.batch_size, self.progress)
            return self._keep("loglikelihood_rolling", requests, [score.logp for score in found])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """args (context, settings) -> what the model writes next, up to a text of the setting `until`."""
            texts = _generate(self.llm, [request.args for request in requests], self.batch_size)
            return self._keep("generate_until", requests, texts)

        def _keep(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
            """Show the answers to the harness's cache, which is off unless asked for."""
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
            return answers

        def get_model_info(self) -> dict[str, Any]:
            """What the harness writes beside its figures."""
            config = self.llm.engine.config
            return {
                "engine": self.llm.engine.name,
                "tokenizer": self.llm.tokenizer.name,
                "model_num_parameters": config.n_parameters,
                "context_length": config.context_length,
            }

    return HarnessLM


def _generate(llm: LLM, requests: Sequence[tuple[str, Mapping[str, Any]]], batch_size: int) -> list[str]:
    """The answers to (context, settings), those of equal settings together, the longest contexts first."""
    groups: dict[str, list[int]] = defaultdict(list)
    asked: dict[tuple[str, str], int] = defaultdict(int)
    for i, (context, given) in enumerate(requests):
        settings = _settings(given)
        key = json.dumps(settings, sort_keys=True)
        if settings["temperature"]:  # a request that is repeated wants another sample
            settings["seed"] += asked[context, key]
            asked[context, key] += 1
        groups[json.dumps(settings, sort_keys=True)].append(i)
    answers = [""] * len(requests)
    for key, members in groups.items():
        settings = json.loads(key)
        members = sorted(members, key=lambda i: -len(requests[i][0]))
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            prompts = [_fitting(llm, requests[i][0], settings["max_new_tokens"]) for i in batch]
            for i, text in zip(batch, llm.generate(prompts, **settings), strict=True):
                answers[i] = text
    return answers


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's settings of a generation as those of LLM.generate; greedy unless do_sample or a temperature say so.

    UserError for a setting that is not known here, a search over beams say.
    """
    left = dict(given)
    lengths = [left.pop(name, None) for name in LENGTHS]
    length = next((number for number in lengths if number is not None), DEFAULT_TOKENS)
    until = left.pop("until", None) or []
    sample = left.pop("do_sample", None)
    temperature = float(left.get("temperature", 1.0 if sample else 0.0))
    settings = {name: left[name] for name in SAMPLING if left.get(name) is not None}
    unknown = sorted(set(left) - set(SAMPLING))
    if unknown:
        names = ("until", *LENGTHS, "do_sample", *SAMPLING)
        raise UserError(f"generation setting {unknown[0]}: not known here, only {', '.join(names)}")
    stops = [until] if isinstance(until, str) else list(until)
    return {
        "seed": 123,
        **settings,
        "max_new_tokens": int(length),
        "stop": [stop for stop in stops if stop],
        "temperature": 0.0 if sample is False else temperature,
    }


def _fitting(llm: LLM, context: str, new: int) -> str:
    """The end of a context that leaves room for `new` tokens, or else for half of what the model can read.

    An empty context is the text of the token that ends a text, from which a model begins one.
    """
    tokenizer = llm.tokenizer
    if not context:
        if tokenizer.eot is None:
            raise UserError(f"context: expected a text, got an empty one; {tokenizer.name} has no token to begin one")
        return tokenizer.decode([tokenizer.eot])
    length = llm.engine.config.context_length
    room = max(length - new, length // 2, 1)
    ids = llm.encode(context)
    # A character that is cut in two is left out.
    return context if len(ids) <= room else tokenizer.decode_bytes(ids[-room:]).decode("utf-8", errors="ignore")


def evaluate_harness(
    llm: LLM,
    tasks: Sequence[str],
    folder: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The harness's figures for its tasks of these names, and those in `folder`: what simple_evaluate returns.

    UserError where lm_eval is not installed, for an unknown task, and data that cannot be loaded.
    """
    lm = harness_class()(llm, batch_size, progress)
    library: Any = require("lm_eval", extra="harness")
    failed: Any = require("datasets.exceptions", extra="harness").DatasetsError
    manager: Any = require("lm_eval.tasks", extra="harness").TaskManager(include_path=str(folder) if folder else None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"tasks: lm_eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}")
    try:
        return library.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, failed) as error:
        raise UserError(f"the data of {', '.join(tasks)} cannot be loaded: {' '.join(str(error).split())}") from error


def write_harness(path: Path, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the figures with the settings that they are of as JSON."""
    written = {
        "config": dict(config),
        **{key: results[key] for key in ("results", "versions", "n-shot") if key in results},
    }
    with atomic_write(path) as file:
        file.write(json.dumps(written, ensure_ascii=False, indent=1, default=str).encode())
