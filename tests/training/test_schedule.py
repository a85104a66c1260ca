"""Learning rates and evaluations by step."""

from __future__ import annotations

import itertools
import math

import pytest

from cadapter.training.schedule import evaluation_steps, schedule_factor

NAMES = ("rms_ratio", "constant", "linear", "cosine")
TOTAL = 40


def factors(name: str, warmup: int = 0, total: int = TOTAL, beta2: float = 0.99) -> list[float]:
    """The factors of steps 1 to ``total``."""
    return [schedule_factor(name, step, total, warmup, beta2) for step in range(1, total + 1)]


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_rms_ratio_starts_at_step_one_and_not_at_zero(beta2):
    found = factors("rms_ratio", beta2=beta2)
    assert found[0] == pytest.approx(math.sqrt((1 - beta2) / (1 + beta2)), rel=1e-12)
    assert found[0] > 0
    for step, factor in enumerate(found, start=1):
        assert factor == pytest.approx(math.sqrt((1 - beta2**step) / (1 + beta2**step)), rel=1e-12)
    assert found == sorted(found)
    assert schedule_factor("rms_ratio", 100_000, 100_000, 0, beta2) == pytest.approx(1)


def test_rms_ratio_of_the_defaults():
    """sqrt(0.01 / 1.99): 7 % of lr at the first step with the default β₂ = 0.99."""
    assert schedule_factor("rms_ratio", 1, 1, 0, 0.99) == pytest.approx(0.0708881, abs=1e-7)


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL - 1, TOTAL, TOTAL + 5])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_the_run_has_a_learning_rate_of_zero_or_above_one(name, warmup):
    for total in (1, 2, TOTAL):
        for factor in factors(name, warmup, total):
            assert 0 < factor <= 1


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_a_straight_line_from_zero(name):
    warmup = 8
    with_warmup = factors(name, warmup)[:warmup]
    base = factors(name)[:warmup] if name == "rms_ratio" else [1.0] * warmup
    assert with_warmup == pytest.approx([factor * (k + 1) / warmup for k, factor in enumerate(base)], rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_way_down_would_be_zero_one_step_after_the_end(name, warmup):
    """A line, or half a cosine, from 1 at the last step of the warm-up."""
    found = factors(name, warmup)[warmup:]
    steps = TOTAL - warmup + 1
    for gone, factor in enumerate(found, start=1):
        left = 1 - gone / steps
        expected = left if name == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2
        assert factor == pytest.approx(expected, rel=1e-9)
    assert found == sorted(found, reverse=True)


def test_constant_is_constant():
    assert factors("constant") == [1.0] * TOTAL


@pytest.mark.parametrize(
    ("evaluations", "total", "expected"),
    [
        (0, 10, set()),
        (1, 10, {10}),
        (2, 10, {0, 10}),
        (3, 10, {0, 5, 10}),
        (11, 100, set(range(0, 101, 10))),
        (11, 10, set(range(11))),
        (11, 3, {0, 1, 2, 3}),
        (1, 1, {1}),
        (2, 1, {0, 1}),
    ],
)
def test_evaluations_are_spread_from_before_the_first_step_to_after_the_last(evaluations, total, expected):
    assert evaluation_steps(evaluations, total) == expected


@pytest.mark.parametrize("total", [7, 20, 333, 1000])
def test_gaps_between_evaluations_differ_by_at_most_one(total):
    for evaluations in range(2, min(total, 12)):
        steps = sorted(evaluation_steps(evaluations, total))
        assert len(steps) == evaluations
        gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1
