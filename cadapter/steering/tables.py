"""A steering report on the terminal: tables of at most 80 columns, and sentences."""

from __future__ import annotations

import math

from cadapter.steering.report import Report
from cadapter.terminal import result, table
from cadapter.training.scores import Score


def show(report: Report) -> None:
    """Print what the numbers are, then what they mean."""
    evaluation = report.evaluation
    for place, (dataset, control_class) in enumerate(
        dict.fromkeys((score.dataset, score.control_class) for score in evaluation.scores)
    ):
        scores = [each for each in evaluation.scores if (each.dataset, each.control_class) == (dataset, control_class)]
        _show_dataset("" if place else "Loss by dataset and strength\n\n", scores)
    if report.steers:
        _show_strengths(report)
    for pair in evaluation.contrasts:
        result(
            f"Contrast at ±{pair.strengths[0]:g}: {with_error(pair.contrast, pair.contrast_se)} nats per token; "
            f"{100 * pair.sign_share:.1f} % of documents are told by their lower loss (chance: 50 %)."
        )
    for sentence in (*report.remarks, *(report.choice.words if report.choice else ())):
        result(sentence)


def with_error(value: float, error: float, digits: int = 4) -> str:
    """A mean with its standard error, which a single document does not have."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if math.isnan(error) else f"{value:.{digits}f} ± {error:.{digits}f}"


def dial(strength: float) -> str:
    """A strength as it is shown."""
    return f"{strength:+g}" if strength else "base"


def class_word(control_class: int) -> str:
    """A class as it is shown."""
    return f"{control_class:+d}" if control_class else "0"


def true_minus(number: str) -> str:
    """A number as it is printed where there is a minus sign."""
    return number.replace("-", "\N{MINUS SIGN}")


def _show_dataset(heading: str, scores: list[Score]) -> None:
    first = scores[0]
    heading += (
        f"{first.dataset}: class {class_word(first.control_class)}, {first.documents:,} documents, "
        f"{first.tokens:,} tokens scored"
    )
    digits = 3 if max(score.perplexity for score in scores) < 100 else 1
    rows = [
        [
            dial(score.strength),
            with_error(score.loss, score.loss_se),
            with_error(score.perplexity, score.perplexity_se, digits),
            f"{100 * score.top1_accuracy:.2f} %",
            f"{100 * score.top1_agreement:.1f} %",
            f"{score.kl:.5f}",
        ]
        for score in sorted(scores, key=lambda each: each.strength)
    ]
    table(heading, ["strength", "loss, nats", "perplexity", "top-1", "as base", "KL"], rows, align="r" * 6)


def _show_strengths(report: Report) -> None:
    """One line a strength: how far it turns the model, and what that costs."""
    evaluation, sampled = report.evaluation, report.sampled
    columns, rows = ["strength"], [[dial(t)] for t in evaluation.strengths]
    if evaluation.leans:
        columns.append("leans to +1")
        for row, lean in zip(rows, evaluation.leans, strict=True):
            row.append(with_error(lean.lean, lean.lean_se) if lean.strength else "0")
    columns += ["KL, neutral" if evaluation.on_neutral else "KL, all", "as base"]
    for row, cost in zip(rows, evaluation.costs, strict=True):
        row += [f"{cost.kl:.5f}", f"{100 * cost.agreement:.1f} %"]
    if sampled is not None:
        columns += ["repeated", "ended"]
        for row, t in zip(rows, evaluation.strengths, strict=True):
            mean, _ = sampled.repetition(t)
            row += ["-" if math.isnan(mean) else f"{100 * mean:.1f} %", f"{100 * sampled.eos_rate(t):.0f} %"]
    footer = ""
    if sampled is not None:
        footer = (
            f"repeated, ended: of {len(sampled.prompts)} texts of at most {sampled.new_tokens} tokens a strength; the "
            f"documents themselves repeat {100 * sampled.documents_repetition:.1f} %.\n"
        )
    table("What each strength does", columns, rows, align="r" * len(columns), footer=footer)
