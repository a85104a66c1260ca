"""How large W may become: what ``inspect-norms`` judges by, and what training warns of."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST_SIGMA = 0.1
"""Below this smallest singular value of I + W the exact inverse magnifies by more than 10."""

FROBENIUS_PER_ROOT_RANK = 0.25
"""Guideline of the published method for the Neumann series: ``‖W‖_F ≲ 0.25·√r``."""


def frobenius_limit(rank: int) -> float:
    """0.25·√r."""
    return FROBENIUS_PER_ROOT_RANK * math.sqrt(rank)


@dataclass(frozen=True)
class Guideline:
    """A number of the adapters, that of the layer where it is worst, beside its limit.

    Attributes:
        name: what the number is.
        value: the number.
        limit: what it should not pass.
        layer: where it is worst.
        is_floor: whether it should be at least ``limit``; otherwise at most.
        is_bound: whether ``value`` is only a bound, on the right side of the limit.
    """

    name: str
    value: float
    limit: float
    layer: int
    is_floor: bool = False
    is_bound: bool = False

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; a number that is not finite keeps none."""
        if not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.is_floor else self.value <= self.limit

    def in_words(self) -> str:
        """For example "σ_min(I+W) ≥ 0.82 (at least 0.1)"."""
        sign = ("≥" if self.is_floor else "≤") if self.is_bound else "="
        return f"{self.name} {sign} {self.value:.3g} (at {'least' if self.is_floor else 'most'} {self.limit:.3g})"

    def exceeded(self) -> str:
        """What passed the limit, where, and what to do."""
        side = "below" if self.is_floor else "above"
        return (
            f"{self.name} of layer {self.layer} is {self.value:.3g}, {side} the guideline of {self.limit:.3g}: {REMEDY}"
        )


REMEDY = "W has become too large for its inverse; raise lora_weight_decay (lr·λ near 1e-2), or lower lr."
