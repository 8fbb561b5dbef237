"""`twingrad evaluate`: what a model knows, by multiple choice, perplexity and the tasks of lm-evaluation-harness; and
how good its answers are, to a judge.

A model in the place of a command is `evaluate choices` of it: twingrad evaluate DIR --tasks mmlu_philosophy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt.data.files import check_can_write
from gpt.errors import UserError
from gpt.options import did_you_mean, parse_config, run_command, to_dict

__all__ = ["COMMANDS", "main"]

MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


@dataclass(frozen=True)
class ListConfig:
    """List the tasks in a folder: how many questions each has in dev, test and val."""

    data: str = "mmlu"
    """The folder of tasks; one that is not in the current folder is looked for in TWINGRAD_DATA."""


@dataclass(frozen=True)
class ChoicesConfig:
    """Let a model answer questions of multiple choice, and count the right answers by subject."""

    model: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a folder or file of weights, or a name (weights list)."""
    tasks: str = ""
    """Names of tasks (evaluate list), separated by commas; mmlu: all of MMLU's."""
    data: str = "mmlu"
    """The folder of tasks; one that is not in the current folder is looked for in TWINGRAD_DATA."""
    mode: Literal["letters", "texts"] = "letters"
    """letters: the choices are listed, and their letters scored. texts: the choices themselves are scored."""
    num_fewshot: int = 0
    """How many questions of dev to show with their answers before each."""
    split: Literal["test", "val", "dev"] = "test"
    """Which questions to ask."""
    limit: int | None = None
    """Ask the first so many of each task only."""
    batch_size: int = 4
    """How many prompts to read at a time."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy."""
    out: str = "evaluation"
    """The folder to write results.json, accuracy.png and accuracy.pdf into."""

    def __post_init__(self) -> None:
        if not self.tasks.strip():
            raise UserError(
                "tasks: expected the name of a task, got none; give one with --tasks (evaluate list shows all)"
            )
        _at_least_one("batch_size", self.batch_size)


@dataclass(frozen=True)
class PerplexityConfig:
    """How well a model predicts a text: perplexity per token, bits per byte."""

    model: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a folder or file of weights, or a name (weights list)."""
    data: str = ""
    """A text file, or a name of twingrad data list."""
    stride: int | None = None
    """How many tokens each window predicts, the others being context; none: all, windows are disjoint."""
    batch_size: int = 4
    """How many windows to read at a time."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data: expected a text, got none; give a file or a name of twingrad data list with --data")
        _at_least_one("batch_size", self.batch_size)


@dataclass(frozen=True)
class HarnessConfig:
    """Run tasks of EleutherAI's lm-evaluation-harness on a model; it loads their data from Hugging Face."""

    model: str = "runs/latest"
    """A run's folder (its best, else its last checkpoint), a folder or file of weights, or a name (weights list)."""
    tasks: str = ""
    """Names of its tasks, separated by commas, such as hellaswag."""
    include_path: str | None = None
    """A folder of more tasks, in its YAML format."""
    num_fewshot: int | None = None
    """How many examples to show before each question; none: what the task says."""
    limit: int | None = None
    """Ask the first so many of each task only."""
    batch_size: int = 4
    """How many texts to read at a time."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed, else NumPy."""
    out: str = "evaluation"
    """The folder to write harness.json into."""

    def __post_init__(self) -> None:
        if not self.tasks.strip():
            raise UserError("tasks: expected the name of a task of lm_eval, got none; give one with --tasks")
        _at_least_one("batch_size", self.batch_size)


def list_(argv: list[str]) -> None:
    """List the tasks in a folder, MMLU's files for instance."""
    from gpt.evaluate.choices import SPLITS, list_tasks

    config = parse_config(ListConfig, _named(argv, "data"), prog="twingrad evaluate list")
    folder = _folder(config.data)
    tasks = list_tasks(folder) if folder.is_dir() or config.data != ListConfig.data else {}
    if not tasks:
        print(f"no tasks in {folder}. MMLU's are in {MMLU}: unpack it, and name its folder data with --data")
        return
    width = max(map(len, tasks))
    print(f"{'task':<{width}}" + "".join(f"{split:>8}" for split in SPLITS))
    for name, task in tasks.items():
        counts = (f"{len(task.questions(split)):,}" if split in task.files else "" for split in SPLITS)
        print((f"{name:<{width}}" + "".join(f"{count:>8}" for count in counts)).rstrip())


def choices(argv: list[str]) -> None:
    """Let a model answer questions of multiple choice: accuracy by subject."""
    from gpt.evaluate.choices import choose_tasks, evaluate_choices, plot_accuracy, write_results
    from gpt.evaluate.progress import create_progress
    from gpt.llm import LLM
    from gpt.train.plot import save_plot

    config = parse_config(ChoicesConfig, _named(argv, "model"), prog="twingrad evaluate choices")
    folder = _folder(config.data)
    if not folder.is_dir() and config.data == ChoicesConfig.data:
        raise UserError(f"data: there is no folder {folder}; MMLU's is in {MMLU}: unpack it, and name it with --data")
    tasks = choose_tasks(folder, config.tasks)
    out = Path(config.out)
    check_can_write(out / "results.json")  # before the model is loaded, not after
    llm = LLM.load(config.model, config.engine)
    settings = (config.mode, config.num_fewshot, config.split, config.limit, config.batch_size)
    results = evaluate_choices(llm, tasks, *settings, create_progress("tokens"))
    write_results(out / "results.json", results, to_dict(config))
    written = save_plot(plot_accuracy(results, f"{config.tasks}, {config.num_fewshot} examples"), out / "accuracy")
    rows = {**results.subjects, "overall": results.overall}
    width = max(map(len, rows))
    for name, found in rows.items():
        parts = [f"{name:<{width}}  {found.questions:>6,} questions  acc {_percent(found.acc, found.acc_stderr)}"]
        if found.acc_norm is not None:
            parts.append(f"acc_norm {_percent(found.acc_norm, found.acc_norm_stderr)}")
        print("  ".join([*parts, f"chance {found.chance:.1%}"]))
    fewer = sum(answer.shots < config.num_fewshot for answer in results.answers)
    if fewer:
        print(f"{fewer:,} prompts were too long for {config.num_fewshot} examples, and had fewer")
    print(out / "results.json", *written, sep="\n")


def perplexity(argv: list[str]) -> None:
    """How well a model predicts a text: perplexity per token, bits per byte."""
    from gpt.data.text import load_text
    from gpt.evaluate.likelihood import perplexity
    from gpt.evaluate.progress import create_progress
    from gpt.llm import LLM

    config = parse_config(PerplexityConfig, _named(argv, "model"), prog="twingrad evaluate perplexity")
    text = load_text(config.data)
    if not text:
        raise UserError(f"{config.data}: expected a text, got an empty file")
    found = perplexity(
        LLM.load(config.model, config.engine), text, config.stride, config.batch_size, create_progress("tokens")
    )
    print(f"perplexity      {found.perplexity:,.4f} per token")
    print(f"cross entropy   {found.nats_per_token:.6f} nats per token")
    print(f"bits per byte   {found.bits_per_byte:.6f}")
    print(f"predicted       {found.tokens:,} tokens, {found.bytes:,} bytes")


def harness(argv: list[str]) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness."""
    from gpt.errors import check_installed
    from gpt.evaluate.harness import evaluate_harness, write_harness
    from gpt.evaluate.progress import create_progress
    from gpt.llm import LLM

    config = parse_config(HarnessConfig, _named(argv, "model"), prog="twingrad evaluate harness")
    check_installed("lm_eval", extra="harness")
    names = [name for name in map(str.strip, config.tasks.split(",")) if name]
    folder = Path(config.include_path) if config.include_path else None
    if folder and not folder.is_dir():
        raise UserError(f"include_path: {folder} is not a folder")
    out = Path(config.out) / "harness.json"
    check_can_write(out)
    llm = LLM.load(config.model, config.engine)
    settings = (config.num_fewshot, config.limit, config.batch_size)
    results = evaluate_harness(llm, names, folder, *settings, create_progress("tokens"))
    write_harness(out, results, to_dict(config))
    for task, figures in results["results"].items():
        for name, value in figures.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = figures.get(name.replace(",", "_stderr,", 1))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                print(f"{task}  {name.removesuffix(',none')}  {value:.4f}{spread}")
    print(out)


def judge(argv: list[str]) -> None:
    """Have an LLM score a model's answers: Ollama's, any with OpenAI's interface, or a model here."""
    from gpt.evaluate.judge import JudgeConfig, run

    run(parse_config(JudgeConfig, _named(argv, "responses"), prog="twingrad evaluate judge"))


def compare(argv: list[str]) -> None:
    """Have an LLM say which of two models' answers is better: wins, ties, losses."""
    from gpt.evaluate.win_rate import WinRateConfig, run

    run(parse_config(WinRateConfig, argv, prog="twingrad evaluate compare"))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "list": list_,
    "choices": choices,
    "perplexity": perplexity,
    "harness": harness,
    "judge": judge,
    "compare": compare,
}


def main(argv: list[str]) -> int:
    """Run one of the commands, or `choices` of the model that is named instead of one."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS and _is_model(argv[0]):
        argv = ["choices", *argv]
    return run_command("twingrad evaluate", COMMANDS, argv)


def _is_model(name: str) -> bool:
    """Whether this is rather a model than a command's name that is misspelt."""
    return Path(name).exists() or not did_you_mean(name, COMMANDS)


def _named(argv: list[str], option: str) -> list[str]:
    """Arguments that may begin with the value of an option without its name."""
    if argv and not argv[0].startswith("-"):
        return [f"--{option}", *argv]
    return argv


def _folder(name: str) -> Path:
    """A folder, in TWINGRAD_DATA if it is not in the current folder."""
    own = os.environ.get("TWINGRAD_DATA")
    if own and not Path(name).exists() and (Path(own) / name).is_dir():
        return Path(own) / name
    return Path(name)


def _at_least_one(name: str, value: Any) -> None:
    if value < 1:
        raise UserError(f"{name}: expected at least 1, got {value}")


def _percent(share: float, error: float | None) -> str:
    return f"{share:.1%}" + (f" ± {error:.1%}" if error is not None else "")
