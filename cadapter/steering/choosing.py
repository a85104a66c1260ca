"""Which strength to use: that of the largest contrast whose cost stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cadapter.training.scores import Contrast, Cost, Lean

KL_BUDGET = 0.1
"""KL(base ‖ adapted) in nats per token on neutral text. By Pinsker's inequality at most √(0.1 / 2) = 22 % of the
probability of the next token moves, on average."""
CLEAR = 2.0
"""How many standard errors above zero a contrast must be to count as one."""


@dataclass(frozen=True)
class Choice:
    """What was chosen within ``budget``, and in words why.

    Attributes:
        pair: of the strengths ±t within the budget, those with the largest contrast; None: no such pair.
        cost: the larger KL of the two.
        enhance, suppress: the same for each side alone, by its lean.
    """

    budget: float
    pair: Contrast | None
    cost: float
    enhance: float | None
    suppress: float | None
    words: tuple[str, ...]


def choose(
    contrasts: Sequence[Contrast],
    leans: Sequence[Lean],
    costs: Sequence[Cost],
    budget: float,
    single: Sequence[int] = (),
) -> Choice | None:
    """Return the best pair of strengths and the best of each side; None where there are not both classes.

    A contrast or lean that is less than two standard errors from zero, or whose standard error is not known, is none. A
    pair costs what the dearer of its strengths costs. ``single``: the classes of which there is one document only.
    """
    if not leans:
        return None
    kl = {cost.strength: cost.kl for cost in costs}
    dearest = {pair: max(kl[t] for t in pair.strengths) for pair in contrasts}
    allowed = [pair for pair in contrasts if dearest[pair] <= budget]
    clear = [pair for pair in allowed if _is_clear(pair.contrast, pair.contrast_se)]
    best = max(clear, key=lambda pair: pair.contrast, default=None)
    enhance, suppress = (_best_side(leans, kl, budget, sign) for sign in (1, -1))
    cost = math.nan if best is None else dearest[best]
    if best is not None:
        words = [*_praise(best, cost, budget), *_further(best, contrasts)]
        sides = [(enhance, "enhance"), (suppress, "suppress")]
        if any(t not in best.strengths for t, _ in sides):
            named = [f"{t:+g} to {verb}" for t, verb in sides if t is not None]
            words.append(f"Each side by itself within the budget: {', '.join(named)}.")
    else:
        words = [_no_error(single) if single else _why_none(contrasts, allowed, dearest, budget, enhance, suppress)]
    return Choice(budget, best, cost, enhance, suppress, tuple(words))


def _is_clear(value: float, error: float) -> bool:
    return value > CLEAR * error  # which no value is whose error is NaN, not known


def _best_side(leans: Sequence[Lean], kl: dict[float, float], budget: float, sign: int) -> float | None:
    clear = [
        each
        for each in leans
        if sign * each.strength > 0 and kl[each.strength] <= budget and _is_clear(sign * each.lean, each.lean_se)
    ]
    best = max(clear, key=lambda each: sign * each.lean, default=None)
    return None if best is None else best.strength


def _praise(best: Contrast, cost: float, budget: float) -> list[str]:
    return [
        f"Best within the KL budget: strength ±{best.strengths[0]:g}.",
        f"Its contrast is {best.contrast:.4f} ± {best.contrast_se:.4f} nats per token, its KL {cost:.4f} of "
        f"{budget:g}.",
    ]


def _further(best: Contrast, contrasts: Sequence[Contrast]) -> list[str]:
    t = best.strengths[0]
    if len(contrasts) < 2 or t < max(pair.strengths[0] for pair in contrasts):
        return []
    return [f"It is the largest strength tried; more may be better: --strength {-2 * t:g}:{2 * t:g}:{t / 2:g}"]


def _no_error(single: Sequence[int]) -> str:
    named = " and ".join(f"one document of class {'+1' if each > 0 else '−1'}" for each in single)
    return (
        f"There is {named}: no standard error, without which no strength is named. Score more documents: a larger "
        "eval_fraction in training, or --data FILE:CLASS."
    )


def _why_none(
    contrasts: Sequence[Contrast],
    allowed: Sequence[Contrast],
    dearest: dict[Contrast, float],
    budget: float,
    enhance: float | None,
    suppress: float | None,
) -> str:
    alone = [f"{t:+g} to {verb}" for t, verb in ((enhance, "enhance"), (suppress, "suppress")) if t is not None]
    one_side = f" One side alone: {', '.join(alone)}." if alone else ""
    if not contrasts:
        return f"No pair of strengths ±t was compared.{one_side}"
    if allowed:
        return f"No contrast within the KL budget of {budget:g} is {CLEAR:g} standard errors above zero.{one_side}"
    cheapest = min(contrasts, key=lambda pair: dearest[pair])
    t = cheapest.strengths[0]
    return (
        f"No pair of strengths stays within the KL budget of {budget:g}; ±{t:g} has {dearest[cheapest]:.4f}.{one_side} "
        f"Try smaller ones, --strength {-t:g}:{t:g}:{t / 5:g}, or a larger --kl-budget."
    )
