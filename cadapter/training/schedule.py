"""When things happen in a run and with which learning rate: pure functions of the step, which counts from 1."""

from __future__ import annotations

import math


def schedule_factor(name: str, step: int, total_steps: int, warmup_steps: int, beta2: float) -> float:
    """Return what the learning rate is multiplied by at ``step`` (1 ≤ step ≤ total_steps).

    * "rms_ratio": sqrt((1 − β₂^t) / (1 + β₂^t)) with t = step, the share of Adam's second moment that has warmed up;
    * "constant": 1;
    * "linear", "cosine": from 1 after the warm-up down towards 0 after the last step.

    During the first ``warmup_steps`` steps it is multiplied by step / warmup_steps. It is never 0 within the run.
    """
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if name == "rms_ratio":
        decayed = beta2**step
        return warmup * math.sqrt((1 - decayed) / (1 + decayed))
    if name == "constant" or step <= warmup_steps:
        return warmup
    remaining = (total_steps - step + 1) / (total_steps - warmup_steps + 1)
    return remaining if name == "linear" else 0.5 * (1 - math.cos(math.pi * remaining))


def evaluation_steps(evaluations: int, total_steps: int) -> set[int]:
    """Return after which steps to evaluate; 0 is before the first one.

    One evaluation comes after the last step only; two or more are spread evenly from before the first to after the
    last.
    """
    if evaluations <= 0:
        return set()
    if evaluations == 1:
        return {total_steps}
    return {round(k * total_steps / (evaluations - 1)) for k in range(evaluations)}
