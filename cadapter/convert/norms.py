"""How strong and how healthy a control adapter is, layer by layer, and what that means in words."""

from __future__ import annotations

import math
from collections.abc import Callable

from cadapter.adapters.directory import ControlAdapterFiles, layer_ranges
from cadapter.adapters.factors import Symmetric
from cadapter.adapters.guidelines import SMALLEST_SIGMA, frobenius_limit
from cadapter.algebra import SINGULAR, Health, health, neumann_remainder, orthogonality_error


def measure(adapter: ControlAdapterFiles, advance: Callable[[int], None] = lambda layers: None) -> dict[int, Health]:
    """Norms and health of every layer; ``advance`` is called with 1 after each."""
    measured = {}
    for layer, factors in adapter.layers.items():
        measured[layer] = health(factors.A, factors.B, adapter.scale)
        advance(1)
    return measured


def orthogonality(adapter: ControlAdapterFiles) -> dict[int, float]:
    """‖QᵀQ − I‖₂ by layer of a symmetric adapter; empty for the general form."""
    return {
        layer: orthogonality_error(factors.Q)
        for layer, factors in adapter.layers.items()
        if isinstance(factors, Symmetric)
    }


def verdict(adapter: ControlAdapterFiles, measured: dict[int, Health]) -> list[str]:
    """What the numbers mean: a few sentences, the most important first."""
    if all(found.frobenius == 0 for found in measured.values()):
        return ["W = 0 in every layer: the adapter does nothing."]
    sentences = []
    idle = [layer for layer, found in measured.items() if found.frobenius == 0]
    if idle:
        sentences.append(f"W = 0 in layers {layer_ranges(idle)}: they do nothing.")
    judge = _judge_neumann if adapter.inverse == "neumann" else _judge_exact
    return [*judge(adapter, measured), *sentences]


def _judge_exact(adapter: ControlAdapterFiles, measured: dict[int, Health]) -> list[str]:
    worst = min(measured, key=lambda layer: measured[layer].sigma_min)
    sigma = measured[worst].sigma_min
    if sigma <= SINGULAR:
        return [f"I + W of layer {worst} is singular: class −1 and strengths of −1 or less do not exist."]
    least, most = _three_digits(sigma, math.floor), _three_digits(1 / sigma, math.ceil)
    magnifies = f"σ_min(I + W) is at least {least} (layer {worst}), so the inverse magnifies up to {most}×"
    if sigma < SMALLEST_SIGMA:
        return [f"Warning: {magnifies}; above {1 / SMALLEST_SIGMA:g}× it is fragile. Train with a stronger decay."]
    return [f"Healthy: {magnifies}."]


def _three_digits(value: float, towards: Callable[[float], int]) -> str:
    """``value`` > 0 with three significant digits, none of them past it: ``towards`` is math.floor or math.ceil."""
    digits = 2 - math.floor(math.log10(value))
    # Rounded far beyond these first: 20 must not become 20.1 for what a float adds in its last place.
    return f"{towards(round(value * 10**digits, 6)) / 10**digits:.3g}"


def _judge_neumann(adapter: ControlAdapterFiles, measured: dict[int, Health]) -> list[str]:
    order, limit = adapter.neumann_order, frobenius_limit(adapter.rank)
    diverging = [layer for layer, found in measured.items() if found.radius >= 1]
    if diverging:
        return [f"Warning: the Neumann series diverges in layers {layer_ranges(diverging)} (ρ(W) ≥ 1)."]
    left_out = max(neumann_remainder(f.A, f.B, adapter.scale, order) for f in adapter.layers.values())
    leaves = f"order {order} leaves out at most {left_out:.2g} of the inverse (spectral norm)"
    above = [layer for layer, found in measured.items() if found.frobenius > limit]
    if above:
        return [
            f"Warning: ‖W‖_F exceeds the guideline 0.25·√r = {limit:.3g} in layers {layer_ranges(above)}; {leaves}. "
            "Train with a stronger decay."
        ]
    return [f"Healthy: ‖W‖_F is within the guideline 0.25·√r = {limit:.3g} in every layer; {leaves}."]
