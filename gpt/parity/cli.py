"""`twingrad check`: what it takes, what it prints, and the exit status."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from gpt.errors import UserError, require
from gpt.options import Parser

DESCRIPTION = """\
Hold every layer against central differences, against laws that it must obey and against PyTorch, and the NumPy and the
PyTorch model against each other, tensor by tensor and step by step. `kernels` asks for the kernels: on the GPU, or
where there is none in Triton's interpreter, which takes minutes. --kernel checks a function of your own. Exit status 1:
something is beyond its bound.
"""


def main(argv: list[str]) -> int:
    """Run the checks that `argv` asks for. Returns 1 if one failed."""
    arguments = _parser().parse_args(argv)
    report: Any
    # Read by NumPy when it is first imported: these small products gain nothing from threads that wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if arguments.op and not arguments.kernel:
        raise UserError(f"--op {arguments.op} says what --kernel computes; expected --kernel FILE.py:FUNCTION too")
    _check_lockstep(arguments)
    if arguments.kernel or "kernels" in arguments.ops:
        interpret_without_gpu()
    if arguments.kernel:
        from gpt.parity import check

        dtypes = arguments.dtype.split(",") if arguments.dtype else ["float32"]
        report = check.run_function(*_kernel(arguments), dtypes, _progress(arguments.json))
        text = check.render(report)
    elif arguments.defects:
        from gpt.parity import defects as checks

        report = checks.run(arguments.ops, progress=_progress(arguments.json))
        text = checks.render(report)
    else:
        from gpt.parity import check

        dtypes = arguments.dtype.split(",") if arguments.dtype else ["float64", "float32"]
        if wrong := set(dtypes) - {"float64", "float32"}:
            raise UserError(f"dtype: models train in float64 and float32, not in {', '.join(sorted(wrong))}")
        steps = 100 if arguments.steps is None else arguments.steps
        report = check.run(arguments.ops, steps, dtypes, _progress(arguments.json))
        text = check.render(report)
    _clear_progress(arguments.json)
    if arguments.json or not sys.stdout.isatty():
        print(report.to_json() if arguments.json else text)
    else:
        _print_in_colour(text)
    return 0 if report.passed else 1


def _parser() -> Parser:
    parser = Parser(prog="twingrad check", description=DESCRIPTION)
    parser.add_argument("ops", metavar="OP", nargs="*", help="operators, layers, model, kernels [everything]")
    parser.add_argument("--steps", type=_steps, help="training steps of the models in lockstep [100]")
    parser.add_argument(
        "--dtype", type=_dtypes, metavar="TYPE,...", help="of models in lockstep, or of a kernel's tensors"
    )
    parser.add_argument(
        "--kernel", metavar="FILE.py:FUNCTION", help="check this function, of tensors, as operator --op"
    )
    parser.add_argument("--op", metavar="OP", help="the operator or layer that --kernel computes")
    parser.add_argument("--defects", action="store_true", help="seed known mistakes, one at a time: is each caught?")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    return parser


def _dtypes(text: str) -> str:
    known = ("float64", "float32", "float16", "bfloat16")
    if wrong := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"invalid choice: {wrong[0]!r} (choose from {', '.join(known)})")
    return text


def _kernel(arguments: argparse.Namespace) -> tuple[str, str]:
    if not arguments.op or arguments.ops or arguments.defects:
        raise UserError("--kernel FILE.py:FUNCTION wants --op OP, and no other operators")
    return arguments.kernel, arguments.op


def _check_lockstep(arguments: argparse.Namespace) -> None:
    """UserError for what is said of models in lockstep where none are trained."""
    ops = arguments.ops
    trains = not (arguments.kernel or arguments.defects or "kernels" in ops) and ("model" in ops or not ops)
    for name in ("steps",) if arguments.kernel else ("steps", "dtype"):
        if getattr(arguments, name) is not None and not trains:
            raise UserError(f"--{name}: of models in lockstep, and none are asked for: expected the operator model")


def interpret_without_gpu() -> None:
    """Have Triton interpret kernels where there is no GPU to run them. It asks when it is first imported."""
    if not require("torch", extra="torch").cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _steps(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _progress(quiet: bool) -> Any:
    """Says on a terminal what is being checked, in a line that is written over."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[Kchecking {what}", end="", file=sys.stderr, flush=True)


def _clear_progress(quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _print_in_colour(text: str) -> None:
    """What went wrong in red, what was caught in green."""
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"(?m)^(operator|model ) .*$", "bold")
    styled.highlight_regex(r"FAIL(ED)?|MISSED", "bold red")
    styled.highlight_regex(r"caught:", "green")
    Console(highlight=False).print(styled, soft_wrap=True)
