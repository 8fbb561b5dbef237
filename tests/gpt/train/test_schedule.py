"""Learning rates against the printed figures and PyTorch's own schedules."""

import math

import pytest

from gpt.train.schedule import warmup_constant, warmup_cosine


def book(step: int) -> float:
    return warmup_cosine(step, total=135, peak=1e-2, warmup=20, initial=1e-4, minimum=1e-5)


@pytest.mark.parametrize("step, lr", [(0, 1e-4), (1, 5.95e-4), (19, 9.505e-3), (20, 1e-2)])
def test_warmup_is_the_books(step, lr):
    assert math.isclose(book(step), lr, rel_tol=1e-12)
    assert math.isclose(warmup_constant(step, 1e-2, 20, 1e-4), lr, rel_tol=1e-12)


def test_cosine_is_the_books():
    assert round(book(77), 8) == 0.00507323
    assert round(book(134), 8) == 1.186e-5
    assert book(135) == book(1000) == 1e-5  # stays at the floor


@pytest.mark.parametrize("step, factor", [(100, 1), (350, 0.8536), (600, 0.5), (1100, 0)])
def test_factor_of_a_lambda_schedule(step, factor):
    assert abs(warmup_cosine(step, total=1100, peak=1, warmup=100) - factor) < 5e-5


def test_cosine_annealing_ends_at_a_tenth():
    lrs = [warmup_cosine(step, total=40, peak=3e-4, minimum=3e-5) for step in range(41)]
    assert lrs[0] == 3e-4
    assert math.isclose(lrs[-1], 3e-5)
    assert lrs == sorted(lrs, reverse=True)


def test_cosine_annealing_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=3e-5)
    for step in range(40):
        lr = warmup_cosine(step, total=40, peak=3e-4, minimum=3e-5)
        assert math.isclose(optimizer.param_groups[0]["lr"], lr, rel_tol=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 10, 11, 50])
def test_warmup_of_none_or_all_of_the_run(warmup):
    lrs = [warmup_cosine(step, total=10, peak=1.0, warmup=warmup, minimum=0.1) for step in range(12)]
    assert all(0 <= lr <= 1 for lr in lrs)
    assert lrs[0] == (0 if warmup else 1)
