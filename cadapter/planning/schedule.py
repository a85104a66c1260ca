"""The order in which a pipeline's stages work on micro-batches, and how long a step takes in it.

It is DeepSpeed's 1F1B schedule (``TrainSchedule``): a step of M micro-batches through S stages has 2·(M + S − 1) slots;
stage s runs the forward pass of micro-batch m in slot s + 2m, and its backward pass in slot 2S − 1 − s + 2m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """One pass of one micro-batch through one stage."""

    slot: int
    stage: int
    micro_batch: int
    is_forward: bool


def schedule(stages: int, micro_batches: int) -> list[Work]:
    """All passes of a step, in the order of their slots."""
    passes = [
        Work(slot, stage, number, is_forward)
        for stage in range(stages)
        for number in range(micro_batches)
        for slot, is_forward in ((stage + 2 * number, True), (2 * stages - 1 - stage + 2 * number, False))
    ]
    return sorted(passes)


def bubble(stages: int, micro_batches: int) -> float:
    """The share of a step in which a stage has nothing to do, if all passes take equally long: (S − 1)/(M + S − 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def step_seconds(
    forward: Sequence[float], backward: Sequence[float], transfer: Sequence[float], micro_batches: int
) -> float:
    """Seconds of a step's passes.

    A pass starts when its stage is free and what it needs has come from the neighbour. Sending keeps both sides busy,
    as DeepSpeed sends where it computes.

    Args:
        forward, backward: seconds of a micro-batch's pass through each stage.
        transfer: seconds that its hidden states, or their gradients, take to the next stage, for each but the last.
        micro_batches: M.
    """
    stages = len(forward)
    free = [0.0] * stages
    done: dict[tuple[int, int, bool], float] = {}
    for work in schedule(stages, micro_batches):
        source = work.stage + (-1 if work.is_forward else 1)
        start = free[work.stage]
        if 0 <= source < stages:
            taken = transfer[min(work.stage, source)]
            sent = max(start, done[source, work.micro_batch, work.is_forward])
            start = sent + taken
            free[source] = max(free[source], start)
        end = start + (forward if work.is_forward else backward)[work.stage]
        free[work.stage] = done[work.stage, work.micro_batch, work.is_forward] = end
    return max(free)
