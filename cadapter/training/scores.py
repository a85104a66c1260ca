"""From per-document sums to what ``eval`` reports: means with standard errors over documents, and the contrast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cadapter.classes import NEGATIVE, POSITIVE

NLL, CORRECT, KL, TOKENS = range(4)
"""Columns of the sums."""


@dataclass(frozen=True)
class Score:
    """One dataset at one strength; means over documents of each document's mean per token, in nats.

    ``strength`` 0 is the base model. ``loss_se`` is the standard error over documents (NaN for a single one).
    """

    dataset: str
    control_class: int
    strength: float
    loss: float
    loss_se: float
    perplexity: float
    top1_accuracy: float
    kl: float
    documents: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As in ``--json``; what is not a number becomes null."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Contrast:
    """How well a pair of strengths ±t tells the classes apart.

    ``contrast`` = [loss(−1 | +t) − loss(−1 | −t)] − [loss(+1 | +t) − loss(+1 | −t)], where loss(c | t) is the mean
    loss of the documents of class c at strength t; ``sign_share`` is the share of documents whose class is told by
    which of +t and −t gives the lower loss (a tie counts half).
    """

    strengths: tuple[float, float]
    contrast: float
    contrast_se: float
    sign_share: float

    def to_json(self) -> dict[str, Any]:
        """As in ``--json``."""
        se = None if math.isnan(self.contrast_se) else self.contrast_se
        return {
            "strengths": list(self.strengths),
            "contrast": self.contrast,
            "contrast_se": se,
            "sign_share": self.sign_share,
        }


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of ``values``; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def score_datasets(
    sums: np.ndarray, strengths: Sequence[float], datasets: Sequence[str], classes: Sequence[int]
) -> list[Score]:
    """Return a score for each dataset and strength, datasets in order of appearance.

    Args:
        sums: [documents, strengths, 4]: Σ nll, Σ correct, Σ KL(base ‖ strength) and tokens of each document.
        strengths: of the second axis; the first is 0, the base.
        datasets, classes: of each document.
    """
    scores = []
    means = sums[..., :TOKENS] / sums[..., TOKENS:]
    for key in dict.fromkeys(zip(datasets, classes, strict=True)):
        of_dataset = np.array([each == key for each in zip(datasets, classes, strict=True)])
        for k, strength in enumerate(strengths):
            part = means[of_dataset, k]
            loss = float(part[:, NLL].mean())
            scores.append(
                Score(
                    dataset=key[0],
                    control_class=key[1],
                    strength=float(strength),
                    loss=loss,
                    loss_se=standard_error(part[:, NLL]),
                    perplexity=math.exp(loss),
                    top1_accuracy=float(part[:, CORRECT].mean()),
                    kl=float(part[:, KL].mean()),
                    documents=int(of_dataset.sum()),
                    tokens=int(sums[of_dataset, k, TOKENS].sum()),
                )
            )
    return scores


def contrasts(sums: np.ndarray, strengths: Sequence[float], classes: Sequence[int]) -> list[Contrast]:
    """Return the contrast of each pair ±t among ``strengths``, where documents of both classes are there."""
    kinds = np.asarray(classes)
    positive, negative = kinds == POSITIVE, kinds == NEGATIVE
    if not positive.any() or not negative.any():
        return []
    losses = sums[..., NLL] / sums[..., TOKENS]
    found = []
    for t in sorted({strength for strength in strengths if strength > 0 and -strength in strengths}):
        difference = losses[:, list(strengths).index(t)] - losses[:, list(strengths).index(-t)]
        errors = [standard_error(difference[part]) for part in (positive, negative)]
        told = np.concatenate([-difference[positive], difference[negative]])
        found.append(
            Contrast(
                strengths=(float(t), float(-t)),
                contrast=float(difference[negative].mean() - difference[positive].mean()),
                contrast_se=math.hypot(*errors),
                sign_share=float((told > 0).mean() + 0.5 * (told == 0).mean()),
            )
        )
    return found
