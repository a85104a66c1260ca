"""The loss of a micro-batch as the pipeline's last stage computes it, and the sums that are reported from it.

DeepSpeed averages over the G micro-batches and R replicas of a step, so a micro-batch returns

    G·R·( Σ w·nll / N  +  λ₀·Σ_applications Σ_neutral ‖W·Δh‖²/‖Δh‖² / (L·N₀) )

where N (trained tokens of the global batch, each with its class's weight w) and N₀ (neutral positions) are known
from the packed data. A term whose denominator is zero is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cadapter.classes import NEGATIVE, POSITIVE
from cadapter.models.execution import compiled_if
from cadapter.models.layers import HeadInputs
from cadapter.models.loss import LossOperations, compare_rows, scaled, score_products, weighted_cross_entropy

SUMS = ("nll_pos", "nll_neg", "tokens_pos", "tokens_neg", "correct", "neutral", "weighted_nll")
"""What a :class:`TrainingLoss` adds up, in this order."""


@dataclass(frozen=True)
class LossSettings:
    """What weighs what.

    Attributes:
        positive, negative: weight of a class's tokens.
        neutral: λ₀.
        applications: L, how often adapters act on a token in the whole model.
    """

    positive: float = 1.0
    negative: float = 1.0
    neutral: float = 0.0
    applications: int = 1

    def weighted_tokens(self, positive: int, negative: int) -> float:
        """N: the trained tokens of a global batch, each with its class's weight."""
        return self.positive * positive + self.negative * negative


class TrainingLoss:
    """The loss function of training and of its evaluations, and an account of what it saw.

    Args:
        settings: weights.
        averaged_over: G·R, the number of micro-batches that DeepSpeed averages.
        device: of the account.
        compiled: compile what happens to logits and to the gradient.
        required: fail where that cannot be compiled.
    """

    def __init__(
        self,
        settings: LossSettings,
        averaged_over: int,
        device: torch.device,
        compiled: bool = False,
        required: bool = False,
    ) -> None:
        self.settings = settings
        self.averaged_over = averaged_over
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self._operations = LossOperations(
            compiled_if(compiled, score_products, "the loss", required),
            compiled_if(compiled, scaled, "the loss's gradient", required),
        )

    def take_sums(self) -> Tensor:
        """Return what was added up since the last call ([len(SUMS)] float64), and start again at zero."""
        sums = self._sums
        self._sums = torch.zeros_like(sums)
        return sums

    def __call__(self, outputs: HeadInputs, targets: tuple[Tensor, ...]) -> Tensor:
        """``targets``: labels [B, T] int64 and totals [2] float32, (N, N₀) of the global batch."""
        labels, totals = targets
        classes, labels = outputs.codes.flatten(), labels.flatten()
        positive, negative = classes == POSITIVE, classes == NEGATIVE
        weights = positive * self.settings.positive + negative * self.settings.negative
        hidden = outputs.hidden.flatten(0, 1)
        total, tokens = weighted_cross_entropy(
            hidden, outputs.weights[0], labels, weights, outputs.logits, self._operations
        )
        trained = labels >= 0
        neutral = total.new_zeros(()) if outputs.penalty is None else outputs.penalty.squeeze(0)
        with torch.no_grad():
            self._sums += torch.stack(
                [
                    (tokens.nll * positive).sum(),
                    (tokens.nll * negative).sum(),
                    (trained & positive).sum(),
                    (trained & negative).sum(),
                    tokens.correct.sum(),
                    neutral,
                    total,
                ]
            ).double()
        # Denominators of zero belong to sums of zero; 1 stands in for them so that no NaN arises.
        counted, neutral_positions = torch.where(totals > 0, totals, 1.0)
        loss = total / counted
        if outputs.penalty is not None:
            loss = loss + self.settings.neutral * neutral / (self.settings.applications * neutral_positions)
        return self.averaged_over * loss


class ComparisonLoss:
    """Scores documents under several strengths at once: row k of a micro-batch is its document at strength k.

    ``results`` collects, for each micro-batch, (document index, [K, 5] float64: Σ nll, Σ correct, Σ KL,
    Σ agrees, tokens).
    """

    def __init__(self) -> None:
        self.results: list[tuple[int, Tensor]] = []

    def take_results(self) -> list[tuple[int, Tensor]]:
        """Return what was collected since the last call."""
        results, self.results = self.results, []
        return results

    def __call__(self, outputs: HeadInputs, targets: tuple[Tensor, ...]) -> Tensor:
        """``targets``: labels [K, T] int64, alike in every row, and the document's index [1] int64 (−1: filler)."""
        labels, index = targets
        heads = outputs.weights if len(outputs.weights) > 1 else outputs.weights[0]
        scores = compare_rows(outputs.hidden, heads, labels[0], outputs.logits)
        count = (labels >= 0).sum(dim=1)
        sums = [part.double().sum(dim=1) for part in scores]
        self.results.append((int(index), torch.stack([*sums, count.double()], dim=1).cpu()))
        return outputs.hidden.new_zeros((), dtype=torch.float32)
