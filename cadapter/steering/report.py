"""All that a steering report holds, and how ``--json`` spells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cadapter.adapters.directory import ControlAdapterFiles
from cadapter.algebra import Health
from cadapter.classes import NEGATIVE, POSITIVE
from cadapter.data import HeldOutDocument
from cadapter.steering.choosing import Choice
from cadapter.steering.sampling import Sampled
from cadapter.training.evaluation import Evaluation
from cadapter.training.scores import without_nan


@dataclass(frozen=True)
class Report:
    """What ``eval`` found about one adapter, or one model that was trained from a base.

    Attributes:
        choice: None where there are not texts of both classes.
        sampled: None where no text was sampled.
        adapter, norms: of a control adapter: itself, norms by layer, and what they mean.
        remarks: what the reader must know to take the numbers for what they are.
    """

    config: Path
    base: str
    subject: Path
    evaluation: Evaluation
    choice: Choice | None
    sampled: Sampled | None
    adapter: ControlAdapterFiles | None
    norms: Mapping[int, Health]
    verdict: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def steers(self) -> bool:
        """Whether there is more to say of each strength than its losses."""
        return self.choice is not None or self.sampled is not None


def single_classes(documents: Sequence[HeldOutDocument]) -> list[int]:
    """Which of the classes +1 and −1 have one document among ``documents``, of whose mean there is no error."""
    counts = Counter(document.control_class for document in documents)
    return [class_ for class_ in (POSITIVE, NEGATIVE) if counts[class_] == 1]


def remarks_of(evaluation: Evaluation) -> list[str]:
    """What must be said of the texts: what costs are measured on, what was cut, what holds nothing."""
    remarks = []
    if min(evaluation.strengths) < 0 and not evaluation.leans:
        scored = {document.control_class for document in evaluation.documents}
        absent = " and ".join(word for class_, word in ((POSITIVE, "+1"), (NEGATIVE, "−1")) if class_ not in scored)
        remarks.append(f"No contrast: no document of class {absent} was scored.")
    if evaluation.leans and not evaluation.on_neutral:
        remarks.append(
            "There is no neutral text (class 0, or --neutral FILE): the KL that counts against the budget is that of "
            "all texts above, on which the adapter is meant to differ from the base."
        )
    cut = [document.left_out for document in evaluation.documents if document.left_out]
    if cut:
        whole = sum(len(document.ids) for document in evaluation.documents) + sum(cut)
        remarks.append(
            f"{len(cut):,} of {len(evaluation.documents):,} documents {'is' if len(cut) == 1 else 'are'} longer than a "
            f"sequence (sequence_len) and cut: {sum(cut):,} of {whole:,} tokens are not scored."
        )
    if evaluation.skipped:
        remarks.append(f"Left out, since they hold no token to score: {evaluation.skipped:,} documents.")
    return remarks


def as_json(report: Report) -> list[dict[str, Any]]:
    """The records of ``--json``: datasets by strength, pairs of strengths, strengths, the choice, and layers."""
    evaluation = report.evaluation
    records = [score.to_json() for score in evaluation.scores] + [pair.to_json() for pair in evaluation.contrasts]
    if report.steers:
        records += [_strength(report, number) for number in range(len(evaluation.strengths))]
    if report.choice is not None:
        pair = report.choice.pair
        records.append(
            {
                "kl_budget": report.choice.budget,
                "best_strength": None if pair is None else pair.strengths[0],
                "best_enhancing": report.choice.enhance,
                "best_suppressing": report.choice.suppress,
                "words": list(report.choice.words),
            }
        )
    for layer, health in report.norms.items():
        numbers = {name: value for name, value in asdict(health).items() if name != "singular_values"}
        records.append(without_nan({"layer": layer, **numbers}))
    return records


def _strength(report: Report, number: int) -> dict[str, Any]:
    evaluation, sampled = report.evaluation, report.sampled
    cost = evaluation.costs[number]
    record: dict[str, Any] = {
        "steering_at": cost.strength,  # "strength" tells the records of datasets
        "cost_kl": cost.kl,
        "cost_kl_se": cost.kl_se,
        "cost_agreement": cost.agreement,
        "cost_on": "neutral" if evaluation.on_neutral else "all",
    }
    if evaluation.leans:
        lean = evaluation.leans[number]
        record |= {"lean": lean.lean, "lean_se": lean.lean_se}
    if sampled is not None:
        mean, error = sampled.repetition(cost.strength)
        texts = [
            without_nan({"prompt": prompt, "dataset_of_prompt": dataset, **asdict(sample)})
            for (prompt, dataset, _), sample in zip(sampled.prompts, sampled.samples[cost.strength], strict=True)
        ]
        record |= {"repetition": mean, "repetition_se": error, "eos_rate": sampled.eos_rate(cost.strength)}
        record |= {"samples": texts}
    return without_nan(record)
