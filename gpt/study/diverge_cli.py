"""`twingrad diverge`: what it takes, what it prints, and the exit status."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.engine import Batch
from gpt.errors import UserError, require
from gpt.options import Parser, did_you_mean
from gpt.parity import check, model, subjects
from gpt.parity.cli import interpret_without_gpu
from gpt.study.bisect import Bisection, bisect
from gpt.study.diverge import Divergence, First, Side, check_same_config, cut, diverge
from gpt.study.diverge_page import check_out, write_page
from gpt.tokenizers import ByteTokenizer
from reference.config import GPTConfig

__all__ = ["main", "page_data", "render"]

DESCRIPTION = """\
Run two engines on the same model and batch, and name the first tensor, in the order of execution, on which they part:
forward, backward, then the parameters' gradients. With --other it is two checkpoints that are compared, with --kernel a
function of your own in the place of an operator of PyTorch's. Exit status 1: they part.
"""
ENGINES = ("numpy", "torch", "triton")
CONTEXT = 128  # bytes of --text that a small model reads
LEAST_TOKENS = 3  # of a text: with a single query and key, attention's gradients vanish
SHADES = " ░▒▓█"
UNSWAPPED = "what cannot be swapped is left: sums of branches, adapters, the gradients of shared weights"
NEAR = 3  # tensors shown before and after the first that differs
MOST_ROWS, MOST_COLUMNS = 24, 100  # of the map in a terminal


def main(argv: list[str]) -> int:
    """Compare what `argv` asks for. Returns 1 if the two part."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    out = check_out(arguments.out) if arguments.out is not None else None
    uses_torch = {arguments.a, arguments.b} != {"numpy"}
    if uses_torch:
        require("torch", extra="torch")
    if arguments.kernel or "triton" in (arguments.a, arguments.b):
        interpret_without_gpu()
        require("triton", extra="torch")
    dtype = arguments.dtype or ("float32" if arguments.kernel else "float64")
    device = _device(arguments, dtype) if uses_torch else "cpu"
    kernel = _kernel(arguments) if arguments.kernel else None
    sides, tokenizer = _sides(arguments, dtype, kernel)
    batch = _batch(arguments, sides[0].config, tokenizer)
    progress = _progress(arguments.json)
    # The pools of PyTorch's threads and of NumPy's wait for each other longer than a small model takes.
    with check.one_thread() if uses_torch and not arguments.model else nullcontext():
        found = diverge(sides, batch, dtype, model.noise(), device)
        if kernel and not kernel.used:
            raise UserError(f"op: this model computes no {kernel.op}; choose a --model or a --config that does")
        swaps = bisect(sides, batch, dtype, model.noise(), device, progress) if arguments.bisect else None
    progress("")
    notes = []
    if kernel and not kernel.differentiable:
        notes.append(f"what {kernel.name} returns cannot be differentiated: its gradient is PyTorch's own")
    shown = page_data(found, swaps)
    if arguments.json:
        print(json.dumps(shown, indent=1))
    else:
        print("\n\n".join([render(found, swaps), *notes]))
    if out is not None:
        if _unswapped(found, swaps):
            notes.append(UNSWAPPED)
        notes = [f"{note[0].upper()}{note[1:]}." for note in notes]
        write_page(out, shown, found.first, sides[0].config, _model(arguments), arguments.text, notes)
        if not arguments.json:
            print(f"\n{out}  {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0 if found.agree else 1


def page_data(found: Divergence, swaps: Bisection | None = None) -> dict[str, Any]:
    """All that there is to show, as JSON can hold it: `Divergence.to_dict`, and "bisection", which may be null."""
    return {**found.to_dict(), "bisection": swaps and swaps.to_dict()}


def _parser() -> Parser:
    parser = Parser(prog="twingrad diverge", description=DESCRIPTION)
    parser.add_argument("a", metavar="A", nargs="?", default="numpy", help="an engine: numpy, torch, triton [numpy]")
    parser.add_argument("b", metavar="B", nargs="?", default="torch", help="the other one [torch]")
    parser.add_argument("--model", metavar="PATH", help="a run's folder, a folder or file of weights, or a name")
    parser.add_argument("--other", metavar="PATH", help="the second side's model, where it is another one")
    parser.add_argument("--config", metavar="NAME", help=f"without --model: {', '.join(model.CONFIGS)} [tied]")
    parser.add_argument("--text", help="what the model reads, with its tokenizer; small models read bytes")
    parser.add_argument("--dtype", choices=("float64", "float32"), help="[float64; with --kernel float32]")
    parser.add_argument("--device", default="auto", help="PyTorch's [auto: a GPU if there is one]")
    parser.add_argument("--kernel", metavar="FILE.py:FUNCTION", help="a function of tensors in the place of --op")
    parser.add_argument("--op", metavar="OP", help="the operator that --kernel computes")
    parser.add_argument("--bisect", action="store_true", help="swap operators one at a time: which alone is enough?")
    parser.add_argument(
        "--out", metavar="PAGE.html", help="write a page that shows all of it, to be opened in a browser"
    )
    parser.add_argument("--json", action="store_true", help="print all that was measured as JSON")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be compared."""
    for engine in (arguments.a, arguments.b):
        if engine not in ENGINES:
            raise UserError(f"engine: {engine!r} is not one of {', '.join(ENGINES)}{did_you_mean(engine, ENGINES)}")
    if bool(arguments.kernel) != bool(arguments.op):
        raise UserError("--kernel FILE.py:FUNCTION and --op OP go together: one was given without the other")
    if arguments.kernel and arguments.other:
        raise UserError("--kernel compares engines on one model, --other two models: expected one of them, got both")
    if arguments.kernel and arguments.a == arguments.b == "numpy":
        raise UserError("--kernel runs in PyTorch's model: expected torch or triton as A or B, got numpy twice")
    if arguments.other and not arguments.model:
        raise UserError("--other PATH is compared with a --model PATH, and none was given")
    if arguments.bisect and arguments.other:
        raise UserError("--bisect swaps operators between two engines on one model, --other gives a second model")
    if arguments.model and arguments.config:
        raise UserError("--config names a small model of random weights, --model brings its own: expected one of them")
    if arguments.config and arguments.config not in model.CONFIGS:
        hint = did_you_mean(arguments.config, model.CONFIGS)
        raise UserError(f"config: {arguments.config!r} is not one of {', '.join(model.CONFIGS)}{hint}")
    if arguments.a == arguments.b and not (arguments.other or arguments.kernel):
        raise UserError(
            f"A and B: expected two engines, or a second model with --other, or a --kernel; got {arguments.a} twice"
        )


def _device(arguments: argparse.Namespace, dtype: str) -> str:
    device = arguments.device
    if device == "auto":
        device = "cuda" if subjects.on_gpu() else "cpu"
    if "triton" in (arguments.a, arguments.b) and dtype == "float64" and device != "cpu":
        raise UserError(
            "dtype: the kernels compute in float64 in Triton's interpreter alone; choose --dtype float32, or have them "
            "interpreted with TRITON_INTERPRET=1 in the environment"
        )
    return device


def _kernel(arguments: argparse.Namespace) -> Any:
    """The user's function as an operator of the model."""
    from gpt import twins

    if arguments.op not in twins.SWAPPABLE:
        hint = did_you_mean(arguments.op, twins.SWAPPABLE) or f"; choose from {', '.join(twins.SWAPPABLE)}"
        raise UserError(f"op: {arguments.op!r} is no operator of the model{hint}")
    subject = subjects.function(arguments.kernel, ("float32",))
    assert subject.function is not None
    return twins.Kernel(subject.name, subject.function, arguments.op)


def _sides(arguments: argparse.Namespace, dtype: str, kernel: Any) -> tuple[tuple[Side, Side], Any]:
    """Both sides, and the tokenizer of the model."""
    if arguments.model:
        config, params, tokenizer = _loaded(arguments.model, dtype)
    else:
        config, tokenizer = model.CONFIGS[arguments.config or _config_with(arguments.op)], ByteTokenizer()
        if arguments.text is not None:
            config = config.replace(vocab_size=tokenizer.n_vocab, context_length=CONTEXT)
        params = {name: value.astype(dtype) for name, value in model.parameters(config).items()}
    other_config, other = config, params
    label = [arguments.a, arguments.b]
    if arguments.other:
        other_config, other, _ = _loaded(arguments.other, dtype)
        label = [arguments.model, arguments.other]
        if arguments.a != arguments.b:
            label = [f"{arguments.a} {arguments.model}", f"{arguments.b} {arguments.other}"]
    kernels: list[dict[str, Any]] = [{}, {}]
    if kernel:
        side = 1 if arguments.b != "numpy" else 0
        kernels[side] = {kernel.op: kernel}
        label[side] += f" with {kernel.name}"
    a = Side(label[0], arguments.a, config, params, kernels[0])
    b = Side(label[1], arguments.b, other_config, other, kernels[1])
    check_same_config((a, b))
    return (a, b), tokenizer


def _config_with(op: str | None) -> str:
    """The small model that trains with this operator."""
    if op == "cross_entropy":
        return "adapted"  # elsewhere it is fused with the head
    return "llama" if op in ("rms_norm", "add_rms_norm", "rope", "swiglu") else "tied"


def _model(arguments: argparse.Namespace) -> str:
    """What both sides compute, in words."""
    if not arguments.model:
        return f"{arguments.config or _config_with(arguments.op)}, a small one with random weights"
    return f"{arguments.model} and {arguments.other}" if arguments.other else str(arguments.model)


def _loaded(path: str, dtype: str) -> tuple[GPTConfig, dict[str, np.ndarray], Any]:
    from gpt.weights.load import load

    saved = load(path)
    params = {name: np.asarray(value).astype(dtype) for name, value in saved.params.items()}
    return saved.config, params, saved.tokenizer


def _batch(arguments: argparse.Namespace, config: GPTConfig, tokenizer: Any) -> Batch:
    """The text, each token with the next one as its target; without a text tokens drawn by a rule."""
    if arguments.text is None:
        inputs, targets = model.batch(config)
        return Batch(inputs[:, : config.context_length], targets[:, : config.context_length])
    if tokenizer is None:
        raise UserError(f"text: {arguments.model} holds no tokenizer; without --text it reads drawn tokens")
    if isinstance(tokenizer, dict):
        tokenizer = tokenizers.from_spec(tokenizer)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(
            f"text: the tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, the model an embedding of "
            f"{config.vocab_size}"
        )
    ids = np.array(tokenizers.begun(tokenizer, tokenizers.encode_special(tokenizer, arguments.text)), np.int64)
    if not LEAST_TOKENS <= len(ids) <= config.context_length + 1:
        raise UserError(
            f"text: expected {LEAST_TOKENS} to {config.context_length + 1} tokens, what the model reads and one more "
            f"to predict, got {len(ids)}"
        )
    return Batch(ids[None, :-1], ids[None, 1:] % config.n_outputs)


def render(found: Divergence, swaps: Bisection | None = None) -> str:
    """What came out, as text."""
    a, b = found.sides
    rows, tokens = found.batch
    lines = [
        f"{a} and {b}, {found.dtype}, {rows} x {tokens} tokens",
        f"{len(found.pairs)} tensors in the order of execution, the truth is NumPy in float64"
        + ("" if found.one_model else f" with the parameters of {a}"),
        "",
    ]
    if found.first is None:
        nearest = max(found.pairs, key=lambda pair: pair.error)
        lines.append(f"they agree: the largest error is {_error(nearest.error, found)}, of {_named(nearest)},")
        lines.append(f"the bound is {_bound(found)}")
    else:
        lines += _first_lines(found, found.first)
    if swaps:
        lines += ["", *_bisection_lines(swaps)]
        if _unswapped(found, swaps):
            lines.append(UNSWAPPED)
    return "\n".join(lines)


def _unswapped(found: Divergence, swaps: Bisection | None) -> bool:
    """Whether the sides part and no swap does."""
    return swaps is not None and not (found.agree or swaps.culprits or swaps.together.parts)


def _first_lines(found: Divergence, first: First) -> list[str]:
    pair, labels = first.pair, [*found.sides, "truth"]
    beyond = sum(not other.passed for other in found.pairs)
    lines = [
        f"they part at {_named(pair)}, tensor {first.number + 1} of {len(found.pairs)}",
        f"error {_error(pair.error, found)}, the bound is {_bound(found)}; {beyond} beyond it"
        + (f"; {pair.note}" if pair.note else ""),
    ]
    if pair.kind == "step":
        lines.append("nothing before it does: it is in the loss that is fused with the head")
    for label, name in zip(found.sides, found.not_finite, strict=True):
        if name:
            lines.append(f"{label}: the first tensor that is not finite is {name}")
    lines.append("")
    near = found.pairs[max(0, first.number - NEAR) : first.number + NEAR + 1]
    lines.append("the error, and how far each side is from the truth:")
    table = [["", "tensor", "error", *found.sides]]
    for other in near:
        distances = (f"{value:.1e}" for value in other.from_truth)
        table.append(["  " if other.passed else "> ", _named(other), _error(other.error, found), *distances])
    lines.append(check.align(table))
    if not first.comparable:
        return lines
    lines += ["", f"worst element {list(first.index)} of {list(pair.shape)}"]
    digits = 17 if found.dtype == "float64" else 9
    lines.append(check.align([[f"  {label}", f"{x:.{digits}g}"] for label, x in zip(labels, first.at(), strict=True)]))
    farther = first.farther()
    if farther is not None and found.one_model:
        lines.append(f"{found.sides[farther]} is farther from the truth")
    if pair.shape:
        lines += ["", *_map_lines(first)]
    return lines


def _map_lines(first: First) -> list[str]:
    """The difference where the worst element is, in shades, each of which stands for four times the one before it."""
    whole = first.differences()
    shown = cut(whole, MOST_ROWS, min(MOST_COLUMNS, max(20, shutil.get_terminal_size().columns - 4)))
    largest, steps = float(np.max(shown, where=np.isfinite(shown), initial=0.0)), len(SHADES) - 1
    with np.errstate(all="ignore"):
        level = np.clip(steps - np.floor(np.log(largest / shown) / np.log(4)), 1, steps)
    level[~(shown > first.within())] = 0
    where = ", ".join([*map(str, first.index[:-2]), *(":" for _ in first.index[-2:])])
    size = " x ".join(map(str, whole.shape[2 - len(first.index[-2:]) :]))
    lines = [
        f"difference in [{where}], {size}: blank within the bound, █ to {largest:.1e}, shades fall by 4; ! not finite"
    ]
    for numbers, row in zip(shown, level, strict=True):
        cells = ("!" if np.isnan(x) else SHADES[round(n)] for x, n in zip(numbers, row, strict=True))
        lines.append("  |" + "".join(cells) + "|")
    return lines


def _bisection_lines(swaps: Bisection) -> list[str]:
    rows = [[f"{swaps.other}'s in {swaps.base}", "loss", "gradient", "worst", "verdict"]]
    for group, word in ((swaps.alone, ""), ([swaps.together], ""), (swaps.all_but_one, "all but ")):
        for swap in group:
            verdict = "parts" if swap.parts else "agrees"
            numbers = [f"{swap.loss:.1e}", f"{swap.gradient:.1e}"]
            rows.append([word + swap.operator, *numbers, swap.tensor, verdict])
    return [check.align(rows), "", swaps.verdict()]


def _named(pair: Any) -> str:
    if pair.kind == "parameter":
        return f"parameter {pair.name}"
    if pair.kind == "gradient":
        return f"gradient of {pair.name}"
    return "the loss of a step" if pair.kind == "step" else f"{pair.name} ({pair.kind})"


def _error(error: float, found: Divergence) -> str:
    return f"{error:.2g}" + ("x" if found.dtype == "float32" else "")


def _bound(found: Divergence) -> str:
    bound = found.pairs[0].bound
    return f"{bound:g}x" + " the other side's" if found.dtype == "float32" else f"{bound:g} of the largest entry"


def _progress(quiet: bool) -> Callable[[str], None]:
    """Says on a terminal what is being swapped, in a line that is written over; "" clears it."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print("\r\033[K" + (f"swapping {what}" if what else ""), end="", file=sys.stderr, flush=True)
