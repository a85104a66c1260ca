"""Scores and contrasts from per-document sums, against the formulas written out document by document."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from cadapter.training.scores import contrasts, score_datasets, standard_error

STRENGTHS = [0.0, 1.0, -1.0, 0.5, 2.0, -2.0]


def random_sums(documents: int) -> np.ndarray:
    """[documents, strengths, 4]: Σ nll, Σ correct, Σ KL, tokens."""
    draw = random.Random(5)
    sums = np.zeros((documents, len(STRENGTHS), 4))
    for document in range(documents):
        tokens = draw.randint(1, 50)
        for k in range(len(STRENGTHS)):
            sums[document, k] = tokens * draw.uniform(2, 4), draw.randint(0, tokens), draw.random(), tokens
    return sums


def test_scores_are_means_over_documents_of_their_means() -> None:
    names, classes = ["a", "b", "a", "a"], [1, -1, 1, 1]
    sums = random_sums(4)
    scores = score_datasets(sums, STRENGTHS, names, classes)
    assert [(s.dataset, s.strength) for s in scores] == [(d, t) for d in ("a", "b") for t in STRENGTHS]
    for score in scores:
        k = STRENGTHS.index(score.strength)
        mine = [document for document in range(4) if names[document] == score.dataset]
        losses = [sums[d, k, 0] / sums[d, k, 3] for d in mine]
        assert score.loss == pytest.approx(sum(losses) / len(losses))
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        assert score.top1_accuracy == pytest.approx(statistics.mean(sums[d, k, 1] / sums[d, k, 3] for d in mine))
        assert score.kl == pytest.approx(statistics.mean(sums[d, k, 2] / sums[d, k, 3] for d in mine))
        assert (score.documents, score.tokens) == (len(mine), sum(sums[d, k, 3] for d in mine))
        if len(mine) > 1:
            assert score.loss_se == pytest.approx(statistics.stdev(losses) / math.sqrt(len(mine)))
        else:
            assert math.isnan(score.loss_se)
            assert score.to_json()["loss_se"] is None


def test_contrast_is_the_difference_of_differences() -> None:
    classes = [1, 1, 1, -1, -1, 0]
    sums = random_sums(6)
    found = contrasts(sums, STRENGTHS, classes)
    assert [pair.strengths for pair in found] == [(1.0, -1.0), (2.0, -2.0)]
    for pair in found:
        plus, minus = (STRENGTHS.index(t) for t in pair.strengths)

        def loss(document: int, k: int) -> float:
            return sums[document, k, 0] / sums[document, k, 3]

        on_negative = [loss(d, plus) - loss(d, minus) for d in (3, 4)]
        on_positive = [loss(d, plus) - loss(d, minus) for d in (0, 1, 2)]
        assert pair.contrast == pytest.approx(statistics.mean(on_negative) - statistics.mean(on_positive))
        variance = statistics.variance(on_negative) / 2 + statistics.variance(on_positive) / 3
        assert pair.contrast_se == pytest.approx(math.sqrt(variance))
        told = sum(d > 0 for d in on_negative) + sum(d < 0 for d in on_positive)
        assert pair.sign_share == pytest.approx(told / 5)


def test_a_tie_counts_half_and_a_single_document_has_no_standard_error() -> None:
    sums = np.ones((2, 3, 4))
    (pair,) = contrasts(sums, [0.0, 1.0, -1.0], [1, -1])
    assert (pair.contrast, pair.sign_share) == (0.0, 0.5)
    assert pair.to_json()["contrast_se"] is None


@pytest.mark.parametrize("classes", [[1, 1], [-1, -1], [0, 1], [0, 0]])
def test_no_contrast_without_both_classes(classes: list[int]) -> None:
    assert contrasts(np.ones((2, 3, 4)), [0.0, 1.0, -1.0], classes) == []


def test_no_contrast_without_a_pair_of_strengths() -> None:
    assert contrasts(np.ones((2, 3, 4)), [0.0, 1.0, -0.5], [1, -1]) == []


def test_standard_error() -> None:
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
