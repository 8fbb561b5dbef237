"""python -m bench cpu | layers | matmul: time the engines against each other on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import cpu, layers, matmul
from gpt.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; its exit status, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("cpu", help="a training step of both engines, each in a process of its own, in turns")
    steps.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(cpu.CASES)}; all unless named")
    steps.add_argument("--rounds", type=int, help="timed steps of each engine (default: by the case)")
    each = commands.add_parser("layers", help="every layer, forward and backward, of both engines (pytest-benchmark)")
    product = commands.add_parser("matmul", help="one matrix product on the CPU, and on a GPU where there is one")
    for command in (steps, each, product):
        command.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "layers":
            return layers.main(arguments.out)
        if arguments.command == "matmul":
            return matmul.main(arguments.out)
        return cpu.main(arguments.cases, arguments.rounds, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
