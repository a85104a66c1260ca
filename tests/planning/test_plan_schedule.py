"""The schedule, against DeepSpeed's own, and the time of a step in it."""

from __future__ import annotations

from collections import Counter

import pytest
from deepspeed.runtime.pipe import schedule as theirs

from cadapter.planning.memory import in_flight
from cadapter.planning.schedule import bubble, schedule, step_seconds

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 5), (3, 4), (4, 2), (4, 8), (5, 7)]


def instructions(stages: int, micro_batches: int, stage: int) -> list[list[object]]:
    return list(theirs.TrainSchedule(micro_batches, stages, stage).steps())


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_passes_are_in_the_slots_in_which_deepspeed_has_them(stages: int, micro_batches: int) -> None:
    ours = schedule(stages, micro_batches)
    for stage in range(stages):
        expected = [
            (slot, isinstance(command, theirs.ForwardPass))
            for slot, commands in enumerate(instructions(stages, micro_batches, stage))
            for command in commands
            if isinstance(command, (theirs.ForwardPass, theirs.BackwardPass))
        ]
        found = [(work.slot, work.is_forward) for work in ours if work.stage == stage]
        assert found == expected
        assert [work.micro_batch for work in ours if work.stage == stage and work.is_forward] == list(
            range(micro_batches)
        )


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_the_bubble_is_the_share_of_slots_in_which_a_stage_of_deepspeed_does_nothing(
    stages: int, micro_batches: int
) -> None:
    for stage in range(stages):
        slots = instructions(stages, micro_batches, stage)
        busy = sum(any(isinstance(each, (theirs.ForwardPass, theirs.BackwardPass)) for each in slot) for slot in slots)
        assert 1 - busy / len(slots) == pytest.approx(bubble(stages, micro_batches))


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_each_cut_is_crossed_once_each_way_by_each_micro_batch(stages: int, micro_batches: int) -> None:
    """What :func:`cadapter.planning.traffic.stage_traffic` multiplies by."""
    for stage in range(stages):
        counts = Counter(type(each).__name__ for slot in instructions(stages, micro_batches, stage) for each in slot)
        assert counts["SendActivation"] == (micro_batches if stage < stages - 1 else 0)
        assert counts["SendGrad"] == (micro_batches if stage > 0 else 0)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_micro_batches_under_way(stages: int, micro_batches: int) -> None:
    """The most whose forward pass a stage of DeepSpeed has done and whose backward pass it has not."""
    for stage in range(stages):
        open_, most = 0, 0
        for slot in instructions(stages, micro_batches, stage):
            for command in slot:
                open_ += isinstance(command, theirs.ForwardPass) - isinstance(command, theirs.BackwardPass)
                most = max(most, open_)
        assert most == in_flight(stage, stages, micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_a_step_of_equal_passes_takes_as_many_slots(stages: int, micro_batches: int) -> None:
    seconds = step_seconds([1.0] * stages, [1.0] * stages, [0.0] * (stages - 1), micro_batches)
    assert seconds == 2 * (micro_batches + stages - 1)
    longer = step_seconds([1.0] * stages, [2.0] * stages, [0.0] * (stages - 1), micro_batches)
    assert longer == 3 * (micro_batches + stages - 1)
    assert 1 - 3 * micro_batches / longer == pytest.approx(bubble(stages, micro_batches))


def test_the_slowest_stage_decides_and_transfers_count() -> None:
    assert step_seconds([1, 5], [1, 5], [0], 10) == pytest.approx(1 + 10 * 10 + 1)
    free = step_seconds([1, 1], [1, 1], [0], 4)
    assert step_seconds([1, 1], [1, 1], [0.5], 4) > free
    assert step_seconds([1], [2], [], 6) == 18
