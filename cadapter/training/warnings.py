"""What in a run's numbers a user should hear of: norms beyond their guideline, classes that pull apart."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

from cadapter.adapters.guidelines import Guideline

CALM = 0.9
"""A guideline that was passed is watched again once the number is back within this share of it."""

BLOCK = 50
"""Without evaluations, the losses of a class are means over this many training steps."""

LONG = {"evaluations": 3, "blocks": 4}
"""For so many in a row one class's loss must rise and the other's fall: each is a comparison with the one before."""


class NormWatch:
    """Says once that a guideline is passed, and again only after the number has been well within it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, guideline: Guideline | None) -> str | None:
        """What is to be said after a step, if anything."""
        if guideline is None:
            return None
        if guideline.holds:
            share = guideline.limit / guideline.value if guideline.is_floor else guideline.value / guideline.limit
            if share <= CALM:
                self._told.clear()
            return None
        if guideline.name in self._told:
            return None
        self._told.add(guideline.name)
        return guideline.exceeded()


class ClassWatch:
    """Says when the loss of one class rises for long while that of the other falls.

    Args:
        evaluated: whether the run has evaluations, whose losses are compared; else means over ``BLOCK`` steps are.
    """

    def __init__(self, evaluated: bool) -> None:
        self._evaluated = evaluated
        self._means: deque[tuple[float, float]] = deque(maxlen=LONG["evaluations" if evaluated else "blocks"] + 1)
        self._block: list[tuple[float, float]] = []

    def after_step(self, positive: float | None, negative: float | None) -> str | None:
        """Look at the losses of a training step; a class without tokens has none."""
        if self._evaluated or not _both_finite(positive, negative):
            return None
        self._block.append((positive, negative))  # type: ignore[arg-type]  # both are numbers
        if len(self._block) < BLOCK:
            return None
        means = [sum(values) / BLOCK for values in zip(*self._block, strict=True)]
        self._block.clear()
        return self._add(means[0], means[1], f"for {BLOCK * LONG['blocks']} steps")

    def after_evaluation(self, positive: float | None, negative: float | None) -> str | None:
        """Look at the losses of an evaluation."""
        if not self._evaluated or not _both_finite(positive, negative):
            return None
        return self._add(positive, negative, f"for {LONG['evaluations']} evaluations")  # type: ignore[arg-type]

    def _add(self, positive: float, negative: float, how_long: str) -> str | None:
        self._means.append((positive, negative))
        if len(self._means) < (self._means.maxlen or 0):
            return None
        first, last = self._means[0], self._means[-1]
        by_class = list(zip(*self._means, strict=True))
        for rising, falling, names in ((0, 1, ("+1", "−1")), (1, 0, ("−1", "+1"))):
            if _is_sorted(by_class[rising], 1) and _is_sorted(by_class[falling], -1):
                self._means.clear()  # said again only after as long again
                return (
                    f"the loss of class {names[0]} has risen {how_long} ({first[rising]:.4f} to {last[rising]:.4f}) "
                    f"while that of class {names[1]} fell ({first[falling]:.4f} to {last[falling]:.4f}): the adapter "
                    f"learns one class at the other's cost. Look at the texts of class {names[0]} and at how many "
                    "there are; class_weights can give them more weight, a smaller lr more balance."
                )
        return None


def _both_finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _is_sorted(values: tuple[float, ...], direction: int) -> bool:
    return all(direction * (after - before) > 0 for before, after in pairwise(values))
