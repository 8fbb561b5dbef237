"""Where a step's time goes: the layers add up to the step, and are as they were afterwards."""

import pytest

from bench import breakdown
from bench.sweep import Point
from gpt import parts
from reference import linear
from reference.config import GPTConfig

SMALL = GPTConfig(300, 64, 64, 2, 2, qkv_bias=True, tie_embeddings=True)


@pytest.mark.parametrize("cores, apart, threads", [(1, 0, 1), (2, 0, 2), (2, 1 << 26, 1)])
def test_the_layers_and_the_rest_are_the_step(cores, apart, threads, monkeypatch):
    monkeypatch.setattr(parts, "threads", lambda: cores)
    monkeypatch.setattr(parts, "LEAST", 1)
    monkeypatch.setattr(parts, "LEAST_APART", 1)
    monkeypatch.setattr(parts, "MOST_APART", apart)
    before = linear.forward
    case = breakdown.measure(Point(SMALL.n_parameters, SMALL, 2, 64), steps=1)
    assert linear.forward is before
    assert case["threads"] == threads
    seconds = dict(case["seconds"])
    step = seconds.pop("step")
    assert sum(seconds.values()) == pytest.approx(step, rel=1e-6)
    assert all(seconds[name] > 0 for name in breakdown.LAYERS)
    head, (row,) = breakdown.rows_of({"small": case}, {"operations_per_s": 1e12})
    assert len(head) == len(row)
    assert row[0] == f"{SMALL.n_parameters:,}"
    assert "%" in breakdown.summary({"small": case}, {"operations_per_s": 1e12})
