"""Bytes that processes send each other in a step: hidden states between stages, gradients between replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cadapter.planning.memory import RunSizes


class Crossing(NamedTuple):
    """Bytes of one micro-batch at a cut between two stages, to the next stage and back."""

    forward: int
    backward: int


def crossing(run: RunSizes) -> Crossing:
    """What a carrier is made of: hidden states; codes, a byte a token; and what the run's settings add.

    The neutral penalty is one float32, with a gradient that goes back; dropout has an int64 a sequence; positions of
    isolated documents are int64.
    """
    penalty = 4 if run.penalty else 0
    whole = run.micro_batch + (8 * run.rows if run.dropout else 0) + (8 * run.micro_batch if run.positions else 0)
    return Crossing(run.stream_bytes + penalty + whole, run.stream_bytes + penalty)


def stage_traffic(run: RunSizes) -> int:
    """Bytes of a step at one cut of one pipeline, both ways."""
    return run.accumulation * sum(crossing(run))


def gradient_bytes(run: RunSizes, bounds: Sequence[int], stage: int) -> int:
    """Bytes of a stage's gradients, which its replicas add up."""
    numbers = sum(run.trainable[bounds[stage] : bounds[stage + 1]])
    return numbers * run.per_number.gradient


def ring_bytes(count: int, replicas: int) -> float:
    """Bytes that each of ``replicas`` sends to add up ``count`` bytes in a ring: 2·(R − 1)/R of them."""
    return 2 * (replicas - 1) / replicas * count
