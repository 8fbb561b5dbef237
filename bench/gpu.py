"""python -m bench gpu: are the kernels right on this GPU, and how far are they from its limits and from their peers?

First the checks, then the machine's ceilings, then every operator forward and backward against its peers, taken in
turns in one run, and training steps of a whole model. The command keeps an eye on its clock: what the targets speak of
comes first, and the rest is left out, with a line that says so, rather than overrun.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch._functorch.config

from bench import checks, clock, peers, plots, report, results, roofline
from bench.cases import Case, build, cases
from bench.report import Findings, Measurement
from gpt.errors import UserError
from gpt.parity.subjects import as_tuple, function, on_gpu

AGREEMENT = 0.1  # ||a - b|| / ||b||: far more than rounding to 16 bits, far less than another function
FOR_CHECKS = 0.45  # of the time, at most
MOST_MINUTES = 1440
FOR_MODELS = 100  # seconds that are kept for them
SPARE = 20  # seconds: one more case, the tables and the plots


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    layers: tuple[str, ...] = ()
    minutes: float = 8.0
    check: bool = True
    tiny: bool = False
    kernel: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Run:
    """A benchmark under way: where, how, until when."""

    device: str
    tiny: bool
    begun: float
    minutes: float
    findings: Findings
    kernel: Callable[..., Any] | None = None

    @property
    def left(self) -> float:
        """Seconds until the clock stops the rest."""
        return self.begun + 60 * self.minutes - time.monotonic()

    def say(self, what: str) -> None:
        """What comes next, on a terminal in a line that is written over."""
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{self.left:4.0f} s left: {what}"[:110], end=end, file=sys.stderr, flush=True)


def main(options: Options) -> int:
    """Check, measure, print, write JSON and plots. 1 where a check fails or measuring; UserError without a GPU."""
    run = begin(options)
    findings, everything = run.findings, not options.layers
    chosen = [case for case in cases(run.tiny) if everything or case.operator in options.layers]
    if options.check:
        run.say("checks, and compiling what will be timed")
        compiled = [*dict.fromkeys(case.operator for case in chosen), *["model"] * everything]
        right = checks.run(findings, options.layers, compiled, run.begun + FOR_CHECKS * 60 * run.minutes)
        if right or options.out:  # results of before, which are there by default, are better than these
            keep(run, options)
        if not right:
            print("error: a check failed, nothing was timed; --no-check times all the same", file=sys.stderr)
            return 1
    failed = False
    try:
        run.say("ceilings")
        findings.ceilings = roofline.ceilings(run.device, run.tiny)
        first = [case for case in chosen if any(target.covers(case) for target in report.TARGETS)]
        measure_all(run, first, FOR_MODELS if everything else SPARE)
        keep(run, options)
        if everything:
            measure_models(run)
            keep(run, options)
        measure_all(run, [case for case in chosen if case not in first], SPARE)
    except KeyboardInterrupt:
        findings.left_out["the rest"] = "interrupted"
    except Exception as error:  # what has been measured is kept
        traceback.print_exc()
        findings.left_out["the rest"] = f"{type(error).__name__}: {error}"[:240]
        failed = True
    print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)
    report.show(findings, targets=run.device == "cuda" and not run.tiny and everything)
    if path := keep(run, options):
        for file in (path, *plots.draw(json.loads(path.read_text())["cases"], path.parent, path.stem)):
            print(f"wrote         {file}")
    return int(failed)


def begin(options: Options) -> Run:
    """Refuse what cannot be done."""
    begun, cuda = time.monotonic(), on_gpu()
    # Triton's own default, said: from its first kernel on Inductor has another, without what others have compiled.
    folder = Path(os.environ.get("TRITON_HOME", Path.home()), ".triton", "cache")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    if not cuda and not options.tiny:
        why = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "no CUDA GPU is here"
        raise UserError(f"bench gpu: {why}; --tiny tries the benchmark itself, on the CPU, interpreted")
    if not 0 < options.minutes <= MOST_MINUTES:
        raise UserError(f"minutes: expected more than 0 and at most {MOST_MINUTES}, got {options.minutes}")
    known = {case.operator for case in cases(tiny=True)}
    for name in options.layers:
        if name not in known:
            raise UserError(f"{name}: no such layer; choose from {', '.join(sorted(known))}")
    if options.kernel and len(options.layers) != 1:
        raise UserError("--kernel FILE.py:FUNCTION wants the one operator that it computes, as in --op gelu")
    kernel = function(options.kernel, ("float32",)).function if options.kernel else None
    findings = Findings(torch.cuda.get_device_name() if cuda else "cpu, interpreted", left_out=peers.missing())
    return Run("cuda" if cuda else "cpu", options.tiny, begun, options.minutes, findings, kernel)


# Operators.


def measure_all(run: Run, chosen: Sequence[Case], reserve: float) -> None:
    """As many of these cases as time allows, `reserve` seconds kept."""
    for i, case in enumerate(chosen):
        if run.left < reserve and not run.tiny:
            run.findings.left_out[f"{len(chosen) - i} cases, from {case} on"] = "no time left"
            return
        run.say(str(case))
        with noting(run, str(case)):
            measure(run, case)


def measure(run: Run, case: Case) -> None:
    """One case with all its peers, those that compute what we compute."""
    calls: dict[tuple[str, str], clock.Call] = {}
    truth: list[torch.Tensor] = []
    for name, peer in peers.peers(case.operator, run.kernel).items():
        with noting(run, f"{name}, {case}"):
            ready, found = prepare(case, peer, run.device)
            if case.operator not in peers.OWN_BITS:
                agree(found, truth or found)
            truth = truth or found
            calls |= {(name, direction): call for direction, call in ready.items()}
    del truth
    peaks = {key: clock.peak(call) for key, call in calls.items() if key[1] == "both"}
    kind = roofline.UNITS[case.unit]
    for (name, direction), taken in clock.times(calls, run.device, 0.01 if run.tiny else 0.6).items():
        middle, (low, _, high) = median(taken), quantiles(taken, n=4, method="inclusive")
        rate = case.rate(direction, middle)
        run.findings.measurements.append(
            Measurement(
                operator=case.operator,
                direction=direction,
                dtype=case.dtype,
                setting=case.setting,
                x=case.x,
                x_name=case.x_name,
                peer=name,
                seconds=middle,
                quartiles=(low, high),
                calls=len(taken),
                rate=rate,
                unit=case.unit,
                of_ceiling=rate / run.findings.ceilings[kind],
                peak_bytes=peaks.get((name, direction), 0),
                sessions=clock.batches(taken),
            )
        )


# A graph that is gone through again and again must not give its buffers away.
@torch._functorch.config.patch(donated_buffer=False)
def prepare(case: Case, peer: peers.Function, device: str) -> tuple[dict[str, clock.Call], list[torch.Tensor]]:
    """What is called again and again, by direction; and results and gradients. A peer that cannot run raises here.

    The arguments and upstream gradients are the same for every peer, and its own: some write over them.
    """
    generator = torch.Generator(device).manual_seed(0)
    arguments = build(case, device, generator)
    outcome = as_tuple(peer(*arguments))
    if not all(result.requires_grad for result in outcome):
        if "forward" not in case.work:
            raise ValueError("its result cannot be differentiated")
        return {"forward": lambda: peer(*arguments)}, list(outcome)
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    dy = [_upstream(result, generator) for result in outcome]
    gradients = torch.autograd.grad(outcome, inputs, dy, retain_graph="backward" in case.work)
    calls = {
        "forward": lambda: peer(*arguments),
        "backward": lambda: torch.autograd.grad(outcome, inputs, dy, retain_graph=True),
        "both": lambda: torch.autograd.grad(as_tuple(peer(*arguments)), inputs, dy),
    }
    found = [*(result.detach() for result in outcome), *gradients]
    return {direction: calls[direction] for direction in case.work}, found


def _upstream(result: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random, whatever the layout; 1 for a loss."""
    if not result.ndim:
        return torch.ones_like(result)
    random = torch.randn(result.shape, device=result.device, generator=generator)
    return torch.empty_like(result).copy_(random)


def agree(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    """ValueError where results or gradients are not what they should be; their count may be less."""
    for i, (a, b) in enumerate(zip(found, truth, strict=False)):
        if a.shape != b.shape:
            raise ValueError(f"result or gradient {i} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        off = float(torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()))
        if not off <= AGREEMENT:
            raise ValueError(f"result or gradient {i} is off by {off:.2g}: it does not compute the same")


@contextlib.contextmanager
def noting(run: Run, what: str) -> Iterator[None]:
    """An error of whatever kind is an answer: it is noted why `what` was left out."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            # PyTorch says in warnings why no implementation of attention would do.
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
            more = [why for why in reasons if not why.endswith("because:") and "disabled" not in why]
            run.findings.left_out[what] = f"{type(error).__name__}: {' '.join([first, *more])}"[:240]


# A whole model.


def measure_models(run: Run) -> None:
    """Training steps of GPT-2 124M, bfloat16 autocast over float32 weights, on both sets of operators, in turns."""
    for mode, seconds in {"eager": 15, **({} if run.tiny else {"compiled": 45})}.items():
        steps: dict[str, clock.Call] = {}
        for operators in ("triton", "torch"):
            what = f"model, {operators}, {mode}"
            if run.left < seconds + SPARE and not run.tiny:
                run.findings.left_out[what] = "no time left"
                continue
            run.say(what)
            with noting(run, what):
                steps[operators], shape = training_step(operators, mode, run.device, run.tiny)
        with noting(run, f"model, {mode}"):
            memory = {operators: clock.peak(step) for operators, step in steps.items()}
            for operators, taken in clock.times(steps, run.device, 0.01 if run.tiny else 6).items() if steps else ():
                low, middle, high = quantiles(taken, n=4, method="inclusive")
                run.findings.models.append(
                    {
                        **shape,
                        "operators": operators,
                        "mode": mode,
                        "seconds": middle,
                        "quartiles": (low, high),
                        "calls": len(taken),
                        "tokens_per_s": shape["batch"] * shape["length"] / middle,
                        "peak_bytes": memory[operators],
                    }
                )


def training_step(operators: str, mode: str, device: str, tiny: bool) -> tuple[clock.Call, dict[str, Any]]:
    """One step, taken once already, and the sizes of model and batch."""
    from gpt.model import GPT
    from gpt.ops import choose
    from reference import PRESETS

    config = PRESETS["bytes-tiny" if tiny else "gpt2-small"]
    config = config.replace(emb_dropout=0.0, shortcut_dropout=0.0, attn_dropout=0.0)
    B, T = (2, 16) if tiny else (8, 1024)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config, choose(operators, device))
        tokens = torch.randint(0, config.vocab_size, (B, T + 1))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(model.loss) if mode == "compiled" else model.loss

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step, {"model": f"GPT {config.n_parameters / 1e6:.3g}M", "batch": B, "length": T}


# The end, and an errand.


def keep(run: Run, options: Options) -> Path | None:
    """Write what is known by now, as JSON: where asked for, or for a whole run on a GPU in bench/results.

    After each stage, as what comes next may hang, or be ended from outside.
    """
    stem = "gpu-" + "-".join(run.findings.device.lower().replace(",", "").split())
    whole = run.device == "cuda" and not options.tiny and not options.layers
    path = options.out or (Path(__file__).parent / "results" / f"{stem}.json" if whole else None)
    if path is None:
        return None
    document = {**run.findings.document(), "minutes": round((time.monotonic() - run.begun) / 60, 2)}
    results.write(path, "gpu", document)
    return path


def compile_ahead(name: str, tiny: bool = False) -> None:
    """Run each case of a layer once, or the compiled "model", for what that leaves in the compilers' caches on disk."""
    device = "cuda" if on_gpu() else "cpu"
    if name == "model":
        for operators in ("triton", "torch"):
            with contextlib.suppress(Exception):
                training_step(operators, "compiled", device, tiny)
        return
    for case in (case for case in cases(tiny) if case.operator == name):
        for peer in peers.peers(name).values():
            with contextlib.suppress(Exception):  # is met again, and told, when it is timed
                prepare(case, peer, device)


if __name__ == "__main__":
    compile_ahead(sys.argv[1])
