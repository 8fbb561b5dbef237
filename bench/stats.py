"""What can be said of figures that never come out the same twice.

A contestant is timed in `sessions`, each a fresh process, and in each in several `rounds`. Rounds of one session
share what chance gave that process (where its memory lies, what else the machine did in that minute), so they say
little about how far another run would be off. The sessions say that, and they are what is counted here: one number
each.

Two runs, A and B, with S_A and S_B sessions, whose logarithms x have means a and b and variances v_a and v_b:

    change    exp(b - a), B's time as a multiple of A's
    interval  exp(b - a +- t sqrt(v_a / S_A + v_b / S_B))                Welch's interval, symmetric in the logarithm
    freedom   (v_a / S_A + v_b / S_B)^2 / ((v_a / S_A)^2 / (S_A - 1) + (v_b / S_B)^2 / (S_B - 1))

with t Student's quantile for that many degrees of freedom. (Georges, Buytaert and Eeckhout 2007; Kalibera and Jones
2013.)

Cost as the work n grows is t = c n^p, fitted by least squares to log t = log c + p log n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any

import numpy as np

Sessions = Sequence[Sequence[float]]


def sample(sessions: Sessions, digits: int = 5) -> dict[str, Any]:
    """What a result keeps of a quantity: median and quartiles of all rounds, and the rounds themselves by session."""
    kept = [[float(f"{value:.{digits}g}") for value in rounds] for rounds in sessions]
    every = [value for rounds in kept for value in rounds]
    return {"median": median(every), "quartiles": quartiles(every), "sessions": kept}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third; of one value, that value twice."""
    return [float(value) for value in np.percentile(values, (25, 75))]


def ratios(ours: Sessions, theirs: Sessions) -> list[list[float]]:
    """Round by round, ours / theirs, for those rounds that both took; sessions pair in order."""
    return [[a / b for a, b in zip(*pair, strict=False)] for pair in zip(ours, theirs, strict=False)]


@dataclass(frozen=True)
class Change:
    """B's time as a multiple of A's, and the interval that holds it; (0, inf) where nothing says how much is chance."""

    ratio: float
    low: float
    high: float

    def beyond(self, least: float = 0.0) -> int:
        """1 slower, -1 faster, 0 neither: does the interval leave out 1, and is the ratio off it by over `least`?"""
        if self.low > 1 and self.ratio > 1 + least:
            return 1
        return -1 if self.high < 1 and self.ratio < 1 / (1 + least) else 0

    def __str__(self) -> str:
        """In percent of the slower one's time saved, or of the faster one's added: "slower by 12% (8 to 15)"."""
        low, middle, high = (100 * (bound - 1) for bound in (self.low, self.ratio, self.high))
        if self.ratio >= 1:
            return f"slower by {_percent(middle)}% ({_percent(low)} to {_percent(high)})"
        return f"faster by {_percent(-middle)}% ({_percent(-high)} to {_percent(-low)})"


def _percent(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.1f}"


def change(before: Sessions, after: Sessions, confidence: float = 0.95) -> Change:
    """How a quantity changed from one run to another, by the medians of their sessions (see above)."""
    a, b = ([math.log(median(rounds)) for rounds in sessions if len(rounds)] for sessions in (before, after))
    middle = fmean(b) - fmean(a)
    if min(len(a), len(b)) < 2:
        return Change(math.exp(middle), 0.0, math.inf)
    parts = [variance(x) / len(x) for x in (a, b)]
    if not sum(parts):
        return Change(math.exp(middle), math.exp(middle), math.exp(middle))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    off = student(confidence, freedom) * math.sqrt(sum(parts))
    return Change(math.exp(middle), _exp(middle - off), _exp(middle + off))


def student(confidence: float, freedom: float) -> float:
    """t with P(|T| < t) = confidence, for T of Student's distribution; `freedom` at least 1, and need not be whole.

    With T = sqrt(f) / tan(u), the density of u on (0, pi/2) is proportional to sin(u)^(f-1): P(|T| > t) is the share of
    its integral that lies below u = atan(sqrt(f) / t). Integrated by the trapezoidal rule in u = e^s, which keeps small
    shares exact.
    """
    s = np.linspace(-40, math.log(math.pi / 2), 100_001)
    density = np.exp((freedom - 1) * np.log(np.sin(np.exp(s))) + s)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    u = math.exp(np.interp(1 - confidence, below / below[-1], s))
    return math.sqrt(freedom) / math.tan(u)


@dataclass(frozen=True)
class PowerLaw:
    """t = factor * n^exponent; `error`: the exponent's standard error, nan where two points leave nothing over."""

    exponent: float
    error: float
    factor: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if math.isnan(self.error) else f" +- {self.error:.2f}")


def power_law(n: Sequence[float], t: Sequence[float]) -> PowerLaw:
    """The least-squares line through the points in the logarithms; two different n at least."""
    x, y = np.log(n), np.log(t)
    dx = x - x.mean()
    exponent = float(dx @ y / (dx @ dx))
    rest = y - y.mean() - exponent * dx
    error = math.sqrt(rest @ rest / (len(x) - 2) / (dx @ dx)) if len(x) > 2 else math.nan
    return PowerLaw(exponent, error, float(np.exp(y.mean() - exponent * x.mean())))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
