"""One process of a pipeline over tiny models: ``python -m torch.distributed.run … -m tests.models.parity_worker JOB``.

JOB is a JSON file: ``output``, a directory, and ``cases``, each with ``model`` (a directory), ``adapted`` (layers) and
``dtype``. For each case ``CASE.RANK.safetensors`` gets what this process saw: the base's logits and loss (adapters
still at the identity), then, with random adapters, kept or recomputed activations, the loss, the logits and the
gradients of this stage's adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cadapter.data.batches import StepTotals
from cadapter.models.layers import CarrierFormat, HeadInputs
from cadapter.models.loading import DTYPES
from cadapter.models.loss import logits_of
from cadapter.training.distributed import join_world, leave_world
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import LossSettings, TrainingLoss
from cadapter.training.modes.control import adapters_of
from tests.tiny_models import VOCAB
from tests.tiny_pipeline import SETTINGS, builder, random_classes, random_tokens, randomise

MICRO_BATCHES, ROWS, TOKENS = 3, 2, 24
WEIGHTS = {"positive": 1.0, "negative": 0.5, "neutral": 0.3}


def global_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and classes of the step, [MICRO_BATCHES · ROWS, TOKENS]."""
    count = MICRO_BATCHES * ROWS
    ids, classes = random_tokens(count, TOKENS, VOCAB), random_classes(count, TOKENS)
    labels = torch.where((classes == 1) | (classes == -1), ids.roll(-1, dims=1), -100)
    return ids, labels, classes


def micro_batches(settings: LossSettings) -> list[PipelineBatch]:
    """The step's micro-batches as the pipeline takes them."""
    ids, labels, classes = global_batch()
    totals = StepTotals(*(int((classes == code).sum()) for code in (1, -1, 0)), ids.numel())
    denominators = [settings.weighted_tokens(totals.positive, totals.negative), float(totals.neutral)]
    rows = torch.arange(len(ids))
    return [
        ((ids[k], classes[k], rows[k]), (labels[k], torch.tensor(denominators)))
        for k in (slice(ROWS * m, ROWS * (m + 1)) for m in range(MICRO_BATCHES))
    ]


class RecordedLoss(TrainingLoss):
    """The loss of training, which also keeps the logits and values of its micro-batches."""

    def __init__(self, settings: LossSettings) -> None:
        super().__init__(settings, MICRO_BATCHES, torch.device("cpu"))
        self.logits: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, outputs: HeadInputs, targets: tuple[Tensor, ...]) -> Tensor:
        value = super().__call__(outputs, targets)
        self.logits.append(logits_of(outputs.hidden, outputs.weight).detach())
        self.values.append(value.detach())
        return value

    def take(self, name: str) -> dict[str, Tensor]:
        """What was kept since the last call; nothing where this process is not the last stage."""
        if not self.values:
            return {}
        found = {f"{name}.logits": torch.cat(self.logits), f"{name}.loss": torch.stack(self.values).mean()}
        self.logits, self.values = [], []
        return found


def run_case(case: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """Evaluate the base, then take the gradients of one step with and without recomputation."""
    found: dict[str, Tensor] = {}
    adapted = case["adapted"]
    loss = RecordedLoss(LossSettings(**WEIGHTS, applications=len(adapted)))
    for name, every in (("kept", 0), ("recomputed", 1)):
        stages = builder(
            Path(case["model"]),
            SETTINGS,
            adapted,
            CarrierFormat(penalty=True),
            recompute_every=every,
            dtype=DTYPES[case["dtype"]],
        )
        bounds = stage_bounds("uniform", layout.stages, stages.model.layer_bytes(), stages.trainable())
        pipeline = Pipeline(stages.builders(), bounds, layout, loss, ROWS, MICRO_BATCHES)
        adapters = adapters_of(pipeline.layers())
        if name == "kept":
            pipeline.evaluate(micro_batches(loss.settings), MICRO_BATCHES)
            found |= loss.take("base")
            found["bytes_read"] = torch.tensor(stages.model.checkpoint.bytes_read)
        randomise(adapters)
        pipeline.train(micro_batches(loss.settings))
        found |= loss.take(name)
        for adapter in adapters:
            for letter, parameter in (("A", adapter.control_A), ("B", adapter.control_B)):
                assert parameter.grad is not None
                found[f"{name}.{adapter.layer}.{letter}"] = parameter.grad
    return found


def main(job_file: str) -> None:
    """Run all cases of a job."""
    torch.set_num_threads(1)
    job = json.loads(Path(job_file).read_text("utf-8"))
    world = join_world()
    layout = Layout.of(world.size, world.size, world.rank)
    for number, case in enumerate(job["cases"]):
        save_file(run_case(case, layout), Path(job["output"]) / f"{number}.{world.rank}.safetensors")
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
