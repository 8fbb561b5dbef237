"""What a GPU benchmark found, held against what was wanted, as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers import OURS


@dataclass(frozen=True)
class Measurement:
    """What one peer took for one case in one direction."""

    operator: str
    direction: str
    dtype: str
    setting: str
    x: int  # a sequence's length, a row's width; 0 where nothing varies
    x_name: str
    peer: str
    seconds: float  # the median
    quartiles: tuple[float, float]
    calls: int
    rate: float
    unit: str
    of_ceiling: float
    peak_bytes: int = 0  # beyond the arguments; 0 where it was not asked for
    sessions: Sequence[Sequence[float]] = ()  # every call's seconds, in consecutive parts

    @property
    def place(self) -> tuple[Any, ...]:
        """All but the peer."""
        return self.operator, self.direction, self.dtype, self.setting, self.x


@dataclass
class Findings:
    """All that one run of the benchmark found."""

    device: str
    checks: list[dict[str, Any]] = field(default_factory=list)  # operator, gate, measurements, failures
    ceilings: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # what -> why

    def places(self) -> dict[tuple[Any, ...], dict[str, Measurement]]:
        """Peers by name for each place that was measured."""
        found: dict[tuple[Any, ...], dict[str, Measurement]] = {}
        for measured in self.measurements:
            found.setdefault(measured.place, {})[measured.peer] = measured
        return found

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "targets": [asdict(verdict) for verdict in judge(self)]}


# What is wanted: of bfloat16, at the worst of all sizes that were measured.


@dataclass(frozen=True)
class Target:
    """How good an operator has to be."""

    operator: str
    setting: str | None  # None: any
    direction: str
    quantity: str  # "speed" or "memory": how many times better than a peer; "ceiling": the share of it
    peer: str
    at_least: float
    from_x: int = 0

    def covers(self, case: Any) -> bool:
        """Whether it speaks of this case or measurement."""
        return (
            case.operator == self.operator
            and case.dtype == "bfloat16"
            and self.setting in (None, case.setting)
            and case.x >= self.from_x
        )

    def value(self, peers: dict[str, Measurement]) -> float | None:
        """What was measured at one place; None where the peer did not run, or we did not."""
        ours, theirs = peers.get(OURS), peers.get(self.peer)
        if self.quantity == "ceiling":
            return ours.of_ceiling if ours else None
        if not ours or not theirs:
            return None
        if self.quantity == "speed":
            return theirs.seconds / ours.seconds
        return theirs.peak_bytes / ours.peak_bytes if ours.peak_bytes else None

    def __str__(self) -> str:
        wanted = "share of the ceiling" if self.quantity == "ceiling" else f"{self.quantity}, times {self.peer}"
        return f"{' '.join(filter(None, (self.operator, self.setting, self.direction)))}, {wanted}"


TARGETS = (
    Target("attention", "D 64 causal", "forward", "speed", "flash", 1.2),
    Target("attention", "D 64 causal", "forward", "speed", "cudnn", 0.9),
    Target("attention", "D 64 causal", "backward", "speed", "flash", 1.0),
    Target("attention", "D 128 causal", "backward", "speed", "flash", 0.9),
    *(Target("layer_norm", None, direction, "ceiling", "", 0.85, 2048) for direction in ("forward", "backward")),
    Target("layer_norm", None, "backward", "speed", "liger", 1.3, 2048),
    *(Target("gelu", None, direction, "ceiling", "", 0.9) for direction in ("forward", "backward")),
    Target("linear_cross_entropy", None, "both", "memory", "torch", 4.0),
    Target("linear_cross_entropy", None, "both", "speed", "torch", 1.0),
)
TRAINING = 1.15  # tokens a second of the compiled model on the kernels, over those of the one on PyTorch's operators


@dataclass(frozen=True)
class Verdict:
    """What became of a target."""

    what: str
    at_least: float
    found: float | None = None  # None: not measured
    where: str = ""  # the worst place

    def __str__(self) -> str:
        if self.found is None:
            return f"not measured  {self.what}: wanted {self.at_least:.2f}"
        met = "met" if self.found >= self.at_least else "NOT MET"
        return f"{met:12}  {self.what}: {self.found:.2f}{self.where}, wanted {self.at_least:.2f}"


def judge(findings: Findings) -> Iterator[Verdict]:
    """A verdict for each target."""
    places = findings.places().values()
    for target in TARGETS:
        values = []
        for peers in places:
            one = next(iter(peers.values()))
            value = target.value(peers) if target.covers(one) and one.direction == target.direction else None
            if value is not None:
                values.append((value, f" at {one.setting} {one.x or ''}".rstrip()))
        yield Verdict(str(target), target.at_least, *min(values, default=()))
    speeds = {m["operators"]: m["tokens_per_s"] for m in findings.models if m["mode"] == "compiled"}
    ratio = speeds["triton"] / speeds["torch"] if len(speeds) == 2 else None
    yield Verdict("training step, compiled: speed, times the torch set", TRAINING, ratio)


# Tables.


def show(findings: Findings, targets: bool) -> None:
    """Print all of it, the most important last."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    for table in (operators(findings), models(findings)):
        if table.row_count:
            console.print(table)
    for name, ceiling in findings.ceilings.items():
        print(f"ceiling       {name}: {ceiling:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}")
    for why, what in _by_reason(findings.left_out).items():
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        print(f"left out      {'; '.join(what[:3])}{more}: {why}")
    for verdict in judge(findings) if targets else ():
        print(verdict)


def operators(findings: Findings) -> Table:
    """A row for each operator, direction and size: our time and rate, then each peer's time, and how ours compares."""
    table = Table("operator", "size", "ms", "quartiles", "rate", "of ceiling", "peer: ms, ours is as fast", box=None)
    for peers in findings.places().values():
        one, ours = next(iter(peers.values())), peers.get(OURS)
        size = " ".join(filter(None, (one.setting, str(one.x or ""), "" if one.dtype == "bfloat16" else one.dtype)))
        others = (_beside(theirs, ours) for name, theirs in peers.items() if name != OURS)
        table.add_row(f"{one.operator} {one.direction}", size, *_own(ours), ", ".join(others))
    return table


def _own(ours: Measurement | None) -> tuple[str, ...]:
    if ours is None:
        return ("-",) * 4
    quartiles = " to ".join(f"{1e3 * quartile:.4g}" for quartile in ours.quartiles)
    rate = f"{ours.rate:.4g} {ours.unit}{_memory(ours)}"
    return f"{1e3 * ours.seconds:.4g}", quartiles, rate, f"{ours.of_ceiling:.0%}"


def _beside(theirs: Measurement, ours: Measurement | None) -> str:
    ratio = f" {theirs.seconds / ours.seconds:.2f}x" if ours else ""
    return f"{theirs.peer} {1e3 * theirs.seconds:.4g}{ratio}{_memory(theirs)}"


def _memory(measured: Measurement) -> str:
    return f" {measured.peak_bytes / 2**20:,.0f} MiB" if measured.peak_bytes else ""


def models(findings: Findings) -> Table:
    """A row for each set of operators, eager and compiled."""
    table = Table("model", "operators", "mode", "tokens/s", "step ms", "quartiles", "peak MiB beyond weights", box=None)
    for m in findings.models:
        quartiles = " to ".join(f"{1e3 * quartile:.1f}" for quartile in m["quartiles"])
        figures = (f"{m['tokens_per_s']:,.0f}", f"{1e3 * m['seconds']:.1f}", quartiles)
        table.add_row(m["model"], m["operators"], m["mode"], *figures, f"{m['peak_bytes'] / 2**20:,.0f}")
    return table


def _by_reason(left_out: dict[str, str]) -> dict[str, list[str]]:
    """What was left out for the same reason, together."""
    found: dict[str, list[str]] = {}
    for what, why in left_out.items():
        found.setdefault(why, []).append(what)
    return found
