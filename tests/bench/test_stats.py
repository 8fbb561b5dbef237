"""What is said of noisy figures: known quantiles, laws that hold for any rounds, and how often it errs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import stats

seconds = st.floats(1e-6, 1e3)
runs = st.lists(st.lists(seconds, min_size=1, max_size=5), min_size=2, max_size=6)


@pytest.mark.parametrize(
    "confidence, freedom, t",
    [(0.95, 1, 12.7062), (0.95, 4, 2.77645), (0.99, 8, 3.35539), (0.999, 30, 3.64596), (0.95, 1000, 1.96234)],
)
def test_student_s_quantiles_are_those_of_tables(confidence, freedom, t):
    assert stats.student(confidence, freedom) == pytest.approx(t, rel=1e-4)


def test_a_change_is_welch_s_interval_of_the_logarithms():
    """By hand: logarithms 0 and 2 of A, 5 and 7 and 9 of B; variances 2 and 4."""
    change = stats.change(np.exp([[0], [2]]), np.exp([[5], [7], [9]]), 0.95)
    freedom = (1 + 4 / 3) ** 2 / (1 / 1 + (4 / 3) ** 2 / 2)
    off = stats.student(0.95, freedom) * math.sqrt(1 + 4 / 3)
    assert math.log(change.ratio) == pytest.approx(6)
    assert math.log(change.low) == pytest.approx(6 - off)
    assert math.log(change.high) == pytest.approx(6 + off)


@given(runs)
def test_a_run_has_not_changed_from_itself(sessions):
    change = stats.change(sessions, sessions)
    assert change.ratio == pytest.approx(1)
    assert change.beyond() == 0


@given(runs, runs, st.floats(1e-3, 1e3), st.floats(0, 0.2))
def test_the_way_back_is_the_inverse_and_units_do_not_matter(before, after, unit, least):
    there, back = stats.change(before, after), stats.change(after, before)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.low <= there.ratio <= there.high
    if math.isfinite(there.high):
        assert there.low * back.high == pytest.approx(1)
    scaled = [stats.change([[x * unit for x in s] for s in before], [[x * unit for x in s] for s in after])]
    assert scaled[0].ratio == pytest.approx(there.ratio)
    assert (there.beyond(least) == 1) <= (back.beyond(least * 0.999) == -1)


@given(runs, runs)
def test_more_confidence_and_more_wanted_never_call_more(before, after):
    weak, strong = (stats.change(before, after, confidence) for confidence in (0.9, 0.999))
    assert strong.low <= weak.low
    assert weak.high <= strong.high
    for change in (weak, strong):
        assert abs(change.beyond(0.05)) <= abs(change.beyond(0.0))


def test_one_session_says_nothing_of_chance():
    change = stats.change([[1.0] * 100], [[2.0] * 100])
    assert (change.ratio, change.low, change.high) == (pytest.approx(2), 0, math.inf)
    assert change.beyond() == 0


def noisy_run(rng, middle, sessions=5, rounds=10, session_noise=0.03, round_noise=0.1):
    """Rounds that share their session's luck, and the long tail upwards that times have."""
    luck = rng.normal(0, session_noise, (sessions, 1))
    return middle * np.exp(luck + round_noise * rng.exponential(1, (sessions, rounds)))


def called(seed, factor, least=0.0, confidence=0.95):
    rng = np.random.default_rng(seed)
    found = [stats.change(noisy_run(rng, 1), noisy_run(rng, factor), confidence).beyond(least) for _ in range(200)]
    return [found.count(verdict) / len(found) for verdict in (-1, 0, 1)]


def test_without_a_difference_few_are_called_and_a_slowdown_is_found():
    faster, _, slower = called(0, factor=1.0)
    assert faster + slower < 0.08, "5 percent, and what chance gives 200 trials"
    assert called(1, factor=1.2)[2] > 0.98
    assert called(2, factor=1 / 1.2)[0] > 0.98
    assert called(3, factor=1.2, confidence=1 - 0.05 / 20)[2] > 0.8, "among twenty rows"


def test_rounds_of_one_session_do_not_make_up_for_sessions():
    """Ten times the rounds, and the interval stays as wide as sessions differ."""
    rng = np.random.default_rng(4)
    widths = []
    for rounds in (10, 100):
        changes = [stats.change(noisy_run(rng, 1, rounds=rounds), noisy_run(rng, 1, rounds=rounds)) for _ in range(50)]
        widths.append(np.mean([math.log(change.high / change.low) for change in changes]))
    assert widths[1] > 0.6 * widths[0]


@given(st.floats(-3, 3), st.floats(1e-6, 1e6), st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True))
def test_an_exact_power_is_found(exponent, factor, n):
    fit = stats.power_law(n, [factor * x**exponent for x in map(float, n)])
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.factor == pytest.approx(factor, rel=1e-4)
    assert math.isnan(fit.error) if len(n) == 2 else fit.error < 1e-6


def test_the_exponent_s_error_is_that_of_least_squares():
    """By hand: x = 0, 1, 2 and y = 0, 2, 1 have slope 1/2, residuals -1/2, 1, -1/2, error sqrt(3/2 / 1 / 2)."""
    fit = stats.power_law(np.exp([0, 1, 2]), np.exp([0, 2, 1]))
    assert fit.exponent == pytest.approx(0.5)
    assert fit.error == pytest.approx(math.sqrt(1.5 / 2))
    assert str(fit) == "0.50 +- 0.87"


def test_a_change_in_words():
    assert str(stats.Change(1.12, 1.08, 1.15)) == "slower by 12% (8.0 to 15)"
    assert str(stats.Change(0.88, 0.85, 0.92)) == "faster by 12% (8.0 to 15)"


@given(runs)
def test_a_sample_keeps_every_round(sessions):
    sample = stats.sample(sessions)
    assert [len(rounds) for rounds in sample["sessions"]] == [len(rounds) for rounds in sessions]
    assert np.concatenate(sample["sessions"]) == pytest.approx(np.concatenate(sessions), rel=1e-4)
    low, high = sample["quartiles"]
    assert low <= sample["median"] <= high
