"""python -m bench cpu | layers: time the engines against each other on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import cpu, layers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("cpu", help="a training step of both engines, each in a process of its own, in turns")
    steps.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(cpu.CASES)}; all unless named")
    steps.add_argument("--rounds", type=int, default=0, help="timed steps of each engine (default: by the case)")
    steps.add_argument("--out", type=Path, help="also write the results to this JSON file")
    each = commands.add_parser("layers", help="every layer, forward and backward, of both engines (pytest-benchmark)")
    each.add_argument("--out", type=Path, help="also write both engines' results to this JSON file")
    arguments = parser.parse_args()
    if arguments.command == "layers":
        return layers.main(arguments.out)
    for case in arguments.cases:
        if case not in cpu.CASES:
            parser.error(f"{case!r} is not one of {', '.join(cpu.CASES)}")
    if arguments.rounds < 0:
        parser.error(f"--rounds: expected a number of at least 1, got {arguments.rounds}")
    return cpu.main(arguments.cases or list(cpu.CASES), arguments.rounds, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
