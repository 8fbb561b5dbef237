"""python -m bench COMMAND: measure, compare what was measured, write the page of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import results
from gpt.data.files import check_can_write
from gpt.errors import INTERRUPTED, UserError, require
from gpt.parity.cli import interpret_without_gpu


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; its exit status, or 2 for a mistake in the arguments."""
    arguments = _parser().parse_args(argv)
    try:
        if getattr(arguments, "out", None) is not None:
            check_can_write(arguments.out)  # before it is measured, not after
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("cpu", help="training and generating, our engines and their peers, in turns")
    steps.add_argument("cases", nargs="*", metavar="CASE", help="all unless named")
    grows = commands.add_parser("sweep", help="training steps as the work grows, with fitted exponents")
    grows.add_argument(
        "axes", nargs="*", metavar="AXIS", help="tokens, width, depth, length, parameters; all unless named"
    )
    for command in (steps, grows):
        command.add_argument("--sessions", type=int, help="fresh processes of each contestant (default: 5; sweep: 3)")
        command.add_argument("--rounds", type=int, help="timed steps of each in a session (default: by the case)")
    where = commands.add_parser("breakdown", help="where a NumPy training step's time goes, layer by layer")
    where.add_argument("--steps", type=int, help="that are timed of each size (5)")
    learns = commands.add_parser("quality", help="one model trained to a fixed loss on every engine: do they coincide?")
    learns.add_argument("cases", nargs="*", metavar="CASE", help="small, tiny; both unless named")
    each = commands.add_parser("layers", help="every layer, forward and backward, of both engines (pytest-benchmark)")
    product = commands.add_parser("matmul", help="one matrix product on the CPU, and on a GPU where there is one")
    encoding = commands.add_parser("data", help="preparing token files by several processes, against tiktoken alone")
    encoding.add_argument("--megabytes", type=float, help="of text (64)")
    encoding.add_argument("--rounds", type=int, help="of each (5)")
    shared = commands.add_parser("distributed", help="training steps shared by processes, against one with all threads")
    shared.add_argument(
        "cases", nargs="*", metavar="CASE", help="bytes-small, gpt2-small, gpt2-small-1024; all unless named"
    )
    shared.add_argument("--processes", type=int, default=2, help="that share a step, and threads of the one (2)")
    shared.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how they share it (ddp)")
    shared.add_argument("--rounds", type=int, help="timed turns of each (default: by the case)")
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
    for command in (steps, grows, where, learns, each, product, encoding, shared, compiled, on_gpu):
        command.add_argument("--out", type=Path, help="also write the results to this JSON file")
    against = commands.add_parser("compare", help="which differences between two results exceed the noise")
    against.add_argument("before", type=Path, metavar="A.json")
    against.add_argument("after", type=Path, metavar="B.json")
    against.add_argument("--least", type=float, default=3.0, help="percent; smaller differences are not called (3)")
    against.add_argument(
        "--times", action="store_true", help="compare times alone, not in units of a peer's of that run"
    )
    against.add_argument("--anyway", action="store_true", help="also results of other machines or versions")
    against.add_argument(
        "--check", action="store_true", help="exit with 1 where something of ours is slower beyond noise"
    )
    against.add_argument("--json", action="store_true", help="print the comparison as JSON")
    page = commands.add_parser("report", help="bench/RESULTS.md, its plots and the README's figures, from results kept")
    page.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="the folder of results (bench/results), beside which the page goes: of results-xeon, RESULTS-XEON.md",
    )
    page.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    return parser


# Each imports what it needs, and the report and comparisons no torch.


def _cpu(arguments: argparse.Namespace) -> int:
    from bench import cpu

    return cpu.main(arguments.cases, arguments.sessions, arguments.rounds, arguments.out)


def _sweep(arguments: argparse.Namespace) -> int:
    from bench import sweep

    return sweep.main(arguments.axes, arguments.sessions, arguments.rounds, arguments.out)


def _breakdown(arguments: argparse.Namespace) -> int:
    from bench import breakdown

    return breakdown.main(arguments.steps, arguments.out)


def _quality(arguments: argparse.Namespace) -> int:
    from bench import quality

    return quality.main(arguments.cases, arguments.out)


def _layers(arguments: argparse.Namespace) -> int:
    from bench import layers

    return layers.main(arguments.out)


def _matmul(arguments: argparse.Namespace) -> int:
    from bench import matmul

    return matmul.main(arguments.out)


def _data(arguments: argparse.Namespace) -> int:
    from bench import data

    return data.main(arguments.megabytes, arguments.rounds, arguments.out)


def _distributed(arguments: argparse.Namespace) -> int:
    from bench import distributed

    given = (getattr(arguments, name) for name in ("cases", "processes", "parallel", "rounds", "out"))
    return distributed.main(*given)


def _static(arguments: argparse.Namespace) -> int:
    from bench import static

    return static.main(arguments.layers, arguments.arch or (), arguments.out, arguments.against)


def _gpu(arguments: argparse.Namespace) -> int:
    if arguments.tiny:
        interpret_without_gpu()
    require("triton", extra="torch")
    from bench import gpu

    given = {name: getattr(arguments, name) for name in ("minutes", "check", "tiny", "kernel", "out")}
    layers = dict.fromkeys([*arguments.layers, *filter(None, [arguments.op])])
    return gpu.main(gpu.Options(tuple(layers), **given))


def _compare(arguments: argparse.Namespace) -> int:
    from bench import compare

    given = {name: getattr(arguments, name) for name in ("least", "times", "anyway", "check", "json")}
    return compare.main(arguments.before, arguments.after, compare.Options(**given))


def _report(arguments: argparse.Namespace) -> int:
    from bench import page

    return page.main(arguments.results, arguments.check)


COMMANDS = {
    "cpu": _cpu,
    "sweep": _sweep,
    "breakdown": _breakdown,
    "quality": _quality,
    "layers": _layers,
    "matmul": _matmul,
    "data": _data,
    "distributed": _distributed,
    "static": _static,
    "gpu": _gpu,
    "compare": _compare,
    "report": _report,
}


if __name__ == "__main__":
    raise SystemExit(main())
