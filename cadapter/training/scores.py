"""From per-document sums to what ``eval`` reports: means with standard errors over documents, contrast and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cadapter.classes import NEGATIVE, NEUTRAL, POSITIVE

NLL, CORRECT, KL, AGREES, TOKENS = range(5)
"""Columns of the sums."""


@dataclass(frozen=True)
class Score:
    """One dataset at one strength; means over documents of each document's mean per token, in nats.

    ``strength`` 0 is the base model. ``…_se`` is a standard error over documents (NaN for a single one); that of the
    perplexity, e^loss, is perplexity · loss_se. ``loss_change`` is the mean over documents of loss minus the base's
    loss of the same document. ``top1_agreement`` is the share of tokens where base and adapted model find the same
    token most probable. ``cut_documents`` were longer than a sequence; ``left_out_tokens`` of theirs are not scored.
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
    perplexity_se: float
    kl_se: float
    loss_change: float
    loss_change_se: float
    top1_agreement: float
    cut_documents: int
    left_out_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As in ``--json``."""
        return without_nan(asdict(self))


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
        return without_nan({**asdict(self), "strengths": list(self.strengths)})


@dataclass(frozen=True)
class Lean:
    """How far one strength turns the model from the texts of class −1 towards those of class +1.

    ``lean`` = [loss(−1 | t) − loss(−1 | 0)] − [loss(+1 | t) − loss(+1 | 0)], with losses as of :class:`Contrast`, which
    is lean(t) − lean(−t). Positive: it favours class +1.
    """

    strength: float
    lean: float
    lean_se: float


@dataclass(frozen=True)
class Cost:
    """What a strength does to texts that it should leave alone: KL(base ‖ adapted), nats a token, mean over documents.

    ``agreement`` is the share of tokens where the base finds the same token most probable.
    """

    strength: float
    kl: float
    kl_se: float
    agreement: float


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as JSON can hold it: what is not a number becomes null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of ``values``; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def score_datasets(
    sums: np.ndarray,
    strengths: Sequence[float],
    datasets: Sequence[str],
    classes: Sequence[int],
    left_out: Sequence[int],
) -> list[Score]:
    """Return a score for each dataset and strength, datasets in order of appearance.

    Args:
        sums: [documents, strengths, 5]: Σ nll, Σ correct, Σ KL(base ‖ strength), Σ agrees and tokens of each document.
        strengths: of the second axis; the first is 0, the base.
        datasets, classes: of each document.
        left_out: tokens of each document that a cut took away.
    """
    cut = np.asarray(left_out, np.int64)
    scores = []
    means = sums[..., :TOKENS] / sums[..., TOKENS:]
    for key in dict.fromkeys(zip(datasets, classes, strict=True)):
        of_dataset = np.array([each == key for each in zip(datasets, classes, strict=True)])
        for k, strength in enumerate(strengths):
            part = means[of_dataset, k]
            loss, loss_se = float(part[:, NLL].mean()), standard_error(part[:, NLL])
            change = part[:, NLL] - means[of_dataset, 0, NLL]
            scores.append(
                Score(
                    dataset=key[0],
                    control_class=key[1],
                    strength=float(strength),
                    loss=loss,
                    loss_se=loss_se,
                    perplexity=math.exp(loss),
                    top1_accuracy=float(part[:, CORRECT].mean()),
                    kl=float(part[:, KL].mean()),
                    documents=int(of_dataset.sum()),
                    tokens=int(sums[of_dataset, k, TOKENS].sum()),
                    perplexity_se=math.exp(loss) * loss_se,
                    kl_se=standard_error(part[:, KL]),
                    loss_change=float(change.mean()),
                    loss_change_se=standard_error(change),
                    top1_agreement=float(part[:, AGREES].mean()),
                    cut_documents=int((cut[of_dataset] > 0).sum()),
                    left_out_tokens=int(cut[of_dataset].sum()),
                )
            )
    return scores


def contrasts(
    sums: np.ndarray, strengths: Sequence[float], classes: Sequence[int], records: Sequence[int] | None = None
) -> list[Contrast]:
    """Return the contrast of each pair ±t among ``strengths``, where documents of both classes are there.

    ``records``: the number of each document's record, shared by the two of a preference pair; None: each has its own.
    """
    losses, positive, negative = _losses(sums, classes)
    if not positive.any() or not negative.any():
        return []
    found = []
    for t in sorted({strength for strength in strengths if strength > 0 and -strength in strengths}):
        difference = losses[:, list(strengths).index(t)] - losses[:, list(strengths).index(-t)]
        told = np.concatenate([-difference[positive], difference[negative]])
        share = float((told > 0).mean() + 0.5 * (told == 0).mean())
        found.append(Contrast((float(t), float(-t)), *_apart(difference, positive, negative, records), share))
    return found


def leans(
    sums: np.ndarray, strengths: Sequence[float], classes: Sequence[int], records: Sequence[int] | None = None
) -> list[Lean]:
    """Return the lean of each strength, in rising order, where documents of both classes are there.

    ``records`` as of :func:`contrasts`.
    """
    losses, positive, negative = _losses(sums, classes)
    if not positive.any() or not negative.any():
        return []
    changes = {t: losses[:, list(strengths).index(t)] - losses[:, 0] for t in sorted(strengths)}
    return [Lean(float(t), *_apart(change, positive, negative, records)) for t, change in changes.items()]


def _losses(sums: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean losses [documents, strengths], and which documents [documents] are of class +1 and of class −1."""
    kinds = np.asarray(classes)
    return sums[..., NLL] / sums[..., TOKENS], kinds == POSITIVE, kinds == NEGATIVE


def _apart(
    difference: np.ndarray, positive: np.ndarray, negative: np.ndarray, records: Sequence[int] | None
) -> tuple[float, float]:
    """How much more ``difference`` [documents] is for class −1 than for class +1, and its standard error.

    With x the difference of a document and x̄ and n of its class, the error is the root of the sum over records of
    (Σ over the record's documents of ±(x − x̄) / √(n(n − 1)))², + for class −1. That is se₊² + se₋² where each document
    is a record of its own, and the error of the mean of n differences where the documents are n pairs.
    """
    apart = float(difference[negative].mean() - difference[positive].mean())
    shares = np.zeros(len(difference))
    for part, sign in ((positive, -1), (negative, 1)):
        n = int(part.sum())
        if n < 2:
            return apart, math.nan
        shares[part] = sign * (difference[part] - difference[part].mean()) / math.sqrt(n * (n - 1))
    return apart, float(np.linalg.norm(shares if records is None else np.bincount(records, weights=shares)))


def costs(sums: np.ndarray, strengths: Sequence[float], classes: Sequence[int]) -> tuple[list[Cost], bool]:
    """Return the cost of each strength, in rising order, and whether it was measured on neutral documents.

    These are those of class 0; where there is none, all documents stand in for them.
    """
    neutral = np.asarray(classes) == NEUTRAL
    chosen = sums[neutral] if neutral.any() else sums
    means = chosen[..., :TOKENS] / chosen[..., TOKENS:]
    found = []
    for t in sorted(strengths):
        part = means[:, list(strengths).index(t)]
        kl, agreement = float(part[:, KL].mean()), float(part[:, AGREES].mean())
        found.append(Cost(float(t), kl, standard_error(part[:, KL]), agreement))
    return found, bool(neutral.any())
