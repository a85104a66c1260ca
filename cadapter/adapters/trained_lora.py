"""The LoRA pairs of one pipeline stage as the trainer sees them: parameters, decay, norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cadapter.adapters.lora import LoraBlock, LoraSettings, Pair
from cadapter.adapters.trained import Norms
from cadapter.algebra import decay_, largest_eigenvalue

NUMBERS_AT_ONCE = 1 << 26
"""Pairs of one shape are copied together and decayed at once, up to so many numbers (256 MiB)."""


class TrainedLora:
    """The pairs of this stage, and where their numbers stand among those of the whole model.

    Args:
        blocks: this stage's.
        settings: of all pairs.
        names: of all pairs of the model, in order (``ModelTargets.pair_names``).
        decay: λ of the composite decay. Factors in bfloat16 are not decayed: a step is lost in their rounding.
        device: of the stage.
    """

    copies: frozenset[str] = frozenset()

    def __init__(
        self,
        blocks: Sequence[LoraBlock],
        settings: LoraSettings,
        names: Sequence[str],
        decay: float,
        device: torch.device,
    ) -> None:
        self.pairs = {f"layers.{block.layer}.{name}": pair for block in blocks for name, pair in block.pairs().items()}
        self.settings = settings
        self.names = list(names)
        self.decay = decay if settings.dtype == torch.float32 else 0.0
        self.device = device
        row = {name: number for number, name in enumerate(names)}
        self._groups = [
            (torch.tensor([row[name] for name in group], device=device), [self.pairs[name] for name in group])
            for group in _of_one_shape(self.pairs)
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this stage by name, such as ``layers.3.self_attn.q_proj.lora_A``."""
        named: dict[str, nn.Parameter] = {}
        for name, pair in self.pairs.items():
            named[f"{name}.lora_A"] = pair.A
            named[f"{name}.lora_B"] = pair.B
        return named

    @torch.no_grad()
    def after_step(self, lr: float) -> Tensor:
        """Decay every pair of the stage with this step's learning rate, and return their norms.

        Of experts, each is a pair of its own; the norms are those of the expert where they are largest.

        Returns:
            [pairs of the model, 4] float64: ‖W‖_F after the decay, ‖W‖₂ after it, ‖W‖_F before it, and whether the
            decay's bound acted. ‖W‖₂ is at most a factor ``(√r·‖s·A‖₂²·‖B‖₂²/‖W‖₂²)^(1/4096)`` too large: 0.3 %
            where the quotient of norms is 10,000. Rows of other stages' pairs are zero, so that a sum over the
            stages is complete. Nothing here waits for the device.
        """
        report = torch.zeros(len(self.names), 4, dtype=torch.float64, device=self.device)
        for rows, pairs in self._groups:
            report[rows] = self._decay(pairs, lr)
        return report

    def _decay(self, pairs: Sequence[Pair], lr: float) -> Tensor:
        """The rows of pairs of one shape, which are decayed."""
        views = [pair.by_expert() for pair in pairs]
        A = torch.stack([A for A, _ in views]).float()  # [pairs, E, r, in]
        B = torch.stack([B for _, B in views]).float()  # [pairs, E, out, r]
        scale = self.settings.scale
        before, bounded = None, A.new_zeros(len(pairs), dtype=torch.float64)
        if self.decay * lr > 0:  # not in a skipped step: what is not finite times nothing would be NaN
            coefficient, gram_A, gram_B = decay_(A, B, scale, lr * self.decay)
            before = _frobenius(gram_A, gram_B, scale)
            bounded = (coefficient < lr * self.decay * scale**2 * (1 - 1e-6)).any(dim=1).double()
            torch._foreach_copy_(
                [view for pair in views for view in pair], [new for pair in zip(A, B, strict=True) for new in pair]
            )
        gram_A, gram_B = A @ A.mT, B.mT @ B
        after = _frobenius(gram_A, gram_B, scale)
        spectral = scale * largest_eigenvalue(gram_A.double() @ gram_B.double()).sqrt().amax(dim=1)
        return torch.stack([after, spectral, after if before is None else before, bounded], dim=1)

    def norms(self, report: Tensor) -> Norms:
        """The norms of all pairs, from the sum of what :meth:`after_step` returned on every stage."""
        frobenius, spectral, before, bounded = report.unbind(dim=1)
        return Norms(frobenius, spectral, before - frobenius, bounded=int(bounded.sum()))


def _frobenius(gram_A: Tensor, gram_B: Tensor, scale: float) -> Tensor:
    """‖W‖_F = s·√tr(BᵀB·AAᵀ) of the largest expert: [pairs, E, r, r] twice → [pairs] float64."""
    squares = (gram_A.double() * gram_B.double()).sum(dim=(-2, -1))
    return scale * squares.clamp_min(0).sqrt().amax(dim=1)


def _of_one_shape(pairs: Mapping[str, Pair]) -> Iterator[list[str]]:
    """The names of pairs in groups of one shape, each of which is small enough to be copied."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, pair in pairs.items():
        by_shape.setdefault((pair.A.shape, pair.B.shape), []).append(name)
    for (A, B), names in by_shape.items():
        at_once = max(1, NUMBERS_AT_ONCE // (A.numel() + B.numel()))
        for start in range(0, len(names), at_once):
            yield names[start : start + at_once]
