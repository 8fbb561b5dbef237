"""`twingrad plan`: what training a model asks for, before anything is trained: memory, operations, time, what fits.

Memory is computed (gpt/plan.py), operations are counted (gpt/work.py), and time follows from what was measured: on this
machine within a second or two, or by a benchmark whose results are given. No rate is made up: without a measurement the
time is unknown.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from gpt import memory as host
from gpt import parts
from gpt.engine import trained_names
from gpt.errors import UserError, is_installed
from gpt.options import did_you_mean, read_json_object
from gpt.plan import KINDS, Setup, fitting, largest_batch, memory, size_text
from gpt.work import FLOAT, gradients, update
from reference.config import PRESETS, GPTConfig

__all__ = ["Ceilings", "PlanConfig", "plan", "read_ceilings", "report", "show"]


@dataclass
class PlanConfig:
    """Say what training a model asks for: memory on each device, operations, time at least, and what fits."""

    preset: str = "gpt2-small"
    """The model's architecture, a name in reference.config.PRESETS. It may stand first, without --preset."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of GPTConfig that differ from the preset."""
    tokens: str | None = None
    """Tokens to train on, such as 300M, 10B or 1e9; none: a step's time alone."""
    gpus: int = 0
    """GPUs that share each batch, a process each; 0: this machine's CPU."""
    processes: int = 1
    """Processes that share each batch, on a CPU."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """auto: PyTorch where it is installed or GPUs are asked for, else NumPy. triton: PyTorch on the kernels."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters, gradients and moments."""
    precision: Literal["full", "tf32", "bfloat16", "float16"] = "full"
    """What PyTorch computes in."""
    batch_size: int = 2
    """Examples in a micro-batch, of all processes together."""
    max_length: int | None = None
    """Tokens in an example; none: the model's context length."""
    accumulation: int = 1
    """Micro-batches to a step."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How processes share a model: ddp, each has the whole of it; fsdp, each a part."""
    checkpoint_activations: bool = False
    """Whether a block's activations are computed again in the backward pass instead of kept."""
    trained: tuple[str, ...] = ()
    """Patterns of the parameters that learn; none: all, or the adapters alone. May be given several times."""
    objective: Literal["cross_entropy", "dpo", "orpo"] = "cross_entropy"
    """What is learnt: the next token, or by the other two a preference, of examples that are pairs of answers."""
    memory: str | None = None
    """What each device has, such as 24GiB; none: what is free here."""
    ceilings: str | None = None
    """A result of `python -m bench` (cpu, sweep, gpu or matmul, by --out FILE), whose rates are taken."""
    measure: bool | None = None
    """Whether to measure this CPU's rates now, in a second or two; none: if the plan is for it and no file is given."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        for name, least in (("gpus", 0), ("processes", 1), ("batch_size", 1), ("accumulation", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.gpus and self.processes > 1:
            raise UserError(f"processes: each of the {self.gpus} GPUs has one; give gpus or processes, not both")
        if self.gpus and self.engine == "numpy":
            raise UserError("gpus: the numpy engine runs on the cpu; choose --engine torch")
        if self.measure and (self.gpus or self.ceilings):
            raise UserError("measure: this CPU's rates are measured, and the plan is for others; leave it out")


class Ceilings(NamedTuple):
    """What a device can do at most, and what a real step reached."""

    source: str  # in words
    operations_per_s: float | None  # of matrix products
    bytes_per_s: float | None  # of a copy, read and written
    reached: float | None = None  # operations a second of a whole training step, of the engine that is planned
    example: str = ""  # which step that was


def plan(config: PlanConfig) -> int:
    """Print the plan. Raises UserError for what cannot be."""
    found = report(config)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


def setup_of(config: PlanConfig) -> Setup:
    """What is to be trained. Raises UserError for a combination that no engine takes."""
    if config.preset not in PRESETS:
        names = ", ".join(PRESETS)
        raise UserError(f"preset: {config.preset!r} is not one of {names}{did_you_mean(config.preset, PRESETS)}")
    try:
        model = PRESETS[config.preset].replace(**config.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from None
    length = model.context_length if config.max_length is None else config.max_length
    if not 1 <= length <= model.context_length:
        raise UserError(f"max_length: expected 1 to the model's context_length {model.context_length}, got {length}")
    engine = config.engine
    if engine == "auto":
        engine = "torch" if config.gpus or is_installed("torch") else "numpy"
    processes = config.gpus or config.processes
    if engine == "numpy" and (processes > 1 or config.precision != "full"):
        raise UserError("engine: numpy trains in one process, in its dtype; choose --engine torch")
    if config.dtype == "float64" and config.precision != "full":
        raise UserError(f"precision: {config.precision} is for float32; with --dtype float64 expected full")
    if config.parallel == "fsdp" and config.precision == "float16" and processes > 1:
        raise UserError("precision: float16 scales gradients that fsdp has in parts; choose bfloat16, or ddp")
    trained_names(model, config.trained)
    return Setup(
        model, config.batch_size, length, engine, config.dtype, config.precision, config.trained, config.accumulation,
        processes, config.parallel, config.checkpoint_activations, "cuda" if config.gpus else "cpu", parts.threads(),
        config.objective,
    )  # fmt: skip


def report(config: PlanConfig) -> dict[str, Any]:
    """Everything that `show` prints, as plain values: bytes of each device, seconds, numbers of operations."""
    setup = setup_of(config)
    tokens = None if config.tokens is None else _tokens(config.tokens)
    rows = setup.batch_size * (2 if setup.pairs else 1)
    step_tokens = rows * setup.length * setup.accumulation
    taken, again = memory(setup), setup.checkpoint_activations
    micro_batch = gradients(setup.config, rows, setup.length, setup.learns, again)
    operations = micro_batch.operations * setup.accumulation
    moved = update(setup.config, setup.learns).bytes * (setup.item / FLOAT) / setup.shards
    steps = None if tokens is None else math.ceil(tokens / step_tokens)
    return {
        "preset": config.preset,
        "parameters": setup.config.n_parameters,
        "learning": setup.count(setup.learns),
        "engine": setup.engine,
        "dtype": setup.dtype,
        "precision": setup.precision,
        "device": "GPU" if config.gpus else "CPU",
        "processes": setup.processes,
        "parallel": setup.parallel,
        "objective": setup.objective,
        "batch_size": setup.batch_size,
        "length": setup.length,
        "accumulation": setup.accumulation,
        "checkpoint_activations": setup.checkpoint_activations,
        "memory": {
            "parameters": taken.parameters,
            "gradients": taken.gradients,
            "moments": taken.moments,
            "gathered": taken.gathered,
            "copies": taken.copies,
            "activations": taken.activations,
            "at_work": taken.at_work,
            "phases": taken.phases,
            "peak": taken.peak,
        },
        "work": {
            "operations_per_token": operations / step_tokens,
            "operations_per_step": operations,
            "operations": None if steps is None else steps * operations,
            "update_bytes": moved,
            "tokens_per_step": step_tokens,
            "tokens": tokens,
            "steps": steps,
        },
        "time": _time(config, setup, operations, moved, steps),
        "fits": _fits(config, setup),
    }


# Time.


def _time(config: PlanConfig, setup: Setup, operations: float, moved: float, steps: int | None) -> dict[str, Any]:
    """Seconds of a step and of all, at least and at the rate of a real step; None where nothing was measured."""
    ceilings = _ceilings(config, setup)
    devices = max(1, config.gpus)  # processes on one CPU share it
    found: dict[str, Any] = {"source": None, "step": None, "total": None, "reached": None, "reached_total": None}
    if ceilings is None:
        return found
    if ceilings.operations_per_s:
        found["step"] = operations / (devices * ceilings.operations_per_s)
        found["step"] += moved / ceilings.bytes_per_s if ceilings.bytes_per_s else 0.0
    if ceilings.reached:
        found["reached"] = operations / (devices * ceilings.reached)
    for name, total in (("step", "total"), ("reached", "reached_total")):
        if steps is not None and found[name] is not None:
            found[total] = steps * found[name]
    return found | ceilings._asdict() | {"reached_per_s": ceilings.reached, "reached": found["reached"]}


def _ceilings(config: PlanConfig, setup: Setup) -> Ceilings | None:
    if config.ceilings:
        return read_ceilings(config.ceilings, setup)
    if config.gpus or config.measure is False:
        return None
    return measure(setup.dtype)


def measure(dtype: str = "float32", n: int = 1536, size: int = 2**26) -> Ceilings:
    """This CPU's rates, roughly: the best of a few products of (n, n) and of copies of `size` bytes."""
    a = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
    source = np.ones(size // 8)
    target = np.zeros_like(source)
    product = min(_seconds(lambda: a @ a) for _ in range(4))
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(4))
    return Ceilings("measured now, roughly, by NumPy", 2 * n**3 / product, 2 * size / copy)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return max(time.perf_counter() - start, 1e-9)


def read_ceilings(path: str, setup: Setup) -> Ceilings:
    """The rates that a result of `python -m bench` holds. Raises UserError for a file without any, or of other devices.

    cpu, sweep   `ceilings`, and the steps of the engine: that of the model nearest in size counts
    gpu          `ceilings` in GB/s and TFLOP/s by type, and eager steps of GPT-2 124M
    matmul       the largest product's rate alone
    """
    document = read_json_object(path)
    kind, cases = document.get("kind"), document.get("cases")
    readers = {"cpu": _of_cpu, "sweep": _of_cpu, "gpu": _of_gpu, "matmul": _of_products}
    if kind not in readers or not isinstance(cases, dict):
        raise UserError(f"{path}: expected a result of python -m bench cpu, sweep, gpu or matmul, got {kind or 'none'}")
    if kind != "matmul" and (kind == "gpu") != (setup.device == "cuda"):
        here, there = ("GPUs", "a CPU") if setup.device == "cuda" else ("a CPU", "a GPU")
        raise UserError(f"{path}: holds {there}'s rates, and the plan is for {here}")
    try:
        found = readers[kind](document, setup)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a readable result of bench {kind} ({type(error).__name__}: {error})") from None
    if not (found.operations_per_s or found.reached):
        raise UserError(f"{path}: holds no rate that this plan could use: neither ceilings nor steps of {setup.engine}")
    return found._replace(source=f"{path}, {found.source}")


def _of_cpu(document: Mapping[str, Any], setup: Setup) -> Ceilings:
    machine, ceilings = document.get("machine") or {}, document.get("ceilings") or {}
    steps = dict(_steps(document["cases"], setup.engine))

    def distance(name: str) -> float:
        return abs(math.log(steps[name][0].n_parameters / setup.config.n_parameters))

    reached, example = None, ""
    if steps:
        example = min(steps, key=distance)
        reached = steps[example][1]
    rate, copy = (float(ceilings[name]) if name in ceilings else None for name in ("operations_per_s", "bytes_per_s"))
    return Ceilings(f"{machine.get('processor')}, {machine.get('cores')} cores", rate, copy, reached, example)


def _steps(cases: Mapping[str, Any], engine: str) -> Iterator[tuple[str, tuple[GPTConfig, float]]]:
    """Case -> its model, and the operations a second of the engine's whole steps."""
    for name, case in cases.items():
        settings = case.get("settings", {})
        of_engine = case.get("contestants", {}).get(engine)
        if settings.get("work") != "train" or of_engine is None or settings.get("examples", "text") != "text":
            continue
        if "config" in settings:
            model = GPTConfig.from_dict(settings["config"])
        else:
            model = PRESETS[settings["preset"]].replace(**settings.get("changes", {}))
        learns = trained_names(model, settings.get("trained") or ())
        work = gradients(model, settings["batch"], settings["length"], learns)
        yield name, (model, work.operations / of_engine["seconds"]["median"])


def _of_gpu(document: Mapping[str, Any], setup: Setup) -> Ceilings:
    cases = document["cases"]
    of_type = {"full": "float32", "float16": "bfloat16"}.get(setup.precision, setup.precision)
    ceilings, reached = cases.get("ceilings") or {}, None
    model = PRESETS["gpt2-small"]
    for step in cases.get("models") or ():  # of GPT-2 124M under bfloat16 autocast
        alike = step["operators"] == setup.engine and step["mode"] == "eager" and setup.low == 2
        if alike and step["model"] == f"GPT {model.n_parameters / 1e6:.3g}M":
            reached = gradients(model, step["batch"], step["length"]).operations / step["seconds"]
    rate, copy = ceilings.get(of_type), ceilings.get("copy")
    return Ceilings(
        str(cases.get("device")), rate and rate * 1e12, copy and copy * 1e9, reached, "gpt2-small" if reached else ""
    )


def _of_products(document: Mapping[str, Any], setup: Setup) -> Ceilings:
    largest = max(document["cases"], key=int)
    contestants = document["cases"][largest]["contestants"]
    columns = ("torch cuda",) if setup.device == "cuda" else ("numpy", "torch cpu")
    seconds = [contestants[name]["seconds"]["median"] for name in columns if name in contestants]
    rate = 2 * int(largest) ** 3 / min(seconds) if seconds else None
    return Ceilings("products in float32, without the optimizer's time", rate, None)


# What fits.


def _fits(config: PlanConfig, setup: Setup) -> dict[str, Any]:
    """Of each device's memory: the largest micro-batch, and how many of them make as many tokens a step."""
    free = _free(config, setup)
    rows = []
    for again in (False, True):
        tried = replace(setup, checkpoint_activations=again)
        most = None if free is None else largest_batch(tried, free)
        size, accumulation = (0, 0) if free is None else fitting(tried, free)
        rows.append(
            {
                "checkpoint_activations": again,
                "peak": memory(tried).peak,
                "batch_size": most,
                "micro_batch": size or None,
                "accumulation": accumulation or None,
            }
        )
    return {"memory": free, "given": config.memory is not None, "rows": rows}


def _free(config: PlanConfig, setup: Setup) -> float | None:
    """Bytes for each process."""
    if config.memory is not None:
        return _size(config.memory)
    if setup.device == "cuda":
        return host.free_on_gpu()
    free = host.free_bytes()
    return None if free is None else free / setup.processes


def _size(text: str) -> float:
    """24GiB, 80GB, 512MiB or a number of bytes."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if not found or not 0 < number < math.inf:
        raise UserError(f"memory: expected a size such as 24GiB or 80GB, got {text!r}")
    return number * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")


def _tokens(text: str) -> int:
    """300M, 10B, 1.5T, 1e9, or a number with or without commas."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([KMBT]?)\s*", re.sub(r",(?=\d{3}(?!\d))|_", "", text), re.I)
    try:
        number = float(found[1]) * 1000 ** " KMBT".index(found[2].upper() or " ") if found else math.nan
    except ValueError:
        number = math.nan
    if not 1 <= number < 1e30:
        raise UserError(f"tokens: expected a number such as 300M, 10B or 1e9, got {text!r}")
    return int(number)


# For people.


def show(found: Mapping[str, Any]) -> None:
    """Print a report."""
    from rich.console import Console

    console = Console(highlight=False)
    learning = "all learn" if found["learning"] == found["parameters"] else f"{found['learning']:,} of them learn"
    device = f"{found['processes']} {found['device'] + 's' * (found['device'] == 'GPU' and found['processes'] > 1)}"
    if found["device"] == "CPU":
        device = "this CPU" if found["processes"] == 1 else f"{found['processes']} processes on a CPU"
    shared = f" ({found['parallel']})" if found["processes"] > 1 else ""
    examples = found["batch_size"] if found["objective"] == "cross_entropy" else f"{found['batch_size']} pairs x 2"
    precision = "" if found["precision"] == "full" else f", {found['precision']}"
    console.print(
        f"{found['preset']}: {found['parameters']:,} parameters, {learning}; {found['engine']} engine, "
        f"{found['dtype']}{precision}; micro-batches of {examples} x {found['length']:,} tokens, "
        f"{found['accumulation']} a step; {device}{shared}",
        soft_wrap=True,
    )
    console.print()
    console.print(_memory_table(found))
    console.print()
    console.print(_fits_table(found))
    console.print()
    for line in _work_lines(found):
        console.print(line, soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    """An empty table, numbers to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _memory_table(found: Mapping[str, Any]) -> Any:
    taken, kept = found["memory"], found["memory"]["activations"]
    table = _table("Memory of each process" if found["processes"] > 1 else "Memory", "", "bytes")
    for name in ("parameters", "gradients", "moments"):
        table.add_row(name, size_text(taken[name]))
    if taken["gathered"]:
        table.add_row("whole parameters, gathered", size_text(taken["gathered"]))
    if taken["copies"]:
        table.add_row(f"weights in {found['precision']}", size_text(taken["copies"]))
    table.add_row("activations kept for the backward pass", size_text(sum(kept.values())))
    for kind in KINDS:
        if kept[kind]:
            table.add_row(f"  {kind}", size_text(kept[kind]))
    table.add_section()
    for name, size in taken["phases"].items():
        peak = size == taken["peak"]
        table.add_row(f"at most {AT[name]}", size_text(size), style="bold" if peak else None)
        if peak:
            table.add_row("  of it what is being computed", size_text(taken["at_work"]))
    return table


AT = {
    "frozen blocks": "in the frozen blocks' forward pass",
    "forward": "at the end of the forward pass",
    "loss": "in the loss's backward pass",
    "head": "in the head's backward pass",
    "blocks": "in the blocks' backward pass",
    "end of backward": "at the end of the backward pass",
    "optimizer": "in the optimizer's step",
}


def _fits_table(found: Mapping[str, Any]) -> Any:
    fits, asked = found["fits"], found["batch_size"] * found["accumulation"]
    if fits["memory"] is None:
        where = "how much memory there is, --memory says, as in --memory 80GiB"
    else:
        where = f"{size_text(fits['memory'])} {'given' if fits['given'] else 'free'}"
    table = _table(f"What fits: {where}", "activations", "peak", "batch_size at most", f"{asked} examples a step as")
    for row in fits["rows"]:
        most = row["batch_size"]
        table.add_row(
            "computed again" if row["checkpoint_activations"] else "kept",
            size_text(row["peak"]),
            "unknown" if most is None else f"{most:,}" if most else "none fits",
            f"{row['accumulation']:,} x {row['micro_batch']:,}" if row["accumulation"] else "",
        )
    return table


def _work_lines(found: Mapping[str, Any]) -> Iterator[str]:
    work, timing = found["work"], found["time"]
    a_token, a_step = (_number(work[f"operations_per_{unit}"]) for unit in ("token", "step"))
    yield f"Operations: {a_token} a token, {a_step} a step of {work['tokens_per_step']:,} tokens"
    if work["tokens"] is not None:
        yield (
            f"For {work['tokens']:,} tokens: {work['steps']:,} steps, {_number(work['operations'])} operations"
            + (f", {found['processes']} sharing them" if found["processes"] > 1 else "")
        )
    if timing["source"] is None:
        yield (
            "Time: unknown, nothing was measured. On such a machine run `python -m bench "
            f"{'gpu' if found['device'] == 'GPU' else 'cpu'} --out rates.json`, and give the file by --ceilings"
        )
        return
    if timing["step"] is not None:
        rate = f"{_number(timing['operations_per_s'])} operations a second"
        copy = f", {timing['bytes_per_s'] / 1e9:,.1f} GB/s" if timing["bytes_per_s"] else ""
        total = "" if timing["total"] is None else f"; all: {_duration(timing['total'])}"
        yield f"Time at least: {_duration(timing['step'])} a step{total}   ({rate}{copy}: {timing['source']})"
    if timing["reached"] is not None:
        total = "" if timing["reached_total"] is None else f"; all: {_duration(timing['reached_total'])}"
        share, source = "", f"   ({timing['source']})"
        if timing["operations_per_s"]:
            share, source = f", {timing['reached_per_s'] / timing['operations_per_s']:.0%} of the ceiling", ""
        taken = f"{_duration(timing['reached'])} a step{total}{source}"
        yield f"At the rate that steps of {timing['example']} reached{share}: {taken}"


def _number(value: float) -> str:
    """1.23e15, or with its digits where these are few."""
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Seconds as people say them, in two units at most."""
    if seconds < 120:
        return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    units = (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60))
    for (name, unit), (lower, part) in zip(units, (*units[1:], ("s", 1)), strict=True):
        if seconds >= unit:
            whole, rest = divmod(seconds, unit)
            return f"{whole:,.0f} {name} {rest // part:.0f} {lower}"
    raise AssertionError(seconds)
