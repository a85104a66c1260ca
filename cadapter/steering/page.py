"""A steering report as one HTML file: nothing is loaded from elsewhere, and no script runs.

Names and texts come from files and from a model; every one of them is escaped, and the page's own policy forbids
scripts and requests besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cadapter.steering.curves import Figure, curves, norm_figures, sample_figures
from cadapter.steering.report import Report
from cadapter.steering.sampling import Sample
from cadapter.steering.style import STYLE
from cadapter.steering.tables import class_word, dial, true_minus, with_error

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
COLUMNS = 5
"""How many texts stand side by side before the others are folded away."""
PROMPTS_SHOWN = 4

GLOSSARY = (
    ("strength t", "(I + W)^t acts on what each adapted block writes: 1 as trained, −1 its exact inverse, 0 the base."),
    (
        "loss, perplexity",
        "Mean negative log-likelihood a token in nats, and e to it; means over documents, each scored alone, with "
        "standard errors over documents.",
    ),
    (
        "change of loss",
        "Loss minus the base's loss of the same document: differences between documents drop out, so its error bars "
        "are much shorter.",
    ),
    (
        "lean",
        "How much more a strength costs texts of class −1 than those of class +1, each against the base. Above zero it "
        "favours class +1.",
    ),
    ("contrast of ±t", "Lean at +t minus lean at −t: how well the pair tells the classes apart."),
    (
        "KL",
        "KL(base ‖ adapted) in nats a token: how far the distribution of the next token moves. On neutral text it is "
        "the price of a strength.",
    ),
    ("agrees with the base", "Share of tokens where both find the same token most probable."),
    ("repeated", "Share of a text's 4-grams that occurred in it before."),
    ("ended", "Share of texts that the model ended by itself."),
)


def page(report: Report) -> str:
    """Return the report as HTML."""
    title = f"Steering report: {report.subject}"
    body = [
        _header(report),
        _section("Curves", _lead(report), _cards(curves(report))),
        _samples(report),
        _norms(report),
        _section("All numbers", "", _numbers(report)),
        _section("How to read this", "", _glossary()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>Written by <code>cadapter eval {escape(str(report.config))} --html</code>.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _section(heading: str, lead: str, content: str) -> str:
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{lead}{content}</section>"


def _lead(report: Report) -> str:
    if report.choice is None:
        return "Every value is a mean over documents; bars are one standard error."
    return (
        "The adapter at each strength, against the base at 0. Every value is a mean over documents; bars are one "
        "standard error. Rings mark strengths beyond the KL budget."
    )


# ---- the top --------------------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    facts = [f"on {report.base}"]
    if report.adapter is not None:
        adapter = report.adapter
        facts += [
            f"rank {adapter.rank}",
            f"{adapter.form} form",
            f"site {adapter.site}",
            f"{len(adapter.layers)} layers",
            f"trained with the {'exact inverse' if adapter.inverse == 'exact' else 'Neumann series'}",
        ]
    documents = len(report.evaluation.documents)
    facts.append(f"{documents:,} documents")
    remarks = "".join(f"<li>{escape(each)}</li>" for each in (*report.evaluation.notes, *report.remarks))
    return (
        f'<header><p class="over">Steering report</p><h1>{escape(str(report.subject))}</h1>'
        f'<p class="facts">{escape(" · ".join(facts))}</p>{_verdict(report)}{_tiles(report)}'
        + (f'<ul class="remarks">{remarks}</ul>' if remarks else "")
        + "</header>"
    )


def _verdict(report: Report) -> str:
    if report.choice is None:
        return ""
    sentences = "".join(f"<p>{escape(each)}</p>" for each in report.choice.words)
    return f'<div class="verdict">{sentences}</div>'


def _tiles(report: Report) -> str:
    choice = report.choice
    if choice is None or choice.pair is None:
        return ""
    pair, t = choice.pair, choice.pair.strengths[0]
    where = "neutral text" if report.evaluation.on_neutral else "all texts"
    error = "" if math.isnan(pair.contrast_se) else f" <small>± {pair.contrast_se:.4f}</small>"
    tiles = [
        (f"±{t:g}", "best strength within the budget"),
        (f"{pair.contrast:.4f}{error}", "contrast, nats a token"),
        (f"{100 * pair.sign_share:.0f} %", "of documents told apart (chance: 50 %)"),
        (f"{choice.cost:.4f} <small>of {choice.budget:g}</small>", f"KL on {where}, nats a token"),
    ]
    if report.sampled is not None:
        repeated = max(report.sampled.repetition(s)[0] for s in pair.strengths)
        base, _ = report.sampled.repetition(0.0) if 0.0 in report.sampled.samples else (math.nan, math.nan)
        if not math.isnan(repeated):
            beside = "" if math.isnan(base) else f" <small>base {100 * base:.1f} %</small>"
            tiles.append((f"{100 * repeated:.1f} %{beside}", f"of 4-grams repeated at ±{t:g}"))
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{shown}</div>'


def _cards(figures: Sequence[Figure]) -> str:
    cards = [
        f'<figure class="card"><h3>{escape(each.title)}</h3><p class="caption">{escape(each.caption)}</p>'
        f"{each.svg}{each.legend}</figure>"
        for each in figures
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _norms(report: Report) -> str:
    if not report.norms:
        return ""
    return _section("The adapter by layer", " ".join(report.verdict), _cards(norm_figures(report.norms)))


# ---- sampled texts --------------------------------------------------------------------------------------------------


def _samples(report: Report) -> str:
    sampled = report.sampled
    if sampled is None:
        return ""
    strengths = report.evaluation.strengths
    first = _side_by_side(report)
    others = [t for t in strengths if t not in first]
    blocks = [_prompt_block(report, number, first, others) for number in range(len(sampled.prompts))]
    folded = "".join(blocks[PROMPTS_SHOWN:])
    if folded:
        count = len(blocks) - PROMPTS_SHOWN
        folded = f"<details><summary>{count} more prompts</summary>{folded}</details>"
    drawn = f"drawn at temperature {sampled.temperature:g} from the same random numbers at every strength"
    lead = (
        f"The beginnings of {len(sampled.prompts)} scored documents, continued by up to {sampled.new_tokens} tokens, "
        f"{drawn if sampled.temperature else 'the most probable one each time'}."
    )
    cards = _cards(sample_figures(report))
    return _section("Samples side by side", lead, cards + "".join(blocks[:PROMPTS_SHOWN]) + folded)


def _best(report: Report) -> Sequence[float]:
    """The best pair of strengths, if there is one."""
    return () if report.choice is None or report.choice.pair is None else report.choice.pair.strengths


def _side_by_side(report: Report) -> list[float]:
    """The strengths whose texts are seen at once: the base, the best, 1 and −1, and the outermost."""
    strengths = report.evaluation.strengths
    wanted = [0.0, *_best(report), 1.0, -1.0, strengths[-1], strengths[0], *strengths]
    return sorted([t for t in dict.fromkeys(wanted) if t in strengths][:COLUMNS])


def _prompt_block(report: Report, number: int, first: Sequence[float], others: Sequence[float]) -> str:
    sampled = report.sampled
    assert sampled is not None
    prompt, dataset, control_class = sampled.prompts[number]
    best = _best(report)

    def texts(strengths: Sequence[float]) -> str:
        columns = "".join(_text(t, sampled.samples[t][number], t in best) for t in strengths)
        return f'<div class="scroll"><div class="texts">{columns}</div></div>'

    more = f"<details><summary>other strengths</summary>{texts(others)}</details>" if others else ""
    return (
        f'<article class="card sample"><p class="tag">{escape(dataset)}, class {_class(control_class)}</p>'
        f'<p class="prompt">{escape(" ".join(prompt.split()))}</p>{texts(first)}{more}</article>'
    )


def _text(strength: float, sample: Sample, is_best: bool) -> str:
    after = [f"ended after {sample.tokens} tokens" if sample.ended else f"{sample.tokens} tokens"]
    if sample.repetition > 0:
        after.append(f"{100 * sample.repetition:.0f} % repeated")
    mark = " <small>best</small>" if is_best else ""
    text = escape(sample.text.strip()) or "<i>ends at once</i>"
    return (
        f'<div><p class="dial">{_dial(strength)}{mark}</p><p class="text">{text}</p>'
        f'<p class="after">{escape(", ".join(after))}</p></div>'
    )


def _dial(strength: float) -> str:
    return true_minus(dial(strength))


def _class(control_class: int) -> str:
    return true_minus(class_word(control_class))


# ---- tables ---------------------------------------------------------------------------------------------------------


def _numbers(report: Report) -> str:
    evaluation = report.evaluation
    best = _best(report)
    parts = []
    for dataset, control_class in dict.fromkeys((each.dataset, each.control_class) for each in evaluation.scores):
        scores = [each for each in evaluation.scores if (each.dataset, each.control_class) == (dataset, control_class)]
        rows = [
            (
                score.strength,
                [
                    with_error(score.loss, score.loss_se),
                    with_error(score.loss_change, score.loss_change_se, 5) if score.strength else "0",
                    with_error(score.perplexity, score.perplexity_se, 3),
                    f"{100 * score.top1_accuracy:.2f} %",
                    f"{100 * score.top1_agreement:.2f} %",
                    with_error(score.kl, score.kl_se, 5) if score.strength else "0",
                ],
            )
            for score in sorted(scores, key=lambda each: each.strength)
        ]
        first = scores[0]
        heading = (
            f"{dataset}, class {_class(control_class)}: {first.documents:,} documents, {first.tokens:,} tokens scored"
        )
        columns = ["loss", "change of loss", "perplexity", "top-1 right", "agrees with the base", "KL"]
        parts.append(_table(heading, columns, rows, best))
    if evaluation.contrasts:
        rows = [
            (
                pair.strengths[0],
                [with_error(pair.contrast, pair.contrast_se), f"{100 * pair.sign_share:.1f} %"],
            )
            for pair in evaluation.contrasts
        ]
        parts.append(_table("Pairs of strengths ±t", ["contrast", "documents told apart"], rows, best[:1], "±"))
    return f"<details open><summary>Tables</summary>{''.join(parts)}</details>"


def _table(
    heading: str,
    columns: Sequence[str],
    rows: Sequence[tuple[float, Sequence[str]]],
    best: Sequence[float],
    sign: str = "",
) -> str:
    marked = ' class="best"'
    head = "".join(f"<th>{escape(each)}</th>" for each in ["strength", *columns])
    body = "".join(
        f"<tr{marked if t in best else ''}><td>{f'{sign}{t:g}' if sign else _dial(t)}</td>"
        + "".join(f"<td>{escape(true_minus(cell))}</td>" for cell in cells)
        + "</tr>"
        for t, cells in rows
    )
    return (
        f'<div class="table"><h3>{escape(heading)}</h3><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _glossary() -> str:
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(words)}</dd>" for term, words in GLOSSARY) + "</dl>"
