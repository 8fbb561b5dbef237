"""python -m bench compare A.json B.json: which differences between two results exceed the noise.

A row speaks of one contestant of one case. What is compared is its time in units of its control's in the same round,
where the control is a peer whose code is not ours, such as the plain PyTorch loop (contest.CONTROLS): what the
machine did in that minute befell both, and divides out. The control itself has no control, so its row compares times
alone: it tells how the machine's mood changed between the runs. Steps that finetune have no such peer, and our PyTorch
engine is the control: what seems to be a change of NumPy's may be one of that. `times` compares times alone everywhere.

Each session of a result gives one number, the median of its rounds, and the interval around the change is Welch's for
the means of their logarithms (stats.py): it is as wide as sessions differ, not as rounds of one process do. There are
many rows, and each might err: with m of them each interval has confidence 1 - 0.05 / m (Bonferroni), so that in 95 of
100 comparisons of a program with itself no row at all is called. What intervals cannot see is what all sessions of a
run share, the hour and the neighbours on the machine; therefore nothing is called that is not `least` percent off
besides.

Results of other machines, versions or sizes are not comparable, and say so; `anyway` compares those of other machines
and versions all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import results, stats
from bench.contest import CONTROLS, OURS
from gpt.errors import UserError

LEAST = 3.0  # percent
FAMILY = 0.05  # how often a comparison without any difference may call one
VERDICTS = {1: "slower", -1: "faster", 0: "no difference"}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    least: float = LEAST
    times: bool = False
    anyway: bool = False
    check: bool = False
    json: bool = False


@dataclass(frozen=True)
class Row:
    """One contestant of one case, in both results."""

    case: str
    contestant: str
    control: str | None  # None: times alone are compared
    before: float | None  # median seconds
    after: float | None
    change: stats.Change | None  # None where there is nothing to compare
    verdict: str  # slower, faster, no difference, not judged, not comparable
    why: str = ""
    is_control: bool = False  # of its case: what changed is the machine's mood

    @property
    def ours(self) -> bool:
        """Whether it is our code's, so that being slower is our fault."""
        return self.contestant in OURS and not self.is_control

    def __str__(self) -> str:
        if self.why:
            return f"{self.verdict}: {self.why}"
        assert self.change
        if self.verdict == "no difference":
            return f"no difference beyond noise ({self.change.low - 1:+.1%} to {self.change.high - 1:+.1%})"
        return f"{self.change}{', being the control: the machine' * self.is_control}"

    def document(self) -> dict[str, Any]:
        """As JSON has it; a bound that is infinite is null."""
        change = self.change
        bounds = [change.ratio, change.low, change.high] if change else [None] * 3
        finite = (None if bound is None or math.isinf(bound) else bound for bound in bounds)
        return {
            "case": self.case,
            "contestant": self.contestant,
            "control": self.control,
            "before": self.before,
            "after": self.after,
            **dict(zip(("ratio", "low", "high"), finite, strict=True)),
            "verdict": self.verdict,
            "why": self.why,
            "is_control": self.is_control,
        }


def main(before: Path, after: Path, options: Options) -> int:
    """Compare, print. With `check`: 1 where something of ours is slower, UserError where nothing could be judged."""
    if not 0 <= options.least < math.inf:
        raise UserError(f"least: expected at least 0 percent, got {options.least}")
    a, b = results.read(before), results.read(after)
    rows = compare(a, b, options)
    if options.json:
        named = {"before": (before, a), "after": (after, b)}
        documents = {name: {"file": str(path), **_where(of)} for name, (path, of) in named.items()}
        print(json.dumps({**documents, "rows": [row.document() for row in rows]}))
    else:
        for name, path, of in (("A", before, a), ("B", after, b)):
            print(f"{name}  {path}: {', '.join(_where(of).values())}")
        show(rows)
    if options.check and not any(row.verdict in VERDICTS.values() for row in rows):
        raise UserError(f"nothing could be judged: {rows[0].why if rows else 'the results have no case in common'}")
    return int(options.check and any(row.ours and row.verdict == "slower" for row in rows))


def _where(document: Mapping[str, Any]) -> dict[str, str]:
    """When, of what and where a result is."""
    state, machine = results.state(document), results.machine(document)
    return {"date": str(document.get("date")), "commit": state, "machine": machine}


def compare(a: Mapping[str, Any], b: Mapping[str, Any], options: Options) -> list[Row]:
    """A row for each contestant of each case of either result. UserError for results of different kinds."""
    if a["kind"] != b["kind"]:
        raise UserError(f"expected two results of one kind, got {a['kind']!r} and {b['kind']!r}")
    ours, theirs = cases(a), cases(b)
    apart = "" if options.anyway else "; ".join(differences(a, b))
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(name), theirs.get(name)
        who = dict.fromkeys(contestant for case in pair if case for contestant in case["contestants"])
        found += [(name, contestant, *pair) for contestant in who]
    judged = sum(1 for *_, one, other in found if one and other)
    confidence = 1 - FAMILY / max(1, judged)
    return [_row(*each, apart, confidence, options) for each in found]


def _row(name: str, contestant: str, one: Any, other: Any, apart: str, confidence: float, options: Options) -> Row:
    pair = [case["contestants"].get(contestant) if case else None for case in (one, other)]
    before, after = (each["seconds"]["median"] if each else None for each in pair)

    def row(verdict: str, why: str = "", change: stats.Change | None = None, control: str | None = None) -> Row:
        is_control = contestant == (one or other)["control"] and not options.times
        return Row(name, contestant, control, before, after, change, verdict, why, is_control)

    if not all(pair):
        return row("not comparable", f"only in {'A' if pair[0] else 'B'}")
    if apart:
        return row("not comparable", apart)
    if wrong := _other_settings(one["settings"], other["settings"]):
        return row("not comparable", wrong)
    series = []
    for letter, case in (("A", one), ("B", other)):
        sessions = case["contestants"][contestant]["seconds"]["sessions"]
        if not sessions or len(sessions) < 2:
            return row("not judged", f"{letter} kept {'one session, two are needed' if sessions else 'no rounds'}")
        series.append(sessions)
    control = _control(contestant, one, other, options)
    if control:
        series = [
            stats.ratios(sessions, case["contestants"][control]["seconds"]["sessions"])
            for sessions, case in zip(series, (one, other), strict=True)
        ]
    change = stats.change(series[0], series[1], confidence)
    return row(VERDICTS[change.beyond(options.least / 100)], "", change, control)


def _control(contestant: str, one: Any, other: Any, options: Options) -> str | None:
    """The control that both results have, of as many sessions; None for itself."""
    name = one.get("control")
    if options.times or name == contestant or name != other.get("control") or name is None:
        return None

    def sessions(case: Any, who: str) -> int:
        each = case["contestants"].get(who)
        return len(each["seconds"]["sessions"] or ()) if each else 0

    return name if all(sessions(case, name) == sessions(case, contestant) for case in (one, other)) else None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Why two results cannot be compared, a few words each."""
    if results.machine(a) != results.machine(b):
        yield f"other machine ({results.machine(a)}; {results.machine(b)})"
    versions = [{"python": each.get("python"), **(each.get("versions") or {})} for each in (a, b)]
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        was, now = (each.get(package) for each in versions)
        if was != now and package != "pytest-benchmark":
            yield f"other versions ({package} {was}, {now})"
    was, now = (each.get("environment") or {} for each in (a, b))
    if was != now:
        yield f"other environment ({_variables(was)}; {_variables(now)})"


def _variables(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items()) or "nothing set"


def _other_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            return f"other {name} ({_short(one.get(name))}, {_short(other.get(name))})"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def cases(document: Mapping[str, Any]) -> dict[str, Any]:
    """By name: settings, control and contestants. UserError for a result without times."""
    kind, found = document["kind"], document["cases"]
    try:
        if kind == "gpu":
            found = _of_gpu(found["measurements"])
        for case in found.values():
            for contestant in case["contestants"].values():
                sessions = contestant["seconds"]["sessions"] or ()
                rounds = [x for session in sessions for x in session]
                if not all(sessions) or not all(0 < x < math.inf for x in [contestant["seconds"]["median"], *rounds]):
                    raise ValueError
            case["control"], case["settings"].keys()
    except (KeyError, TypeError, AttributeError, ValueError):
        why = f"a result of kind {kind!r} has no times that could be compared"
        more = "; for what compilers made: bench static --against" if kind == "static" else ""
        raise UserError(f"{why}{more}") from None
    return found


def _of_gpu(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measurements of a GPU, each place a case, in the same form."""
    found: dict[str, Any] = {}
    for m in measurements:
        place = " ".join(filter(None, (m["operator"], m["direction"], m["dtype"], m["setting"], str(m["x"] or ""))))
        case = found.setdefault(place, {"settings": {"unit": m["unit"]}, "contestants": {}})
        case["contestants"][m["peer"]] = {"seconds": {"median": m["seconds"], "sessions": m.get("sessions") or None}}
    for case in found.values():
        peers = [
            name
            for name in (*CONTROLS, *case["contestants"])
            if name in case["contestants"] and name not in ("twingrad", "yours")
        ]
        case["control"] = peers[0] if peers else None
    return found


def show(rows: Sequence[Row]) -> None:
    """The table, and how many there are of each verdict."""
    table = Table("case", "contestant", "in units of", "A ms", "B ms", "B is", box=None)
    for row in rows:
        times = ("" if time is None else f"{1e3 * time:.4g}" for time in (row.before, row.after))
        table.add_row(row.case, row.contestant, row.control or "time", *times, str(row))
    Console(width=150).print(table)
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(row.verdict for row in rows)
    }
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
