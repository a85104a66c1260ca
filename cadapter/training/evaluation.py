"""A whole ``eval``: documents scored one by one under several strengths at once, through the pipeline.

A micro-batch holds one document once for each strength; a row's code tells its strength, so one forward pass gives
the base's and all adapted distributions, and the last stage compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cadapter.classes import IGNORED_LABEL
from cadapter.config import Config
from cadapter.data import HeldOutDocument, documents_from_file, load_tokenizer
from cadapter.errors import UsageError
from cadapter.models.layers import CarrierFormat
from cadapter.terminal import warn
from cadapter.training.build import prepare_together
from cadapter.training.distributed import World, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch, check_deepspeed
from cadapter.training.failures import joined_world
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import ComparisonLoss
from cadapter.training.recompute import Recompute
from cadapter.training.scores import Contrast, Score, contrasts, score_datasets
from cadapter.training.stages import StageBuilder
from cadapter.training.subjects import subject_of

LENGTH_STEP = 64
"""Documents are padded to a multiple of this many tokens, so that few different shapes run."""


@dataclass(frozen=True)
class EvalOptions:
    """What the command line adds to a config; no strengths: those that the adapter is evaluated at by default."""

    adapter: Path
    strengths: tuple[float, ...] | None = None
    data: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What ``eval`` found; ``note`` is what the user must hear of the adapter's inverse, if anything."""

    scores: list[Score]
    contrasts: list[Contrast]
    skipped: int
    note: str | None


def evaluate(config: Config, options: EvalOptions) -> Evaluation | None:
    """Score the run's held-out documents, or those of ``options.data``; the result is on rank 0, None elsewhere.

    Raises:
        UsageError: adapter, model and data do not go together, or there is nothing to score.
    """
    with joined_world() as world:
        return _evaluate(config, options, world)


def _evaluate(config: Config, options: EvalOptions, world: World) -> Evaluation | None:
    remark = check_deepspeed()
    if remark and world.is_main:
        warn(remark)
    subject = subject_of(config, options.adapter, options.strengths, world)
    found = _documents(config, options, world)
    documents = [document for document in found if _scored_tokens(document)]
    if not documents:
        raise UsageError("There is no document to evaluate on.\nSet eval_fraction above 0, or give --data FILE:CLASS.")
    strengths = subject.strengths
    # On one process the whole model is one stage, however the run was laid out.
    stages = 1 if world.size == 1 else config.pipeline_stages
    layout = Layout.of(world.size, stages, world.rank, config.use_column_major_topology)
    world.watch.lay_out(layout.stage, layout.stages)
    world.watch.enter("loading the model")
    loss = ComparisonLoss()
    builder = StageBuilder(subject.model, subject.mode, CarrierFormat(), Recompute(0))
    bounds = stage_bounds("estimated_size", layout.stages, subject.model.layer_bytes(), subject.mode.trainable())
    pipeline = Pipeline(builder.builders(), bounds, layout, loss, len(strengths), 1, world.watch.moved)
    subject.install(pipeline.layers())
    world.watch.enter("evaluation")
    for length, group in _by_length(documents, config.sequence_len).items():
        shares = _share(group, layout)
        pipeline.evaluate(_micro_batches(documents, shares, length, len(strengths)), len(shares))
    sums = torch.zeros(len(documents), len(strengths), 4, dtype=torch.float64)
    for index, values in loss.results:
        if index >= 0:
            sums[index] = values
    sums = sum_over_world(sums.to(world.device)).cpu()
    if not world.is_main:
        return None
    table = sums.numpy()
    names, classes = [each.dataset for each in documents], [each.control_class for each in documents]
    return Evaluation(
        score_datasets(table, strengths, names, classes),
        contrasts(table, strengths, classes),
        len(found) - len(documents),
        subject.note,
    )


def _documents(config: Config, options: EvalOptions, world: World) -> list[HeldOutDocument]:
    if not options.data:
        return prepare_together(config, world).documents
    tokenizer = load_tokenizer(config)
    return [
        document
        for path, control_class in options.data
        for document in documents_from_file(path, control_class, config, tokenizer)
    ]


def _scored_tokens(document: HeldOutDocument) -> int:
    return int(document.trained[1:].sum())


def _by_length(documents: Sequence[HeldOutDocument], longest: int) -> dict[int, list[int]]:
    """Group document indices by their padded length."""
    groups: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        length = min(longest, -(-len(document.ids) // LENGTH_STEP) * LENGTH_STEP)
        groups.setdefault(length, []).append(index)
    return dict(sorted(groups.items()))


def _share(group: list[int], layout: Layout) -> list[int]:
    """The documents of a group that this replica scores, filled with −1 so that every replica has as many."""
    filled = group + [-1] * (-len(group) % layout.replicas)
    return filled[layout.replica :: layout.replicas]


def _micro_batches(
    documents: Sequence[HeldOutDocument], indices: Sequence[int], length: int, rows: int
) -> Iterator[PipelineBatch]:
    codes = torch.arange(rows, dtype=torch.int8).unsqueeze(1).expand(rows, length).contiguous()
    no_dropout = torch.zeros(rows, dtype=torch.int64)
    for index in indices:
        ids, labels = np.zeros(length, np.int64), np.full(length, IGNORED_LABEL, np.int64)
        if index >= 0:
            document = documents[index]
            count = len(document.ids)
            ids[:count] = document.ids
            labels[: count - 1] = np.where(document.trained[1:], document.ids[1:], IGNORED_LABEL)
        repeated = [torch.from_numpy(each).expand(rows, length).contiguous() for each in (ids, labels)]
        yield (repeated[0], codes, no_dropout), (repeated[1], torch.tensor([index]))
