"""The command line. One function a command; its docstring's first line is its help; what it needs it imports inside.

A mistake of the user's is one line on stderr, `error: ...`, and exit status 2; a failed check is 1; Ctrl-C is 130.
A traceback is printed only with TWINGRAD_TRACEBACK=1 in the environment.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gpt import __version__, world
from gpt.errors import INTERRUPTED, UserError
from gpt.options import Parser, parse_config, run_command
from gpt.processes import heed_ctrl_c

__all__ = ["COMMANDS", "main"]

GONE_READER = 141  # 128 + SIGPIPE, as a shell reports it


def check(argv: list[str]) -> int:
    """Hold every layer and the whole model of both engines against each other and against the truth."""
    from gpt.parity.cli import main

    return main(argv)


def train(argv: list[str]) -> int:
    """Train a model on a text, on either engine."""
    from gpt.train.config import RunConfig
    from gpt.train.run import train

    result = train(parse_config(RunConfig, argv, prog="twingrad train"))
    return INTERRUPTED if result.interrupted else 0


def plan(argv: list[str]) -> int:
    """Say what training a model asks for before it is trained: memory, operations, time at least, what fits."""
    from gpt.plan_cli import PlanConfig, plan

    preset = [f"--preset={argv[0]}"] if argv and not argv[0].startswith("-") else []
    return plan(parse_config(PlanConfig, [*preset, *argv[len(preset) :]], prog="twingrad plan"))


def generate(argv: list[str]) -> None:
    """Continue a text with a model, trained here or loaded, on either engine."""
    from gpt.llm import GenerateConfig, generate

    generate(parse_config(GenerateConfig, argv, prog="twingrad generate"))


def chat(argv: list[str]) -> None:
    """Talk to a model: a prompt, an answer as it is written, the next prompt."""
    from gpt.llm import ChatConfig, chat

    chat(parse_config(ChatConfig, argv, prog="twingrad chat"))


def finetune(argv: list[str]) -> int:
    """Teach a model a task: classify, instruct, prefer (two answers of which one is preferred)."""
    from gpt.finetune.cli import main

    return main(argv)


def finetune_lora(argv: list[str]) -> int:
    """Teach a checkpoint to follow instructions by low-rank adapters, with the flags of LitGPT's command."""
    from gpt.finetune.workshop import FinetuneLoRA, main

    return main(FinetuneLoRA, argv, prog="twingrad finetune_lora")


def finetune_full(argv: list[str]) -> int:
    """Teach a checkpoint to follow instructions, all of its weights, with the flags of LitGPT's command."""
    from gpt.finetune.workshop import FinetuneFull, main

    return main(FinetuneFull, argv, prog="twingrad finetune_full")


def classify(argv: list[str]) -> None:
    """Tell which label a text has, by a model that was finetuned to."""
    from gpt.finetune.classify import AskConfig, ask

    texts = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    ask(parse_config(AskConfig, [*(f"--text={t}" for t in texts), *argv[len(texts) :]], prog="twingrad classify"))


def respond(argv: list[str]) -> None:
    """Answer a file of instructions with a model, trained here or loaded."""
    from gpt.finetune.respond import RespondConfig, run

    run(parse_config(RespondConfig, argv, prog="twingrad respond"))


def evaluate(argv: list[str]) -> int:
    """Measure what a model knows: multiple choice, perplexity, lm-evaluation-harness, an LLM as judge."""
    from gpt.evaluate.cli import main

    return main(argv)


def weights(argv: list[str]) -> int:
    """List published weights, download them, convert between formats, and show what is in a file."""
    from gpt.weights.cli import main

    return main(argv)


def study(argv: list[str]) -> int:
    """Write a page with every number of a model's forward and backward pass; or study one layer alone."""
    from gpt.study.cli import StudyConfig, study

    return study(parse_config(StudyConfig, argv, prog="twingrad study"))


def attention(argv: list[str]) -> None:
    """Draw every head's attention on a text, and how it grew in training."""
    from gpt.study.attention import AttentionConfig, show

    print(*show(parse_config(AttentionConfig, argv, prog="twingrad attention")), sep="\n")


def diverge(argv: list[str]) -> int:
    """Name the first tensor on which two engines, or two checkpoints, part, and the operator that is enough for it."""
    from gpt.study.diverge_cli import main

    return main(argv)


def data(argv: list[str]) -> int:
    """List the texts that can be trained on, download them, and prepare one's own, encoded, for training."""
    from gpt.data.cli import main

    return main(argv)


def tokenizer(argv: list[str]) -> int:
    """Train a tokenizer on a text, and show what a tokenizer makes of one."""
    from gpt.tokenizers.cli import main

    return main(argv)


def doctor(argv: list[str]) -> int:
    """Show versions and devices, what is missing, what that costs, and how to install it."""
    from gpt.doctor import main

    return main(argv)


def demo(argv: list[str]) -> int:
    """Check, then train the same small model on both engines from the same seed, and let each write."""
    from gpt.demo import main

    return main(argv)


def version(argv: list[str]) -> None:
    """Print the version."""
    Parser(prog="twingrad version").parse_args(argv)
    print(__version__)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    command.__name__: command
    for command in (
        check, plan, train, finetune, finetune_lora, finetune_full, generate, chat, classify, respond, evaluate,
        weights, study, diverge, attention, data, tokenizer, doctor, demo, version,
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        heed_ctrl_c()
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = run_command("twingrad", COMMANDS, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # so that a reader that has gone shows here
        return status
    except BrokenPipeError:  # as in `twingrad data list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GONE_READER
    except KeyboardInterrupt:
        if world.is_first():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("TWINGRAD_TRACEBACK") == "1":
            traceback.print_exc()
        if text := world.last_words(_one_line(error)):
            print(f"error: {text}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError | OSError) else 1


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    if world.is_first():
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.strerror:
        advice = "; free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'writing'}: {error.strerror}{advice}"
    return f"{type(error).__name__}: {text} (unexpected; TWINGRAD_TRACEBACK=1 in the environment shows where)"
