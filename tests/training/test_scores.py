"""Scores and contrasts from per-document sums, against the formulas written out document by document."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from cadapter.training.scores import contrasts, costs, leans, score_datasets, standard_error

STRENGTHS = [0.0, 1.0, -1.0, 0.5, 2.0, -2.0]


def random_sums(documents: int) -> np.ndarray:
    """[documents, strengths, 5]: Σ nll, Σ correct, Σ KL, Σ agrees, tokens."""
    draw = random.Random(5)
    sums = np.zeros((documents, len(STRENGTHS), 5))
    for document in range(documents):
        tokens = draw.randint(1, 50)
        for k in range(len(STRENGTHS)):
            means = tokens * draw.uniform(2, 4), draw.randint(0, tokens), draw.random(), draw.randint(0, tokens)
            sums[document, k] = *means, tokens
    return sums


def test_scores_are_means_over_documents_of_their_means() -> None:
    names, classes = ["a", "b", "a", "a"], [1, -1, 1, 1]
    sums = random_sums(4)
    scores = score_datasets(sums, STRENGTHS, names, classes, [3, 0, 0, 4])
    assert [(s.dataset, s.strength) for s in scores] == [(d, t) for d in ("a", "b") for t in STRENGTHS]
    for score in scores:
        k = STRENGTHS.index(score.strength)
        mine = [document for document in range(4) if names[document] == score.dataset]
        losses = [sums[d, k, 0] / sums[d, k, 4] for d in mine]
        assert score.loss == pytest.approx(sum(losses) / len(losses))
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        assert score.top1_accuracy == pytest.approx(statistics.mean(sums[d, k, 1] / sums[d, k, 4] for d in mine))
        assert score.kl == pytest.approx(statistics.mean(sums[d, k, 2] / sums[d, k, 4] for d in mine))
        assert (score.documents, score.tokens) == (len(mine), sum(sums[d, k, 4] for d in mine))
        assert score.top1_agreement == pytest.approx(statistics.mean(sums[d, k, 3] / sums[d, k, 4] for d in mine))
        change = [sums[d, k, 0] / sums[d, k, 4] - sums[d, 0, 0] / sums[d, 0, 4] for d in mine]
        assert score.loss_change == pytest.approx(statistics.mean(change))
        assert (score.cut_documents, score.left_out_tokens) == ((2, 7) if score.dataset == "a" else (0, 0))
        if len(mine) > 1:
            assert score.loss_change_se == pytest.approx(statistics.stdev(change) / math.sqrt(len(mine)))
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
            return sums[document, k, 0] / sums[document, k, 4]

        on_negative = [loss(d, plus) - loss(d, minus) for d in (3, 4)]
        on_positive = [loss(d, plus) - loss(d, minus) for d in (0, 1, 2)]
        assert pair.contrast == pytest.approx(statistics.mean(on_negative) - statistics.mean(on_positive))
        variance = statistics.variance(on_negative) / 2 + statistics.variance(on_positive) / 3
        assert pair.contrast_se == pytest.approx(math.sqrt(variance))
        told = sum(d > 0 for d in on_negative) + sum(d < 0 for d in on_positive)
        assert pair.sign_share == pytest.approx(told / 5)


def test_a_tie_counts_half_and_a_single_document_has_no_standard_error() -> None:
    sums = np.ones((2, 3, 5))
    (pair,) = contrasts(sums, [0.0, 1.0, -1.0], [1, -1])
    assert (pair.contrast, pair.sign_share) == (0.0, 0.5)
    assert pair.to_json()["contrast_se"] is None


@pytest.mark.parametrize("classes", [[1, 1], [-1, -1], [0, 1], [0, 0]])
def test_no_contrast_without_both_classes(classes: list[int]) -> None:
    assert contrasts(np.ones((2, 3, 5)), [0.0, 1.0, -1.0], classes) == []


def test_no_contrast_without_a_pair_of_strengths() -> None:
    assert contrasts(np.ones((2, 3, 5)), [0.0, 1.0, -0.5], [1, -1]) == []


def test_standard_error() -> None:
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)


def test_a_contrast_is_made_of_the_leans_of_its_sides() -> None:
    classes, sums = [1, 1, 1, -1, -1, 0], random_sums(6)
    found = {each.strength: each for each in leans(sums, STRENGTHS, classes)}
    assert list(found) == sorted(STRENGTHS)
    assert (found[0.0].lean, found[0.0].lean_se) == (0, 0)
    for pair in contrasts(sums, STRENGTHS, classes):
        plus, minus = pair.strengths
        assert pair.contrast == pytest.approx(found[plus].lean - found[minus].lean)
    k = STRENGTHS.index(0.5)
    change = [sums[d, k, 0] / sums[d, k, 4] - sums[d, 0, 0] / sums[d, 0, 4] for d in range(6)]
    assert found[0.5].lean == pytest.approx(statistics.mean(change[3:5]) - statistics.mean(change[:3]))
    parts = [statistics.variance(part) / len(part) for part in (change[:3], change[3:5])]
    assert found[0.5].lean_se == pytest.approx(math.sqrt(sum(parts)))
    assert leans(sums, STRENGTHS, [1] * 6) == []


def test_the_cost_is_that_of_neutral_documents_where_there_are_some() -> None:
    sums = random_sums(6)
    kl = sums[:, :, 2] / sums[:, :, 4]
    agrees = sums[:, :, 3] / sums[:, :, 4]
    for classes, chosen in (([1, 1, 0, -1, 0, 0], [2, 4, 5]), ([1, 1, 1, -1, -1, -1], list(range(6)))):
        found, on_neutral = costs(sums, STRENGTHS, classes)
        assert on_neutral == (0 in classes)
        assert [each.strength for each in found] == sorted(STRENGTHS)
        for each in found:
            own = kl[chosen, STRENGTHS.index(each.strength)]
            assert each.kl == pytest.approx(own.mean())
            assert each.kl_se == pytest.approx(statistics.stdev(own) / math.sqrt(len(own)))
            assert each.agreement == pytest.approx(agrees[chosen, STRENGTHS.index(each.strength)].mean())


def test_the_two_sides_of_a_pair_are_not_independent() -> None:
    classes, records = [1, -1, 1, -1, 1, -1, 0], [0, 0, 1, 1, 2, 2, 3]
    sums = random_sums(7)
    losses = sums[..., 0] / sums[..., 4]
    for pair in contrasts(sums, STRENGTHS, classes, records):
        plus, minus = (STRENGTHS.index(t) for t in pair.strengths)
        difference = losses[:, plus] - losses[:, minus]
        each = [difference[rejected] - difference[rejected - 1] for rejected in (1, 3, 5)]
        assert pair.contrast == pytest.approx(statistics.mean(each))
        assert pair.contrast_se == pytest.approx(statistics.stdev(each) / math.sqrt(3))
    for lean in leans(sums, STRENGTHS, classes, records):
        change = losses[:, STRENGTHS.index(lean.strength)] - losses[:, 0]
        each = [change[rejected] - change[rejected - 1] for rejected in (1, 3, 5)]
        assert lean.lean_se == pytest.approx(statistics.stdev(each) / math.sqrt(3))


def test_documents_with_records_of_their_own_are_independent() -> None:
    classes = [1, 1, 1, -1, -1, 0]
    sums = random_sums(6)
    assert contrasts(sums, STRENGTHS, classes, range(6)) == contrasts(sums, STRENGTHS, classes)
