"""A run that is killed again and again, whatever it is doing, ends up as the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.soak import Soak, report


@pytest.mark.processes
def test_a_run_killed_at_awkward_moments_is_the_run_that_was_not(tmp_path: Path) -> None:
    moments = [("checkpoint", "all"), ("step", "parent"), ("final", "all")]
    outcome = Soak(tmp_path, seed=0).run(kills=3, inside=1, moments=moments)
    assert outcome.faults == [], report(outcome)
    assert len(outcome.kills) >= 3
    assert outcome.inside >= 1
    assert outcome.runs[-1].differing_bits == outcome.runs[-1].differing_lines == 0


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_at_random_moments_and_one_process_at_a_time(tmp_path: Path) -> None:
    moments = [("checkpoint", "worker 0"), ("evaluation", "worker 1"), ("start-up", "parent"), ("step", "launcher")]
    outcome = Soak(tmp_path, seed=1).run(kills=12, inside=3, moments=moments)
    assert outcome.faults == [], report(outcome)
    assert len(outcome.kills) >= 12
    assert outcome.inside >= 3
