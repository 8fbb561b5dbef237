"""python -m bench cpu | layers | matmul | data | static | gpu: what this project computes, against its peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import cpu, data, layers, matmul, static
from gpt.errors import UserError, require
from gpt.parity.cli import interpret_without_gpu


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; its exit status, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser(
        "cpu", help="training and generating with both engines, each in a process of its own, in turns"
    )
    steps.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(cpu.NAMES)}; all unless named")
    steps.add_argument("--rounds", type=int, help="timed steps of each engine (default: by the case)")
    each = commands.add_parser("layers", help="every layer, forward and backward, of both engines (pytest-benchmark)")
    product = commands.add_parser("matmul", help="one matrix product on the CPU, and on a GPU where there is one")
    encoding = commands.add_parser("data", help="preparing token files by several processes, against tiktoken alone")
    encoding.add_argument("--megabytes", type=float, help=f"of text ({data.MEGABYTES})")
    encoding.add_argument("--rounds", type=int, help=f"of each ({data.ROUNDS})")
    compiled = commands.add_parser("static", help="compile every kernel without a GPU: registers, spills, instructions")
    compiled.add_argument("layers", nargs="*", metavar="LAYER", help="layers or operators; all unless named")
    compiled.add_argument("--arch", type=int, action="append", choices=(80, 90, 100), help="of sm_80, sm_90, sm_100")
    compiled.add_argument("--against", type=Path, help="also say what changed since this JSON file was written")
    on_gpu = commands.add_parser(
        "gpu", help="kernels on a GPU: checked, then timed against the machine's limits and peers"
    )
    on_gpu.add_argument(
        "layers", nargs="*", metavar="LAYER", help="layers to measure; all, and a whole model, unless named"
    )
    on_gpu.add_argument("--minutes", type=float, default=8.0, help="leave out what would take longer (8)")
    on_gpu.add_argument("--no-check", dest="check", action="store_false", help="time without checking first")
    on_gpu.add_argument("--tiny", action="store_true", help="sizes that try the benchmark itself, on any machine")
    on_gpu.add_argument("--kernel", metavar="FILE.py:FUNCTION", help="also time this function, as operator --op")
    on_gpu.add_argument("--op", metavar="LAYER", help="the layer that --kernel computes")
    for command in (steps, each, product, encoding, compiled, on_gpu):
        command.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "layers":
            return layers.main(arguments.out)
        if arguments.command == "gpu":
            if arguments.tiny:
                interpret_without_gpu()
            require("triton", extra="torch")
            from bench import gpu

            given = {name: getattr(arguments, name) for name in ("minutes", "check", "tiny", "kernel", "out")}
            return gpu.main(gpu.Options((*arguments.layers, *filter(None, [arguments.op])), **given))
        if arguments.command == "static":
            return static.main(arguments.layers, arguments.arch or (), arguments.out, arguments.against)
        if arguments.command == "data":
            return data.main(arguments.megabytes, arguments.rounds, arguments.out)
        if arguments.command == "matmul":
            return matmul.main(arguments.out)
        return cpu.main(arguments.cases, arguments.rounds, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
