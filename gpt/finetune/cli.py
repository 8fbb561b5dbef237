"""The command finetune: one command for each task."""

from __future__ import annotations

from gpt.errors import INTERRUPTED
from gpt.finetune.config import ClassifyConfig, FinetuneConfig, InstructConfig, PreferConfig
from gpt.finetune.run import MakeTask, finetune
from gpt.options import parse_config, run_command


def main(argv: list[str]) -> int:
    """Run `twingrad finetune TASK` and return its exit status."""
    return run_command("twingrad finetune", {f.__name__: f for f in (classify, instruct, prefer)}, argv)


def classify(argv: list[str]) -> int:
    """Tell texts apart, by a new head on the model."""
    from gpt.finetune.classify import Classify

    return _run(ClassifyConfig, Classify, "classify", argv)


def instruct(argv: list[str]) -> int:
    """Follow instructions."""
    from gpt.finetune.instruct import Instruct

    return _run(InstructConfig, Instruct, "instruct", argv)


def prefer(argv: list[str]) -> int:
    """Prefer one of two answers, by DPO or ORPO."""
    from gpt.finetune.prefer import Prefer

    return _run(PreferConfig, Prefer, "prefer", argv)


def _run(config: type[FinetuneConfig], make_task: MakeTask, name: str, argv: list[str]) -> int:
    command = f"twingrad finetune {name}"
    result = finetune(parse_config(config, argv, prog=command), make_task, command)
    return INTERRUPTED if result.interrupted else 0
