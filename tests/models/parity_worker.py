"""Pipelines of several numbers of stages over tiny models: ``python -m tests.models.parity_worker JOB``.

JOB is a JSON file: ``output``, a directory, and ``runs``, each with ``stages`` and ``cases`` (fields of :class:`Case`
and ``directory``, the model's). Everything is imported once; for each run as many processes as it has stages are
forked, which join a job as they would under torchrun and go through all of the run's cases. For each case
``STAGES.CASE.RANK.safetensors`` gets what that process saw: the base's logits and loss (adapters still at the
identity), then, with random adapters or the base's own weights being trained, activations kept or recomputed: loss,
logits and the gradients of this stage's trained parameters.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cadapter.adapters.control import ControlSettings
from cadapter.data.batches import StepTotals
from cadapter.models.layers import CarrierFormat, DecoderLayer, HeadInputs
from cadapter.models.loading import DTYPES, EMBEDDING
from cadapter.training.distributed import GradientGroups, join_world, leave_world, new_group
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.gradients import Gradients
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import LossSettings, TrainingLoss
from cadapter.training.modes.control import adapters_of
from cadapter.training.stages import StageBuilder
from tests.tiny_models import LAYERS, VOCAB
from tests.tiny_pipeline import (
    RANK,
    SETTINGS,
    builder,
    full_builder,
    output_logits,
    random_classes,
    random_tokens,
    randomise,
)

MICRO_BATCHES, ROWS, TOKENS = 3, 2, 24
POSITIVE, NEGATIVE, NEUTRAL = 1.0, 0.5, 0.3
"""Weights of the classes in the loss."""


@dataclass(frozen=True)
class Case:
    """What is trained of which model: Control Adapters at ``site`` of the layers ``adapted``, or, at "full", itself."""

    model: str
    site: str = "block"
    adapted: tuple[int, ...] = tuple(range(LAYERS))
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = [self.model, self.site]
        if len(self.adapted) < LAYERS:
            parts.append(f"layer {self.adapted[0]} only")
        return "-".join(parts if self.dtype == "float32" else [*parts, self.dtype])

    @property
    def settings(self) -> ControlSettings:
        """Of the Control Adapters."""
        return ControlSettings(RANK, SETTINGS.alpha, self.site)

    @property
    def applications(self) -> int:
        """How often adapters act on a token."""
        return len(self.adapted) * (2 if self.site == "writes" else 1)


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
        self.logits.append(output_logits(outputs).detach())
        self.values.append(value.detach())
        return value

    def take(self, name: str) -> dict[str, Tensor]:
        """What was kept since the last call; nothing where this process is not the last stage."""
        if not self.values:
            return {}
        found = {f"{name}.logits": torch.cat(self.logits), f"{name}.loss": torch.stack(self.values).mean()}
        self.logits, self.values = [], []
        return found


def stages_of(case: Case, directory: Path) -> StageBuilder:
    """The pipeline layers of a case."""
    dtype = DTYPES[case.dtype]
    if case.site == "full":
        return full_builder(directory, dtype)
    return builder(directory, case.settings, case.adapted, CarrierFormat(penalty=True), dtype=dtype)


def gradient_groups(stages: StageBuilder, pipeline: Pipeline, layout: Layout) -> GradientGroups:
    """The two stages that hold a tied embedding add up its gradients."""
    if stages.mode.name != "full" or not stages.model.tied or layout.stages == 1:
        return GradientGroups(1, pipeline.replicas())
    return GradientGroups(1, pipeline.replicas(), EMBEDDING, new_group([0, layout.stages - 1]))


def run_case(case: Case, directory: Path, layout: Layout) -> dict[str, Tensor]:
    """Evaluate the base, then take the gradients of one step with and without recomputation."""
    stages = stages_of(case, directory)
    loss = RecordedLoss(LossSettings(POSITIVE, NEGATIVE, NEUTRAL, case.applications))
    bounds = stage_bounds("uniform", layout.stages, stages.model.layer_bytes(), stages.mode.trainable())
    pipeline = Pipeline(stages.builders(), bounds, layout, loss, ROWS, MICRO_BATCHES)
    layers = pipeline.layers()
    trained = stages.mode.trained(layers)
    gradients = Gradients(trained.parameters(), trained.copies, torch.float32)
    groups = gradient_groups(stages, pipeline, layout)
    pipeline.evaluate(micro_batches(loss.settings), MICRO_BATCHES)
    found = {"bytes_read": torch.tensor(stages.model.checkpoint.bytes_read), **loss.take("base")}
    randomise(adapters_of(layers))
    for variant in ("kept", "recomputed"):
        for layer in layers:
            if isinstance(layer, DecoderLayer):
                layer.keep = "full" if variant == "recomputed" else "none"
        pipeline.train(micro_batches(loss.settings))
        gradients.reduce(groups)
        found |= loss.take(variant)
        for name in trained.parameters():
            gradient = gradients.of(name)
            assert gradient is not None, f"{name} has no gradient"
            found[f"{variant}.gradient.{name}"] = gradient.clone()
        gradients.clear()
    return found


def run_cases(cases: list[dict[str, Any]], output: Path, numbers: dict[str, int]) -> None:
    """One process of a run; its place in the job is in ``numbers``, as environment variables."""
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
    world = join_world()
    layout = Layout.of(world.size, world.size, world.rank)
    for number, fields in enumerate(cases):
        directory = Path(fields.pop("directory"))
        case = Case(**fields)
        try:
            found = run_case(case, directory, layout)
        except Exception as error:
            raise RuntimeError(f"{case} in {layout.stages} stages") from error
        save_file(found, output / f"{world.size}.{number}.{world.rank}.safetensors")
    leave_world()


def fork(stages: int, cases: list[dict[str, Any]], output: Path) -> None:
    """Run ``cases`` in as many processes as there are stages; the first that fails ends all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(stages):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": stages, "MASTER_PORT": port}
        processes.append(context.Process(target=run_cases, args=(cases, output, numbers)))
        processes[-1].start()
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode not in (0, None) for process in processes):
            for process in running:
                process.kill()
            sys.exit(f"A pipeline of {stages} stages failed.")


def main(job_file: str) -> None:
    """Do all runs of a job."""
    torch.set_num_threads(1)
    job = json.loads(Path(job_file).read_text("utf-8"))
    for run in job["runs"]:
        fork(run["stages"], run["cases"], Path(job["output"]))


if __name__ == "__main__":
    main(sys.argv[1])
