"""The loss plot: what is on it, and that it is written without a display."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.train.plot import plot_losses, save_plot


def make_log(steps=27, per_epoch=9, tokens=512, first=0):
    step = np.arange(steps) + first
    losses = np.linspace(10, 1, steps)
    evaluated = np.where(step % 5 == 0, losses, np.nan)
    return {
        "step": step,
        "epoch": (np.arange(steps) + 1) / per_epoch,
        "tokens": tokens * (np.arange(steps) + 1),
        "loss": losses,
        "train_loss": evaluated,
        "val_loss": evaluated + 1,
    }


def labels(axes):
    return [line.get_label() for line in axes.get_lines()]


def test_two_axes_and_whole_epochs():
    figure = plot_losses({"run": make_log()}, "A title")
    figure.draw_without_rendering()
    axes, tokens = figure.axes
    assert axes.get_xlabel() == "Epochs"
    assert tokens.get_xlabel() == "Tokens seen"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    ratio = tokens.get_xlim()[1] / axes.get_xlim()[1]
    assert ratio == pytest.approx(9 * 512)
    assert labels(axes) == ["each step", "training", "validation"]
    assert axes.get_lines()[1].get_xdata()[0] == pytest.approx(1 / 9)  # evaluated after the first of nine steps


@pytest.mark.parametrize("first", [0, 1])
def test_short_runs_are_drawn_over_steps(first):
    figure = plot_losses({"run": make_log(steps=12, first=first)})
    axes, tokens = figure.axes
    assert axes.get_xlabel() == "Steps"
    assert axes.get_lines()[0].get_xdata().tolist() == list(range(1, 13))
    assert tokens.get_xlim()[1] / axes.get_xlim()[1] == pytest.approx(512)


def test_several_runs_each_have_their_curves():
    figure = plot_losses({"NumPy": make_log(), "PyTorch": make_log()})
    lines = figure.axes[0].get_lines()
    names = ["NumPy, training", "NumPy, validation", "PyTorch, training", "PyTorch, validation"]
    assert [line.get_label() for line in lines] == names
    assert lines[0].get_linewidth() > lines[2].get_linewidth()  # both are seen where they coincide


def test_runs_without_evaluation_are_drawn():
    log = make_log()
    log["train_loss"] = log["val_loss"] = np.full(27, np.nan)
    assert labels(plot_losses({"run": log}).axes[0]) == ["each step"]
    assert labels(plot_losses({"a": log, "b": log}).axes[0]) == ["a, training", "b, training"]


def test_an_empty_log_is_refused():
    with pytest.raises(UserError, match="nothing to plot"):
        plot_losses({"run": make_log(steps=0)})


def test_png_and_pdf_are_written(tmp_path):
    paths = save_plot(plot_losses({"run": make_log()}), tmp_path / "loss")
    assert [path.name for path in paths] == ["loss.png", "loss.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_needs_no_display_and_no_pyplot():
    code = """
import sys
import numpy as np
from gpt.train.plot import plot_losses
assert "matplotlib" not in sys.modules
columns = ("step", "epoch", "tokens", "loss", "train_loss", "val_loss")
plot_losses({"run": dict.fromkeys(columns, np.arange(1.0, 4.0))})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], env={}, check=True)
