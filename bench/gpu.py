"""python -m bench gpu: are the kernels right on this GPU, and how far are they from its limits and from their peers?

First the checks, then the machine's ceilings, then every operator forward and backward against its peers, taken in
turns in one run, then training steps of a whole model. Times are medians with quartiles, caches flushed between calls.
A rate counts the operations that the mathematics asks for (half of the scores where attention is causal) or the fewest
bytes that can go to and from memory. The command looks at its clock, and leaves out the rest rather than overrun.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import peers, plots, results, roofline
from gpt.errors import UserError
from gpt.parity.ops import ROWS, select
from gpt.parity.subjects import as_tuple

VOCABULARY = 50_257


@dataclass(frozen=True)
class Normal:
    """Stands for a tensor of normal numbers."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ids:
    """Stands for n integers from 0 to below."""

    n: int
    below: int


@dataclass(frozen=True)
class Case:
    """One operator at one size, in one direction."""

    operator: str
    direction: str  # forward, backward, or both
    arguments: tuple[Any, ...]  # in order; Normal and Ids stand for tensors
    dtype: str = "bfloat16"
    setting: str = ""
    x: int = 0  # what varies, for plots: a sequence's length, a row's width
    x_name: str = ""
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.flops else "GB/s"

    def rate(self, seconds: float) -> float:
        return self.flops / seconds / 1e12 if self.flops else self.bytes / seconds / 1e9

    def __str__(self) -> str:
        return " ".join(filter(None, (self.operator, self.setting, self.direction, self.dtype, str(self.x or ""))))


@dataclass(frozen=True)
class Measurement:
    """What one peer took for one case."""

    operator: str
    direction: str
    dtype: str
    setting: str
    x: int
    x_name: str
    peer: str
    seconds: float
    quartiles: tuple[float, float]
    rate: float
    unit: str
    of_ceiling: float
    peak_bytes: int = 0


@dataclass
class Run:
    """A benchmark under way: where, until when, and what it found."""

    device: str
    tiny: bool
    deadline: float
    measurements: list[Measurement] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the clock stops the rest."""
        return self.deadline - time.monotonic()


# What is timed.


def cases(tiny: bool) -> Iterator[Case]:
    """All cases, the most important first."""
    for direction in ("forward", "backward"):
        for causal in (True, False):
            for D in (64,) if tiny else (64, 128):
                for T in (16, 32) if tiny else (512, 1024, 2048, 4096, 8192, 16_384):
                    yield attention(64 if tiny else 16_384, 128 if tiny else 2048, T, D, causal, direction)
    widths = (64, 128) if tiny else (2048, 4096, 16_384, 1024, 8192)
    for layer, settings in ELEMENTWISE.items():
        for setting, more in settings.items():
            for dtype in ("bfloat16", "float32") if layer == "layer_norm" else ("bfloat16",):
                for direction in ("forward", "backward"):
                    for width in widths:
                        yield elementwise(layer, setting, more, 2**10 if tiny else 2**26, width, dtype, direction)
    N, V, C = (16, 300, 32) if tiny else (8192, VOCABULARY, 768)
    logits = N * V * 2
    size = f"{N} x {V}"
    yield Case("cross_entropy", "both", (Normal((N, V)), Ids(N, V)), setting=size, bytes=3 * logits)
    both = (Normal((N, C)), Normal((V, C)), None, Ids(N, V))
    yield Case("linear_cross_entropy", "both", both, setting=f"{N} x {C} x {V}", flops=6.0 * N * V * C)


def attention(tokens: int, width: int, T: int, D: int, causal: bool, direction: str) -> Case:
    """So many tokens in sequences of T, `width` entries of all heads together. Backward: 5 products for forward's 2."""
    B, H = max(1, tokens // T), width // D
    flops = 4 * B * H * T * T * D * (0.5 if causal else 1) * (2.5 if direction == "backward" else 1)
    qkv = (Normal((B, H, T, D)),) * 3
    setting = f"D {D} {'causal' if causal else 'full'}"
    return Case("attention", direction, (*qkv, causal), setting=setting, x=T, x_name="sequence length", flops=flops)


# Layer -> setting -> what follows x among the arguments; then tensors like x that each direction reads and writes.
ELEMENTWISE: dict[str, dict[str, tuple[Any, ...]]] = {
    "layer_norm": {"": ("weight", "weight", 1e-5)},
    "add_layer_norm": {"": ("x", "weight", "weight", 1e-5)},
    "gelu": {"exact": ("none",), "tanh": ("tanh",)},
    "bias_gelu": {"tanh": ("weight", "tanh")},
    "dropout": {"": (0.1, (1234, 0))},
}
TENSORS = {
    "layer_norm": (2, 3),
    "add_layer_norm": (4, 4),
    "gelu": (2, 3),
    "bias_gelu": (2, 3),
    "dropout": (2, 2),
}


def elementwise(
    layer: str, setting: str, more: tuple[Any, ...], elements: int, width: int, dtype: str, direction: str
) -> Case:
    """So many elements in rows of `width`."""
    x = Normal((elements // width, width))
    arguments = tuple(
        {"x": x, "weight": Normal((width,))}.get(each, each) if isinstance(each, str) else each for each in more
    )
    tensors = TENSORS[layer][direction == "backward"]
    size = tensors * elements * (4 if dtype == "float32" else 2)
    return Case(layer, direction, (x, *arguments), dtype, setting, width, "width of a row", bytes=size)


def build(case: Case, device: str) -> tuple[list[Any], list[torch.Tensor]]:
    """The arguments of a case, and those of them that get gradients."""
    generator = torch.Generator(device).manual_seed(0)
    arguments: list[Any] = []
    for given in case.arguments:
        if isinstance(given, Ids):
            arguments.append(torch.randint(0, given.below, (given.n,), device=device, generator=generator))
        elif isinstance(given, Normal):
            tensor = torch.randn(given.shape, device=device, generator=generator)
            arguments.append(tensor.to(getattr(torch, case.dtype)).requires_grad_())
        else:
            arguments.append(given)
    return arguments, [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def prepare(case: Case, function: Callable[..., Any], device: str) -> Callable[[], Any]:
    """What is called again and again; made once, so that a peer that cannot run raises here."""
    arguments, inputs = build(case, device)
    if case.direction == "forward":
        with torch.no_grad():
            function(*arguments)
        return torch.no_grad()(lambda: function(*arguments))
    results = as_tuple(function(*arguments))
    dy = [torch.randn_like(result) if result.ndim else torch.ones_like(result) for result in results]

    def backward() -> Any:
        return torch.autograd.grad(results, inputs, dy, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(as_tuple(function(*arguments)), inputs, dy)

    call = backward if case.direction == "backward" else both
    call()
    return call


# How it is timed.


def times(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Call functions in turns for about so many seconds altogether; what each call took."""
    cuda = device == "cuda"
    cache = torch.empty(2**28 if cuda else 1, dtype=torch.uint8, device=device)  # several times any L2

    def one(function: Callable[[], Any]) -> Any:
        cache.zero_()
        if not cuda:
            begun = time.perf_counter()
            function()
            return time.perf_counter() - begun
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        return first, last

    def value(taken: Any) -> float:
        return taken if not cuda else taken[0].elapsed_time(taken[1]) / 1e3

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for function in functions.values():
        for _ in range(3 if cuda else 1):
            one(function)
    wait()
    begun = time.perf_counter()
    for function in functions.values():
        one(function)
    wait()
    rounds = min(200, max(5 if cuda else 2, int(seconds / (time.perf_counter() - begun))))
    taken: dict[str, list[Any]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(one(function))
    wait()
    return {name: [value(each) for each in list_] for name, list_ in taken.items()}


def measure(run: Run, case: Case, kernel: Callable[..., Any] | None = None) -> None:
    """One case with all its peers."""
    ready: dict[str, Callable[[], Any]] = {}
    for name, function in peers.peers(case.operator, kernel).items():
        try:
            ready[name] = prepare(case, function, run.device)
        except Exception as error:  # of whatever kind: it is the peer's answer
            first = (str(error).splitlines() or [""])[0]
            run.left_out[f"{name}, {case.operator} {case.setting} {case.direction}"] = (
                f"{type(error).__name__}: {first}"[:160]
            )
    peaks = {name: peak(function) if case.operator == "linear_cross_entropy" else 0 for name, function in ready.items()}
    ceiling = run.ceilings["bfloat16_tflop_per_s" if case.flops else "copy_gb_per_s"]
    for name, taken in times(ready, run.device, 0.02 if run.tiny else 0.4).items():
        middle = median(taken)
        low, _, high = quantiles(taken, n=4)
        run.measurements.append(
            Measurement(
                *(
                    case.operator,
                    case.direction,
                    case.dtype,
                    case.setting,
                    case.x,
                    case.x_name,
                    name,
                    middle,
                    (low, high),
                ),
                *(case.rate(middle), case.unit, case.rate(middle) / ceiling, peaks[name]),
            )
        )


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call takes beyond what was there, at most; 0 where there is no GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def measure_models(run: Run) -> None:
    """Training steps of GPT-2 124M under bfloat16 autocast, float32 weights, on both sets of operators, in turns."""
    from gpt.model import GPT
    from gpt.ops import choose
    from reference import PRESETS

    config = PRESETS["bytes-tiny" if run.tiny else "gpt2-small"]
    config = config.replace(emb_dropout=0.0, shortcut_dropout=0.0, attn_dropout=0.0)
    B, T = (2, 16) if run.tiny else (8, 1024)
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=run.device)
    for mode in ("eager",) if run.tiny else ("eager", "compiled"):
        steps, memory = {}, {}
        for name in ("triton", "torch"):
            if run.left < 45:
                run.left_out[f"model, {name}, {mode}"] = "no time left"
                continue
            try:
                steps[name] = _training_step(GPT(config, choose(name, run.device)).to(run.device), tokens, mode)
                memory[name] = peak(steps[name])
            except Exception as error:
                run.left_out[f"model, {name}, {mode}"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        for name, taken in times(steps, run.device, 0.1 if run.tiny else 10).items():
            low, middle, high = quantiles(taken, n=4)
            run.models.append(
                {
                    "model": f"GPT {config.n_parameters / 1e6:.3g}M",
                    "operators": name,
                    "mode": mode,
                    "batch": B,
                    "length": T,
                    "seconds": middle,
                    "quartiles": (low, high),
                    "tokens_per_s": B * T / middle,
                    "peak_bytes": memory[name],
                }
            )


def _training_step(model: Any, tokens: torch.Tensor, mode: str) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tokens.is_cuda)
    loss_of = torch.compile(model.loss) if mode == "compiled" else model.loss
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


# Correctness, before any time is taken.


def check(run: Run, names: Sequence[str]) -> bool:
    """All gates of the kernels on this device, a process for each operator, as many at once as there are cores."""
    rows = [row.name for row in ROWS.values() if row.has_twin("kernels") and (not names or row.layer in names)]
    jobs = [["check", "kernels", name] for name in rows] + ([] if names else [["check", "kernels", "model"]])

    def one(job: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gpt", *job]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(one, jobs))
    for finished in done:
        print("\n".join(line for line in finished.stdout.splitlines() if line.startswith(("triton", "FAILED"))))
        print(finished.stderr, end="")
    return all(finished.returncode == 0 for finished in done)


def sanitize(run: Run) -> bool:
    """Every operator once, forward and backward, under compute-sanitizer."""
    if run.device != "cuda" or not shutil.which("compute-sanitizer"):
        run.left_out["racecheck, memcheck"] = "compute-sanitizer is not on the PATH"
        return True
    good = True
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        except subprocess.TimeoutExpired:
            run.left_out[tool] = "took more than 90 s"
            continue
        if done.returncode == 9:
            print("\n".join(done.stdout.splitlines()[-20:]))
            good = False
        elif done.returncode:
            run.left_out[tool] = f"compute-sanitizer ended with status {done.returncode}"
    return good


def run_each_once(device: str = "cuda") -> None:
    """What runs under the sanitizer: small cases of every operator."""
    for case in cases(tiny=True):
        if case.direction != "forward":
            prepare(case, peers.peers(case.operator)[peers.OURS], device)


# What is said about it.

# operator, setting, direction, which measure, against whom, at least
TARGETS: tuple[tuple[str, str, str, str, str, float], ...] = (
    ("attention", "D 64 causal", "forward", "speed", "flash", 1.2),
    ("attention", "D 64 causal", "forward", "speed", "cudnn", 0.9),
    ("attention", "D 64 causal", "backward", "speed", "flash", 1.0),
    ("attention", "D 128 causal", "backward", "speed", "flash", 0.9),
    ("layer_norm", "", "forward", "ceiling", "", 0.85),
    ("layer_norm", "", "backward", "ceiling", "", 0.85),
    ("layer_norm", "", "backward", "speed", "liger", 1.3),
    ("gelu", "tanh", "forward", "ceiling", "", 0.9),
    ("gelu", "tanh", "backward", "ceiling", "", 0.9),
    ("linear_cross_entropy", "8192 x 768 x 50257", "both", "speed", "torch", 1.0),
    ("linear_cross_entropy", "8192 x 768 x 50257", "both", "memory", "torch", 4.0),
)


def judged(run: Run) -> Iterator[tuple[str, float, float]]:
    """Each target, what was measured for it, the worst of all sizes that it speaks of, and what was wanted."""
    for operator, setting, direction, measure_, peer, wanted in TARGETS:
        here = [m for m in run.measurements if (m.operator, m.setting, m.direction) == (operator, setting, direction)]
        here = [m for m in here if m.dtype == "bfloat16" and (m.x >= 2048 or not m.x or operator == "attention")]
        found = []
        for ours in (m for m in here if m.peer == peers.OURS):
            theirs = next((m for m in here if m.peer == peer and m.x == ours.x), None)
            if measure_ == "ceiling":
                found.append(ours.of_ceiling)
            elif theirs and measure_ == "speed":
                found.append(theirs.seconds / ours.seconds)
            elif theirs and ours.peak_bytes:
                found.append(theirs.peak_bytes / ours.peak_bytes)
        if found:
            what = " ".join(filter(None, (operator, setting, direction, measure_, peer and f"of {peer}'s")))
            yield what, min(found), wanted
    compiled = {m["operators"]: m["tokens_per_s"] for m in run.models if m["mode"] == "compiled"}
    if len(compiled) == 2:
        yield "training, compiled, speed of torch's", compiled["triton"] / compiled["torch"], 1.15


def show(run: Run) -> None:
    """Tables of operators, models and targets."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("operator", "size", "peer", "ms", "quartiles", "rate", "of ceiling", "ours is", "peak MiB", box=None)
    for m in run.measurements:
        ours = next((o for o in run.measurements if o.peer == peers.OURS and _same(o, m)), m)
        size = " ".join(filter(None, (m.setting, str(m.x or ""), m.dtype)))
        quartiles = " to ".join(f"{1e3 * q:.3f}" for q in m.quartiles)
        ratio = "" if m.peer == peers.OURS else f"{m.seconds / ours.seconds:.2f}x as fast"
        cells = (m.peer, f"{1e3 * m.seconds:.3f}", quartiles, f"{m.rate:.0f} {m.unit}", f"{m.of_ceiling:.0%}", ratio)
        table.add_row(
            f"{m.operator} {m.direction}", size, *cells, f"{m.peak_bytes / 2**20:.0f}" if m.peak_bytes else ""
        )
    console.print(table)
    if run.models:
        table = Table("model", "operators", "mode", "tokens/s", "step ms", "peak MiB", box=None)
        for m in run.models:
            cells = (f"{m['tokens_per_s']:,.0f}", f"{1e3 * m['seconds']:.1f}", f"{m['peak_bytes'] / 2**20:.0f}")
            table.add_row(m["model"], m["operators"], m["mode"], *cells)
        console.print(table)
    if not run.tiny:
        for what, found, wanted in judged(run):
            print(f"{'met' if found >= wanted else 'NOT MET'}  {what}: {found:.2f}, wanted {wanted:.2f}")
    for name, ceiling in run.ceilings.items():
        print(f"ceiling  {name} {ceiling:.4g}")
    for what, why in run.left_out.items():
        print(f"left out  {what}: {why}")


def _same(a: Measurement, b: Measurement) -> bool:
    return all(getattr(a, f) == getattr(b, f) for f in ("operator", "direction", "dtype", "setting", "x"))


# The command.


@dataclass(frozen=True)
class Options:
    layers: tuple[str, ...] = ()
    minutes: float = 8.0
    check: bool = True
    tiny: bool = False
    kernel: str | None = None
    out: Path | None = None


def main(options: Options) -> int:
    """Check, measure, print, write JSON and plots. 1 where a check fails; UserError without a GPU."""
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        raise UserError("bench gpu: no CUDA GPU is here; --tiny tries the benchmark itself, interpreted, on the CPU")
    for name in options.layers:
        select([name])
    kernel = None
    if options.kernel:
        if len(options.layers) != 1:
            raise UserError("--kernel FILE.py:FUNCTION wants the one operator that it computes")
        from gpt.parity.subjects import function

        kernel = function(options.kernel, ("float32",)).function
    device = "cuda" if cuda else "cpu"
    run = Run(device, options.tiny, time.monotonic() + 60 * options.minutes)
    if options.check and not (check(run, options.layers) and sanitize(run)):
        print("the checks failed: nothing was timed", file=sys.stderr)
        return 1
    run.ceilings = roofline.ceilings(device, lambda f: median(times({"": f}, device, 0.5)[""]), options.tiny)
    chosen = [case for case in cases(options.tiny) if not options.layers or case.operator in options.layers]
    reserved = 0 if options.layers else 120  # for the models
    for i, case in enumerate(chosen):
        if run.left < reserved:
            run.left_out[f"{len(chosen) - i} cases from {case} on"] = "no time left"
            break
        if sys.stderr.isatty():
            print(f"\r\033[K{i + 1} of {len(chosen)}: {case}, {run.left:.0f} s left", end="", file=sys.stderr)
        measure(run, case, kernel)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if not options.layers:
        measure_models(run)
    show(run)
    write(run, options)
    return 0


def write(run: Run, options: Options) -> None:
    """The JSON and its plots beside it: where asked for, or for a whole run on a GPU in bench/results."""
    name = torch.cuda.get_device_name() if run.device == "cuda" else "cpu, interpreted"
    stem = "gpu-" + "-".join(name.lower().replace(",", "").split())
    whole = run.device == "cuda" and not options.tiny and not options.layers
    path = options.out or (Path(__file__).parent / "results" / f"{stem}.json" if whole else None)
    if path is None:
        return
    document = {
        "device": name,
        "ceilings": run.ceilings,
        "measurements": [asdict(m) for m in run.measurements],
        "models": run.models,
        "left_out": run.left_out,
    }
    results.write(path, "gpu", document)
    for plot in plots.draw(json.loads(json.dumps(document)), path.parent, path.stem):
        print(f"wrote {plot}")


if __name__ == "__main__":
    run_each_once()
