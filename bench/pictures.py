"""The plots of the page of results: steps beside their peers, the roofline, growing cost, the engines' losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import sweep
from gpt.data.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.page import Result

TITLES = {
    "steps": "A training step beside its peers",
    "roofline": "What the machine can do at most, and what is done",
    "growth": "A training step's cost as the work grows",
    "quality": "One model, trained on every engine",
}
# The same contestant looks the same everywhere: colours that are told apart without red and green, and a marker each.
STYLES = {
    "numpy": ("#d62728", "o", "NumPy"),
    "torch": ("#1f77b4", "s", "PyTorch"),
    "torch compiled": ("#5dade2", "^", "PyTorch, compiled"),
    "plain": ("#34495e", "D", "plain loop"),
    "plain fused": ("#95a5a6", "v", "plain loop, fused AdamW"),
    "transformers": ("#e59866", "P", "transformers"),
    "triton": ("#8e44ad", "*", "Triton"),
}
OTHER = ("#bdc3c7", "x")


def can_draw(name: str, found: Sequence[Result]) -> bool:
    """Whether there are results of what a plot shows."""
    return bool(_drawn(name, found))


def draw(found: Sequence[Result], folder: Path) -> list[Path]:
    """Write as PNG what there are results of; the paths."""
    made = []
    for name, plot in _plots().items():
        if shown := _drawn(name, found):
            path = folder / f"{name}.png"
            figure = plot(shown)
            with atomic_write(path) as file:
                figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
            made.append(path)
    return made


def _drawn(name: str, found: Sequence[Result]) -> list[Any]:
    """What a plot shows."""
    from bench.page import _is_step, roofs

    if name == "steps":
        return [(key, case) for one in found if one.kind == "cpu" for key, case in one.cases.items() if _is_step(case)]
    if name == "roofline":
        return [one for one in found if one.document.get("ceilings") and any(True for _ in roofs(one))]
    if name == "growth":
        return [(one, fit) for one in found if one.kind == "sweep" for fit in sweep.fits(one.cases)]
    return [(key, case) for one in found if one.kind == "quality" for key, case in one.cases.items()]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(contestant: str) -> tuple[str, str, str]:
    return STYLES.get(contestant, (*OTHER, contestant))


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)


def _steps(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """A panel for each case, a bar for each contestant with its quartiles."""
    from bench.page import CASES

    most = max(len(case["contestants"]) for _, case in shown)
    figure, axes = _figure(1, len(shown), (max(6.5, 3.6 * len(shown)), 0.42 * most + 1.1))
    for axis, (name, case) in zip(axes[0], shown, strict=True):
        who = list(case["contestants"])
        seconds = [case["contestants"][one]["seconds"] for one in who]
        labels, colours = [_style(one)[2] for one in who], [_style(one)[0] for one in who]
        bars = axis.barh(labels, [1e3 * each["median"] for each in seconds], height=0.65, color=colours)
        ends = []
        for i, each in enumerate(seconds):
            low, high = each["quartiles"] or (each["median"],) * 2
            axis.plot([1e3 * low, 1e3 * high], [i, i], color="black", linewidth=1.2)
            ends.append(1e3 * max(high, each["median"]))
        for bar, each, end in zip(bars, seconds, ends, strict=True):
            middle = bar.get_y() + bar.get_height() / 2
            text = f" {1e3 * each['median']:,.3g}" if each["median"] < 1 else f" {1e3 * each['median']:,.0f}"
            axis.text(end, middle, text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(ends))
        settings = case["settings"]
        axis.set_title(f"{CASES.get(name, name)}\n{settings['batch']} x {settings['length']} tokens", fontsize=9)
        axis.set_xlabel("ms a step; line: quartiles", fontsize=8)
        _tidy(axis)
    return figure


def _roofline(shown: Sequence[Result]) -> Figure:
    """Operations a second over operations a byte: the roof, and each pass by each engine beneath it."""
    from bench.page import roofs

    figure, axes = _figure(1, len(shown), (max(6.5, 5.2 * len(shown)), 4.2))
    for axis, one in zip(axes[0], shown, strict=True):
        ceilings = one.document["ceilings"]
        top, slope = ceilings["operations_per_s"] / 1e9, ceilings["bytes_per_s"] / 1e9
        points = [
            (work.intensity, work.operations / seconds[who] / 1e9, who, f"{case} {part}")
            for case, part, work, seconds in roofs(one)
            for who in ("numpy", "torch")
            if who in seconds
        ]
        lowest = min([0.3, *(x for x, *_ in points)]) / 1.5
        x = np.geomspace(lowest, max([1000, *(x for x, *_ in points)]) * 1.5, 200)
        axis.plot(x, np.minimum(top, slope * x), color="black", linewidth=1.2)
        place = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
        axis.annotate(f"{top:,.0f} GFLOP/s", (x[-1], top), xytext=(0, 5), **place)
        knee = top / slope
        axis.annotate(f"{slope:,.0f} GB/s", (knee / 2, top / 2), xytext=(-6, 4), **place)
        for who in ("numpy", "torch"):
            colour, marker, label = _style(who)
            these = [(x, y) for x, y, name, _ in points if name == who]
            axis.plot(
                *zip(*these, strict=True), marker, color=colour, markersize=4.5, alpha=0.85, label=label, linestyle=""
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(min(y for _, y, *_ in points) / 2, top * 2)
        axis.set_xlabel("operations a byte", fontsize=8)
        axis.set_ylabel("GFLOP/s", fontsize=8)
        what = {"cpu": "halves of training steps", "sweep": "halves of training steps", "layers": "layers"}[one.kind]
        axis.set_title(f"{one.path.name}: {what}", fontsize=9)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
        _tidy(axis)
    return figure


def _growth(shown: Sequence[tuple[Result, Any]]) -> Figure:
    """A panel for each axis: times and the fitted power for each contestant."""
    from matplotlib.ticker import LogLocator

    axes_names = list(dict.fromkeys(fit[0] for _, fit in shown))
    columns = min(3, len(axes_names))
    rows = -(-len(axes_names) // columns)
    figure, axes = _figure(rows, columns, (4.1 * columns, 3.3 * rows))
    for axis, name in zip(axes.flat, axes_names, strict=False):
        unit = ""
        for one, (_, who, every, upper) in (each for each in shown if each[1][0] == name):
            along = sorted((case for case in one.cases.values() if case["axis"] == name), key=lambda case: case["n"])
            unit = along[0]["unit"]
            n = np.array([case["n"] for case in along])
            seconds = [case["contestants"][who]["seconds"]["median"] for case in along]
            colour, marker, label = _style(who)
            axis.plot(
                n,
                1e3 * np.array(seconds),
                marker,
                color=colour,
                markersize=4.5,
                label=f"{label}: {every.exponent:.2f}, {upper.exponent:.2f}",
            )
            axis.plot(n, 1e3 * every.factor * n**every.exponent, color=colour, linewidth=1, alpha=0.6)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(n, [_short(each) for each in n])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_xlabel(unit, fontsize=8)
        axis.set_ylabel("ms a step", fontsize=8)
        axis.legend(title="exponent, of the upper half", title_fontsize=7, fontsize=7, frameon=False)
        _tidy(axis)
    for axis in axes.flat[len(axes_names) :]:
        axis.set_visible(False)
    return figure


def _short(n: int) -> str:
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k" if n >= 10_000 else str(n)


def _quality(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """A panel for each case: the validation loss on each engine, the later ones thinner, upon each other."""
    figure, axes = _figure(1, len(shown), (max(6.5, 4.6 * len(shown)), 3.4))
    for axis, (name, case) in zip(axes[0], shown, strict=True):
        for i, (engine, taken) in enumerate(case["engines"].items()):
            colour, _, label = _style(engine)
            width = 1.2 + 2.4 * (len(case["engines"]) - 1 - i)
            axis.plot(taken["evaluated_steps"], taken["evaluated_losses"], color=colour, linewidth=width, label=label)
            if taken["steps"] is not None:
                axis.plot(taken["steps"], taken["val_loss"], "o", color=colour, markersize=3 + 2 * width)
        axis.axhline(case["settings"]["target"], color="black", linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set_title(f"{name}: {case['settings']['preset']}, target {case['settings']['target']}", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("steps", fontsize=8)
        axis.set_ylabel("validation loss, nats a byte", fontsize=8)
        axis.legend(fontsize=8, frameon=False)
        _tidy(axis)
    return figure


def _plots() -> dict[str, Callable[[Any], Figure]]:
    return {"steps": _steps, "roofline": _roofline, "growth": _growth, "quality": _quality}
