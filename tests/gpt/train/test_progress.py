"""What a run prints, on a terminal and elsewhere."""

import io

import pytest

from gpt.train.log import Row
from gpt.train.progress import Bar, Lines, clock, create_progress

QUIET = Row(4, 5 / 9, 2560, 4e-4, 8.9, 1.0, tokens_per_s=1000.0)
EVALUATED = Row(5, 6 / 9, 3072, 4e-4, 8.6, 1.0, 8.11053, 8.33857, tokens_per_s=3000.0)


def test_lines_are_the_books():
    out = io.StringIO()
    lines = Lines(out)
    lines.start(4, 90)
    lines.step(QUIET)
    lines.step(EVALUATED)
    lines.line("Every effort moves you")
    lines.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("Ep 1 (Step 000005): Train loss 8.111, Val loss 8.339  (1,500 tokens/s, 0:")
    assert first.endswith(" left)")
    assert second == "Every effort moves you"


@pytest.mark.parametrize("epoch, name", [(1 / 9, "Ep 1"), (1.0, "Ep 1"), (10 / 9, "Ep 2"), (10.0, "Ep 10")])
def test_epochs_are_counted_from_one(epoch, name):
    out = io.StringIO()
    lines = Lines(out)
    lines.start(0, 90)
    lines.step(Row(0, epoch, 512, 4e-4, 9, 1, 9, 9, 1000))
    assert out.getvalue().startswith(f"{name} (Step 000000)")


def test_bar_shows_loss_rate_speed_and_evaluations():
    from rich.console import Console

    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=120, _environ={}))
    bar.start(4, 90)
    bar.step(QUIET)
    bar.step(EVALUATED)
    bar.line("[not] markup")
    bar.close()
    shown = out.getvalue()
    for text in ("6/90", "loss 8.600", "lr 4.0e-04", "1,500 tokens/s", "Train loss 8.111", "[not] markup"):
        assert text in shown


def test_no_bar_where_there_is_no_terminal():
    assert isinstance(create_progress(io.StringIO()), Lines)


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (36_061, "10:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text
