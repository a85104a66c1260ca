"""A whole ``eval``: documents scored one by one under several strengths at once, through the pipeline.

A micro-batch holds one document once for the base and for each of some strengths; a row's code tells its strength, so
one forward pass gives the base's and the adapted distributions, and the last stage compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cadapter.classes import IGNORED_LABEL, NEUTRAL
from cadapter.config import Config
from cadapter.data import HeldOutDocument, documents_from_file, load_tokenizer
from cadapter.data.remarks import held_out_warnings
from cadapter.errors import UsageError
from cadapter.models.cached import cached_frame
from cadapter.models.layers import CarrierFormat
from cadapter.terminal import progress, warn
from cadapter.training.build import prepare_together
from cadapter.training.continuations import Continuations, continuations, prompts_of
from cadapter.training.distributed import World, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch, check_deepspeed
from cadapter.training.failures import joined_world
from cadapter.training.held_out import check_held_out
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import ComparisonLoss
from cadapter.training.out_of_memory import advising, evaluation_advice
from cadapter.training.recompute import Recompute
from cadapter.training.scores import TOKENS, Contrast, Cost, Lean, Score, contrasts, costs, leans, score_datasets
from cadapter.training.stages import StageBuilder
from cadapter.training.subjects import subject_of
from cadapter.training.writing import Drawing, Writer

ROWS_AT_ONCE = 9
"""How often a micro-batch holds its document at most: the base and eight strengths. More strengths take more passes, so
that memory does not grow with them."""
LENGTH_STEP = 64
"""Documents are padded to a multiple of this many tokens, so that few different shapes run."""


@dataclass(frozen=True)
class EvalOptions:
    """What the command line adds to a config.

    Attributes:
        strengths: None: those that the adapter is evaluated at by default, with ``sweep`` from −2 to 2.
        data: files with their classes, instead of the run's held-out documents.
        neutral: a file of neutral texts, beside the others.
        samples: so many texts are written at each strength, as ``drawing`` says; without it none.
    """

    adapter: Path
    strengths: tuple[float, ...] | None = None
    sweep: bool = False
    data: tuple[tuple[str, int], ...] = ()
    neutral: str | None = None
    samples: int = 0
    drawing: Drawing | None = None


@dataclass(frozen=True)
class Evaluation:
    """What ``eval`` found.

    Attributes:
        strengths: those compared, in rising order; 0 is the base.
        scores: by dataset and strength; contrasts: by pair of strengths; leans, costs: by strength.
        on_neutral: whether costs are those of neutral documents, and not of all for want of them.
        documents: those scored.
        skipped: how many documents hold no token to score.
        continuations: texts written at each strength; None where none were asked for.
        notes: what the user must hear.
    """

    strengths: list[float]
    scores: list[Score]
    contrasts: list[Contrast]
    leans: list[Lean]
    costs: list[Cost]
    on_neutral: bool
    documents: list[HeldOutDocument]
    skipped: int
    continuations: Continuations | None
    notes: tuple[str, ...]


def evaluate(config: Config, options: EvalOptions) -> Evaluation | None:
    """Score the run's held-out documents, or those of ``options.data``; the result is on rank 0, None elsewhere.

    Raises:
        UsageError: adapter, model and data do not go together, or there is nothing to score.
    """
    with joined_world() as world, ExitStack() as stack:
        return _evaluate(config, options, world, stack)


def _evaluate(config: Config, options: EvalOptions, world: World, stack: ExitStack) -> Evaluation | None:
    remark = check_deepspeed()
    if remark and world.is_main:
        warn(remark)
    subject = subject_of(config, options.adapter, options.strengths, options.sweep, world)
    unknown = None if options.data else check_held_out(config, options.adapter)
    found, hardly_meant = _documents(config, options, world)
    documents = [document for document in found if _scored_tokens(document)]
    if not documents:
        raise UsageError("There is no document to evaluate on.\nSet eval_fraction above 0, or give --data FILE:CLASS.")
    strengths = subject.strengths
    passes = _passes(len(strengths))
    rows = len(passes[0])
    # On one process the whole model is one stage, however the run was laid out.
    stages = 1 if world.size == 1 else config.pipeline_stages
    layout = Layout.of(world.size, stages, world.rank, config.use_column_major_topology)
    world.watch.lay_out(layout.stage, layout.stages)
    stack.enter_context(advising(world, lambda: evaluation_advice(config, subject.mode, world.size, len(strengths))))
    world.watch.enter("loading the model")
    loss = ComparisonLoss()
    builder = StageBuilder(subject.model, subject.mode, CarrierFormat(), Recompute(0), stages=layout.stages)
    bounds = stage_bounds("estimated_size", layout.stages, subject.model.layer_bytes(), subject.mode.trainable())
    pipeline = Pipeline(builder.builders(), bounds, layout, loss, rows, 1, world.watch.moved)
    subject.install(pipeline.layers())
    world.watch.enter("evaluation")
    shared = {length: _share(group, layout) for length, group in _by_length(documents, config.sequence_len).items()}
    sums = torch.zeros(len(documents), len(strengths), TOKENS + 1, dtype=torch.float64)
    total = len(passes) * sum(map(len, shared.values()))
    with _shown(world, "scoring", total, "documents") as advance:
        for codes in passes:
            for length, shares in shared.items():
                pipeline.evaluate(_micro_batches(documents, shares, length, codes, advance), len(shares))
            for index, values in loss.take_results():
                if index >= 0:
                    sums[index, codes] = values
    sums = sum_over_world(sums.to(world.device)).cpu()
    continued = None
    if options.samples and options.drawing is not None:
        world.watch.enter("sampling")
        tokens_at_once, parts, cached = rows * max(shared), len(subject.models), cached_frame(subject.models)
        writer = Writer(pipeline, layout, world, tokens_at_once, parts, cached)
        prompts, drawing = prompts_of(documents, options.samples), options.drawing
        total = len(prompts) * len(strengths) * drawing.max_new_tokens
        with _shown(world, "sampling", total, "tokens") as advance:
            continued = continuations(prompts, subject, load_tokenizer(config).fast, writer, drawing, advance)
    if not world.is_main:
        return None
    notes = tuple(said for said in (*subject.notes, unknown, *hardly_meant) if said)
    return _evaluation(sums.numpy(), strengths, documents, len(found) - len(documents), continued, notes)


def _evaluation(
    sums: np.ndarray,
    strengths: list[float],
    documents: list[HeldOutDocument],
    skipped: int,
    continued: Continuations | None,
    notes: tuple[str, ...],
) -> Evaluation:
    names, classes = [each.dataset for each in documents], [each.control_class for each in documents]
    left_out = [each.left_out for each in documents]
    numbers: dict[object, int] = {}
    records = [numbers.setdefault(each.pair or place, len(numbers)) for place, each in enumerate(documents)]
    cost, on_neutral = costs(sums, strengths, classes)
    return Evaluation(
        strengths=sorted(strengths),
        scores=score_datasets(sums, strengths, names, classes, left_out),
        contrasts=contrasts(sums, strengths, classes, records),
        leans=leans(sums, strengths, classes, records),
        costs=cost,
        on_neutral=on_neutral,
        documents=documents,
        skipped=skipped,
        continuations=continued,
        notes=notes,
    )


def _shown(world: World, what: str, total: int, unit: str) -> AbstractContextManager[Callable[..., None]]:
    """Progress, shown by one process."""
    return progress(what, total=total, unit=unit) if world.is_main else nullcontext(_silent)


def _silent(_n: int = 1) -> None:
    """Another process shows how far work has come."""


def _passes(strengths: int) -> list[list[int]]:
    """Which strengths go through the pipeline together, the base first; the base fills up a last pass."""
    count = max(1, -(-(strengths - 1) // (ROWS_AT_ONCE - 1)))
    others = -(-(strengths - 1) // count)
    if not others:
        return [[0]]
    chosen = [list(range(first, min(first + others, strengths))) for first in range(1, strengths, others)]
    return [[0, *codes, *[0] * (others - len(codes))] for codes in chosen]


def _documents(config: Config, options: EvalOptions, world: World) -> tuple[list[HeldOutDocument], list[str]]:
    """The documents to score, the run's held-out ones or those of files, and neutral ones; and what is to be said."""
    files = list(options.data)
    found: list[HeldOutDocument] = []
    hardly_meant: list[str] = []
    if not files:
        data = prepare_together(config, world)
        found = data.documents
        hardly_meant = held_out_warnings(data) if world.is_main else []
    if options.neutral is not None:
        files.append((options.neutral, NEUTRAL))
    if files:
        tokenizer = load_tokenizer(config)
        for path, control_class in files:
            found = [*found, *documents_from_file(path, control_class, config, tokenizer)]
    return found, hardly_meant


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
    documents: Sequence[HeldOutDocument],
    indices: Sequence[int],
    length: int,
    strengths: Sequence[int],
    advance: Callable[..., None],
) -> Iterator[PipelineBatch]:
    rows = len(strengths)
    codes = torch.tensor(strengths, dtype=torch.int8).unsqueeze(1).expand(rows, length).contiguous()
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
        advance()
