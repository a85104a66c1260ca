"""Micro-batches in the form the pipeline takes: what the embedding reads, and what the loss reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cadapter.adapters.dropout import row_seeds
from cadapter.data.batches import EvaluationBatches, MicroBatch, StepBatches, StepTotals
from cadapter.training.engine import PipelineBatch
from cadapter.training.layout import Layout
from cadapter.training.losses import LossSettings


def _for_pipeline(batch: MicroBatch, rows: list[int], totals: StepTotals, settings: LossSettings) -> PipelineBatch:
    denominators = [settings.weighted_tokens(totals.positive, totals.negative), float(totals.neutral)]
    inputs = (batch.input_ids, batch.classes, torch.tensor(rows, dtype=torch.int64), batch.positions)
    return inputs, (batch.labels, torch.tensor(denominators, dtype=torch.float32))


def training_micro_batches(
    batches: StepBatches, step: int, layout: Layout, size: int, accumulation: int, settings: LossSettings
) -> Iterator[PipelineBatch]:
    """Yield the micro-batches of ``step`` that this process's replica reads."""
    totals = batches.totals(step)
    for batch in batches.micro_batches(step, layout.replica, layout.replicas, size, accumulation):
        rows = row_seeds(batches.plan.seed, step, batch.sequence_ids.tolist())
        yield _for_pipeline(batch, rows, totals, settings)


def evaluation_micro_batches(batches: EvaluationBatches, settings: LossSettings) -> Iterator[PipelineBatch]:
    """Yield the micro-batches of a whole evaluation that this process's replica reads."""
    for number in range(len(batches)):
        totals = batches.totals(number)
        for batch in batches[number]:
            yield _for_pipeline(batch, [0] * len(batch.input_ids), totals, settings)
