"""The curves of a steering report: which numbers are drawn over which, and what stands beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cadapter.algebra import Health
from cadapter.steering.charts import Point, SecondAxis, Series, chart, is_drawn, legend
from cadapter.steering.report import Report
from cadapter.steering.tables import class_word, true_minus
from cadapter.training.scores import Score

STRENGTH, NATS = "strength t", "nats a token"


@dataclass(frozen=True)
class Figure:
    """A chart with its title and what it says."""

    title: str
    caption: str
    svg: str
    legend: str = ""


def curves(report: Report) -> list[Figure]:
    """The curves over strength: contrast and cost first, then losses and agreement."""
    drawn = [_lean(report), _cost(report), _contrast(report), _change(report)]
    drawn += _losses(report)
    drawn.append(_agreement(report))
    return [each for each in drawn if each is not None]


def _beyond(report: Report) -> set[float]:
    """Strengths whose cost exceeds the budget."""
    if report.choice is None:
        return set()
    return {cost.strength for cost in report.evaluation.costs if cost.kl > report.choice.budget}


def _datasets(report: Report) -> list[tuple[str, list[Score]]]:
    """The scores of each dataset, in the order of strengths, under a name that tells its class."""
    groups: dict[tuple[str, int], list[Score]] = {}
    for score in sorted(report.evaluation.scores, key=lambda each: each.strength):
        groups.setdefault((score.dataset, score.control_class), []).append(score)
    order = dict.fromkeys((score.dataset, score.control_class) for score in report.evaluation.scores)
    return [(f"{name} ({true_minus(class_word(class_))})", groups[name, class_]) for name, class_ in order]


def _lean(report: Report) -> Figure | None:
    if not report.evaluation.leans:
        return None
    hollow = _beyond(report)
    points = [
        Point(each.strength, each.lean, each.lean_se if each.strength else math.nan, each.strength in hollow)
        for each in report.evaluation.leans
    ]
    title = "Which class it favours"
    svg = chart(title, [Series("lean", points, 0)], x_label=STRENGTH, y_label=f"lean towards +1, {NATS}")
    return Figure(title, "Above zero it favours texts of class +1, below those of class −1.", svg)


def _contrast(report: Report) -> Figure | None:
    pairs, hollow = report.evaluation.contrasts, _beyond(report)
    if len(pairs) < 2:
        return None
    points = [
        Point(pair.strengths[0], pair.contrast, pair.contrast_se, bool(hollow.intersection(pair.strengths)))
        for pair in pairs
    ]
    told = [Point(pair.strengths[0], pair.sign_share) for pair in pairs]
    title = "Contrast of the pair ±t"
    series = [Series("contrast", points, 0)]
    svg = chart(title, series, x_label="t", y_label=f"contrast, {NATS}", from_zero=True)
    low, high = min(point.y for point in told), max(point.y for point in told)
    share = f"{100 * low:.0f} %" if round(low, 2) == round(high, 2) else f"{100 * low:.0f} to {100 * high:.0f} %"
    return Figure(title, f"How well +t and −t tell the classes apart; {share} of documents are told.", svg)


def _cost(report: Report) -> Figure:
    evaluation = report.evaluation
    hollow = _beyond(report)
    points = [
        Point(each.strength, each.kl, each.kl_se if each.strength else math.nan, each.strength in hollow)
        for each in evaluation.costs
    ]
    limit = None if report.choice is None else (report.choice.budget, f"budget {report.choice.budget:g}")
    where = "neutral text" if evaluation.on_neutral else "all texts"
    title = f"Cost: KL on {where}"
    series = [Series("KL", points, 1)]
    svg = chart(title, series, x_label=STRENGTH, y_label=f"KL(base ‖ adapted), {NATS}", from_zero=True, limit=limit)
    caption = "How far predictions move on text that should stay as it is."
    if limit is not None and not is_drawn(limit, series):
        caption = f"How far predictions move; the budget, {limit[0]:g}, lies far above."
    if not evaluation.on_neutral:
        caption = "There is no neutral text: this holds the wanted effect, too."
    return Figure(title, caption, svg, legend(series, limit) if limit and is_drawn(limit, series) else "")


def _change(report: Report) -> Figure:
    series = [
        Series(
            name,
            [
                Point(each.strength, each.loss_change, each.loss_change_se if each.strength else math.nan)
                for each in scores
            ],
            look,
        )
        for look, (name, scores) in enumerate(_datasets(report))
    ]
    title = "Change of loss from the base"
    svg = chart(title, series, x_label=STRENGTH, y_label=NATS)
    return Figure(
        title, "Document by document; below zero it predicts a text better than the base.", svg, legend(series)
    )


def _losses(report: Report) -> list[Figure]:
    figures = []
    for look, (name, scores) in enumerate(_datasets(report)):
        points = [Point(each.strength, each.loss, each.loss_se) for each in scores]
        title = f"Loss and perplexity: {name}"
        svg = chart(
            title,
            [Series(name, points, look)],
            x_label=STRENGTH,
            y_label=f"loss, {NATS}",
            second=SecondAxis("perplexity", math.exp),
        )
        figures.append(Figure(title, f"{scores[0].documents:,} documents, {scores[0].tokens:,} tokens.", svg))
    return figures


def _agreement(report: Report) -> Figure:
    series = [
        Series(name, [Point(each.strength, each.top1_agreement) for each in scores], look)
        for look, (name, scores) in enumerate(_datasets(report))
    ]
    title = "Agreement with the base"
    svg = chart(title, series, x_label=STRENGTH, y_label="same most probable token", percent=True)
    return Figure(title, "Share of tokens where both find the same token most probable.", svg, legend(series))


def sample_figures(report: Report) -> list[Figure]:
    """What sampled texts are like at each strength."""
    sampled = report.sampled
    if sampled is None:
        return []
    strengths = report.evaluation.strengths
    own = sampled.documents_repetition
    limit = None if math.isnan(own) else (own, f"in the documents themselves: {100 * own:.1f} %")
    figures = []
    for title, caption, name, points, line in (
        (
            "Repetition",
            "Share of a text's 4-grams that occurred in it before, mean over texts.",
            "4-grams repeated",
            [Point(t, *sampled.repetition(t)) for t in strengths],
            limit,
        ),
        (
            "Texts that end",
            f"Share that the model ended itself, within {sampled.new_tokens} tokens.",
            "texts ended",
            [Point(t, sampled.eos_rate(t)) for t in strengths],
            None,
        ),
    ):
        series = [Series(name, points, 3 if line else 4)]
        svg = chart(title, series, x_label=STRENGTH, y_label="share", percent=True, from_zero=True, limit=line)
        figures.append(Figure(title, caption, svg, legend(series, line)))
    return figures


def norm_figures(norms: Mapping[int, Health]) -> list[Figure]:
    """Norms of W, and the smallest singular value of I + W, by layer."""
    sizes = [
        Series(label, [Point(layer, getattr(health, name)) for layer, health in norms.items()], look)
        for look, (label, name) in enumerate((("‖W‖_F", "frobenius"), ("‖W‖₂", "spectral"), ("ρ(W)", "radius")))
    ]
    smallest = [Series("σ_min(I + W)", [Point(layer, health.sigma_min) for layer, health in norms.items()], 3)]
    figures = [
        ("Size of W", "Frobenius norm, spectral norm and spectral radius.", "norm", sizes),
        (
            "Health of the inverse",
            "Smallest singular value of I + W: the inverse magnifies by up to its reciprocal.",
            "singular value",
            smallest,
        ),
    ]
    return [
        Figure(
            title,
            caption,
            chart(f"{title} by layer", series, x_label="layer", y_label=label, whole_x=True, from_zero=True),
            legend(series),
        )
        for title, caption, label, series in figures
    ]
