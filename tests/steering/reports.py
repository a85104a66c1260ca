"""Steering reports made up of formulas: what they show is known, and texts and names in them may be hostile."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from cadapter.adapters.directory import ControlAdapterFiles
from cadapter.adapters.factors import LowRank
from cadapter.convert.norms import measure, verdict
from cadapter.data import HeldOutDocument
from cadapter.steering.choosing import KL_BUDGET, choose
from cadapter.steering.report import Report, remarks_of
from cadapter.steering.sampling import Sample, Sampled
from cadapter.training.evaluation import Evaluation
from cadapter.training.scores import contrasts, costs, leans, score_datasets

STRENGTHS = (0.0, -2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
DATASETS = (("stories_ornate", 1, 3.1), ("stories_plain", -1, 2.8), ("letters", 0, 2.95))
DOCUMENTS, TOKENS = 24, 120
HOSTILE = '<script>document.title="broken"</script><img src="x.png" onerror="alert(1)">&"\''


def sums(strengths: tuple[float, ...] = STRENGTHS, kinds: tuple[int, ...] = (1, -1, 0)) -> np.ndarray:
    """[documents, strengths, 5]: loss falls a little for its own class's sign, and rises with the square of t."""
    draw = np.random.default_rng(4)
    rows = []
    for _, class_, loss in (each for each in DATASETS if each[1] in kinds):
        for _ in range(DOCUMENTS):
            own, slope = loss + 0.3 * draw.standard_normal(), 0.05 + 0.01 * draw.standard_normal()
            rows.append([_of_document(own, slope * class_, t) for t in strengths])
    return TOKENS * np.array(rows)


def _of_document(loss: float, slope: float, t: float) -> list[float]:
    """Means per token of a document: nll, correct, KL, agrees, and 1."""
    return [loss - slope * t + 0.012 * t * t, 0.4 - 0.01 * abs(t), 0.035 * t * t, 1 - 0.03 * abs(t), 1.0]


def evaluation(
    strengths: tuple[float, ...] = STRENGTHS, kinds: tuple[int, ...] = (1, -1, 0), name: str = ""
) -> Evaluation:
    """What ``eval`` would have found."""
    table = sums(strengths, kinds)
    facts = [(name + dataset, class_) for dataset, class_, _ in DATASETS if class_ in kinds for _ in range(DOCUMENTS)]
    names, classes = [each for each, _ in facts], [each for _, each in facts]
    ids = np.arange(TOKENS + 1, dtype=np.int32)
    documents = [
        HeldOutDocument(dataset, class_, ids, np.ones(len(ids), bool), 30 * (number % 3))
        for number, (dataset, class_) in enumerate(facts)
    ]
    cost, on_neutral = costs(table, strengths, classes)
    return Evaluation(
        strengths=sorted(strengths),
        scores=score_datasets(table, strengths, names, classes, [each.left_out for each in documents]),
        contrasts=contrasts(table, strengths, classes),
        leans=leans(table, strengths, classes),
        costs=cost,
        on_neutral=on_neutral,
        documents=documents,
        skipped=0,
        continuations=None,
        notes=(),
    )


def sampled(strengths: tuple[float, ...] = STRENGTHS, text: str = "") -> Sampled:
    """Six prompts; texts are longer words with more strength, and every third one ends."""
    words = "the road went on past the mill and over the hill where nobody had walked for years"
    prompts = [(f"{text}In the year that the bridge fell,", DATASETS[k % 3][0], DATASETS[k % 3][1]) for k in range(6)]
    samples = {
        t: [
            Sample(f"{text}{words} ({t:+g})", 18 + k, k % 3 == 0, 0.02 * abs(t) if k else math.nan)
            for k in range(len(prompts))
        ]
        for t in sorted(strengths)
    }
    return Sampled(prompts, samples, 64, 0.8, 0.011)


def adapter(layers: int = 8) -> ControlAdapterFiles:
    """A random adapter of rank 4 that grows with depth."""
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for layer in range(layers):
        A, B = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
        factors[layer] = LowRank(A, B * (0.1 + 0.05 * layer) / torch.linalg.matrix_norm(0.5 * B @ A, 2))
    return ControlAdapterFiles(
        path=Path("run/final"), rank=4, alpha=2.0, layers=factors, site="writes", base_model_type="llama",
        base_model_name_or_path="base", facts={},
    )  # fmt: skip


def report(hostile: bool = False, kinds: tuple[int, ...] = (1, -1, 0), budget: float = KL_BUDGET) -> Report:
    """A complete report; with ``hostile`` every name and text in it tries to break out."""
    text = HOSTILE if hostile else ""
    found, files = evaluation(kinds=kinds, name=text), adapter()
    norms = measure(files)
    return Report(
        config=Path(f"{text}config.toml"),
        base=f"{text}base",
        subject=Path(f"{text}run/final"),
        evaluation=found,
        choice=choose(found.contrasts, found.leans, found.costs, budget),
        sampled=sampled(text=text),
        adapter=files,
        norms=norms,
        verdict=tuple(verdict(files, norms)),
        remarks=tuple(remarks_of(found)),
    )
