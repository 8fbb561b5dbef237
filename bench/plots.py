"""The figures of a GPU benchmark: one for attention, one for what is bound by memory, one for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {  # the same peer looks the same everywhere
    "twingrad": "#c1272d",
    "yours": "#7f3c8d",
    "flash": "#1f77b4",
    "cudnn": "#2a9d57",
    "efficient": "#8c8c8c",
    "torch": "#1f77b4",
    "torch.compile": "#2a9d57",
    "liger": "#e08a1e",
}


def draw(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write PNGs into a folder; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    groups = {
        "attention": [m for m in document["measurements"] if m["operator"] == "attention"],
        "bandwidth": [m for m in document["measurements"] if m["unit"] == "GB/s" and m["x"]],
    }
    for name, measured in groups.items():
        if measured:
            made.append(_lines(measured, document, folder / f"{stem}-{name}.png"))
    if document["models"]:
        made.append(_bars(document, folder / f"{stem}-model.png"))
    return made


def _lines(measured: list[dict[str, Any]], document: dict[str, Any], path: Path) -> Path:
    """A panel for each operator, direction and setting; a line for each peer, against length or width."""
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(_panel(m) for m in measured))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.9 * rows + 0.5), squeeze=False)
    unit = measured[0]["unit"]
    ceiling = document["ceilings"]["copy_gb_per_s" if unit == "GB/s" else "bfloat16_tflop_per_s"]
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = [m for m in measured if _panel(m) == panel]
        for peer in dict.fromkeys(m["peer"] for m in here):
            points = sorted((m["x"], m["rate"]) for m in here if m["peer"] == peer)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=peer, color=COLOURS.get(peer))
        axis.axhline(ceiling, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({m["x"] for m in here}), [str(x) for x in sorted({m["x"] for m in here})], fontsize=7)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(" ".join(filter(None, panel)), fontsize=9)
        axis.set_xlabel(here[0]["x_name"], fontsize=8)
        axis.set_ylabel(unit, fontsize=8)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    by_name = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(by_name.values(), by_name.keys(), loc="upper center", ncols=len(by_name), frameon=False, fontsize=9)
    figure.text(0.01, 0.005, f"{document['device']}; dotted: measured ceiling, {ceiling:.4g} {unit}", fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _panel(measurement: dict[str, Any]) -> tuple[str, ...]:
    return tuple(measurement[key] for key in ("operator", "setting", "direction", "dtype"))


def _bars(document: dict[str, Any], path: Path) -> Path:
    """Tokens a second of each set of operators, eager and compiled."""
    from matplotlib import pyplot as plt

    models = document["models"]
    figure, axis = plt.subplots(figsize=(6, 0.6 * len(models) + 1.2))
    names = [f"{m['operators']}, {m['mode']}" for m in models]
    colours = [COLOURS["twingrad" if m["operators"] == "triton" else "torch"] for m in models]
    bars = axis.barh(names, [m["tokens_per_s"] for m in models], color=colours)
    axis.bar_label(bars, [f"{m['tokens_per_s']:,.0f}" for m in models], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("training tokens a second")
    axis.set_title(f"{models[0]['model']}, {document['device']}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
