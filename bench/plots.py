"""The figures of a GPU benchmark: one for attention, one for what is bound by memory, one for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.roofline import UNITS

# The same peer looks the same everywhere: colours that are told apart without red and green, and a marker each.
STYLES = {
    "twingrad": ("#d62728", "o"),
    "yours": ("#8e44ad", "*"),
    "flash": ("#1f77b4", "s"),
    "cudnn": ("#17a589", "^"),
    "efficient": ("#7f8c8d", "D"),
    "torch": ("#34495e", "s"),
    "torch.compile": ("#5dade2", "^"),
    "liger": ("#e59866", "D"),
}


def draw(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write PNGs into a folder; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    attention = [m for m in document["measurements"] if m["operator"] == "attention"]
    attention.sort(key=lambda m: m["direction"], reverse=True)  # forward in the first row of panels
    bandwidth = [m for m in document["measurements"] if m["unit"] == "GB/s" and m["x"]]
    bandwidth.sort(key=lambda m: (m["operator"], m["setting"], m["dtype"]))
    made = []
    for name, measured in (("attention", attention), ("bandwidth", bandwidth)):
        if measured:
            made.append(_lines(measured, document, folder / f"{stem}-{name}.png"))
    if document["models"]:
        made.append(_bars(document, folder / f"{stem}-model.png"))
    return made


def _lines(measured: list[dict[str, Any]], document: dict[str, Any], path: Path) -> Path:
    """A panel for each operator, direction and setting; a line for each peer, against length or width."""
    from matplotlib import pyplot as plt

    panels: dict[str, list[dict[str, Any]]] = {}
    for m in measured:
        dtype = "" if m["dtype"] == "bfloat16" else m["dtype"]
        panels.setdefault(" ".join(filter(None, (m["operator"], m["setting"], dtype, m["direction"]))), []).append(m)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(6, 3.3 * columns), 2.6 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    unit = measured[0]["unit"]
    ceiling = document["ceilings"][UNITS[unit]]
    for axis, (title, here) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, here)
        axis.set_title(title, fontsize=9)
        axis.axhline(ceiling, color="black", linewidth=0.9, linestyle=(0, (4, 3)), label="ceiling, measured")
        axis.set_ylim(0, 1.06 * max(ceiling, *(m["rate"] for m in measured)))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit, fontsize=9)
    by_name = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(by_name, key=[*STYLES, "ceiling, measured"].index)
    height = figure.get_figheight()
    title = f"{document['device']}, bfloat16 unless said; ceiling {ceiling:,.4g} {unit}"
    figure.suptitle(title, y=1 - 0.1 / height, verticalalignment="top", fontsize=10)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.25 / height), "ncols": len(order), "frameon": False}
    figure.legend([by_name[name] for name in order], order, fontsize=9, **place)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _panel(axis: Any, here: list[dict[str, Any]]) -> None:
    for peer, (colour, marker) in STYLES.items():
        points = sorted((m["x"], m["rate"]) for m in here if m["peer"] == peer)
        if points:
            thick = 2.2 if peer in ("twingrad", "yours") else 1.3
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker=marker, markersize=4, linewidth=thick, color=colour, label=peer)
    places = sorted({m["x"] for m in here})
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in places], fontsize=8)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlabel(here[0]["x_name"], fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(document: dict[str, Any], path: Path) -> Path:
    """Tokens a second of each set of operators, eager and compiled."""
    from matplotlib import pyplot as plt

    models = document["models"]
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(models) + 1.1))
    names = [f"{m['operators']}, {m['mode']}" for m in models]
    colours = [STYLES["twingrad" if m["operators"] == "triton" else "torch"][0] for m in models]
    bars = axis.barh(names, [m["tokens_per_s"] for m in models], height=0.65, color=colours)
    axis.bar_label(bars, [f"{m['tokens_per_s']:,.0f}" for m in models], padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("training tokens a second")
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    first = models[0]
    axis.set_title(f"{first['model']}, {first['batch']} x {first['length']} tokens, {document['device']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
