"""From a checked config to the parts of a run: data, model, pipeline, adapters, optimiser, position."""

from __future__ import annotations

import contextlib
import io
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cadapter import __version__
from cadapter.adapters.directory import describe_layers
from cadapter.adapters.trained import TrainedControlAdapters
from cadapter.classes import NEUTRAL
from cadapter.config import Config
from cadapter.config.layers import parse_layers
from cadapter.data import PreparedData, prepare_data
from cadapter.data.batches import BatchPlan, EvaluationBatches, StepBatches, evaluation_batches
from cadapter.errors import UsageError
from cadapter.files import write_json, write_text
from cadapter.models.checkpoint import resolve_model
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import DTYPES, CausalLM
from cadapter.training.adapter_files import AdapterWriter, load_into
from cadapter.training.distributed import World, on_main
from cadapter.training.engine import Pipeline
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import LossSettings, TrainingLoss
from cadapter.training.optimiser import Optimiser
from cadapter.training.recompute import Recompute, decide
from cadapter.training.run_directory import RunDirectory
from cadapter.training.stages import StageBuilder, adapters_of, control_settings
from cadapter.training.state import Position, check_facts, load_checkpoint
from cadapter.training.trainer import Run

RECORDED_VERSIONS = ("torch", "deepspeed", "transformers", "torch-optimi", "safetensors", "pyarrow")


@dataclass
class Plan:
    """What is known of a run before any weight is read."""

    config: Config
    layout: Layout
    data: PreparedData
    model: CausalLM
    adapted: list[int]
    builder: StageBuilder
    bounds: list[int]
    steps: BatchPlan


def prepare_together(config: Config, world: World) -> PreparedData:
    """Build the data caches on rank 0 while the others wait, then open them there too, without a word."""
    found: list[PreparedData] = []
    on_main(lambda: found.append(prepare_data(config)), world)
    if not found:
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            found.append(prepare_data(config))
    return found[0]


def plan_run(config: Config, world: World) -> Plan:
    """Check everything that can be checked without reading weights, and decide the layout.

    Raises:
        UsageError: model, data, layers and layout do not go together.
    """
    layout = Layout.of(world.size, config.pipeline_stages, world.rank, config.use_column_major_topology)
    attention = "sdpa" if config.attn_implementation == "auto" else config.attn_implementation
    model = CausalLM(resolve_model(config.model_dir), DTYPES[config.dtype], world.device, attention)
    adapted = parse_layers(config.layers_to_transform, model.layer_count)
    neutral = config.control_class0_lambda * config.class_weights.neutral > 0
    has_neutral = any(dataset.control_class == NEUTRAL for dataset in config.datasets)
    builder = StageBuilder(
        model,
        adapted,
        control_settings(config),
        config.seed,
        CarrierFormat(penalty=neutral and has_neutral, dropout=config.lora_dropout > 0),
        _recompute(config, model, layout),
    )
    bounds = stage_bounds(config.partition_method, layout.stages, model.layer_bytes(), builder.trainable())
    data = prepare_together(config, world)
    per_step = config.micro_batch_size * config.gradient_accumulation_steps * layout.replicas
    steps = BatchPlan(len(data.train), per_step, config.epochs, config.max_steps, config.seed)
    return Plan(config, layout, data, model, adapted, builder, bounds, steps)


def _recompute(config: Config, model: CausalLM, layout: Layout) -> Recompute:
    in_flight = min(layout.stages, config.gradient_accumulation_steps)
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else None
    return decide(
        config.activation_checkpointing,
        model.config,
        model.dtype.itemsize,
        config.micro_batch_size * config.sequence_len * in_flight,
        layout.stages,
        sum(model.layer_bytes()) // layout.stages,
        free,
    )


def run_facts(plan: Plan) -> dict[str, Any]:
    """What a resume must find unchanged: it would continue another run otherwise."""
    config, settings = plan.config, control_settings(plan.config)
    return {
        "model_type": plan.model.config.model_type,
        "hidden_size": plan.model.hidden_size,
        "layers": plan.adapted,
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "control_site": settings.site,
        "seed": config.seed,
        "sequence_len": config.sequence_len,
        "sequences per step": plan.steps.sequences_per_step,
        "training data": plan.data.fingerprint,
    }


def build_run(plan: Plan, world: World, directory: RunDirectory, resume_from: Path | None) -> Run:
    """Load this process's stage and make or restore everything that training needs."""
    config, layout, builder = plan.config, plan.layout, plan.builder
    weights = config.class_weights
    settings = LossSettings(
        positive=weights.positive,
        negative=weights.negative,
        neutral=config.control_class0_lambda * weights.neutral if builder.carrier.penalty else 0.0,
        applications=builder.applications,
    )
    loss = TrainingLoss(settings, config.gradient_accumulation_steps * layout.replicas, world.device)
    pipeline = Pipeline(
        builder.builders(), plan.bounds, layout, loss, config.micro_batch_size, config.gradient_accumulation_steps
    )
    adapters = adapters_of(pipeline.layers())
    trained = TrainedControlAdapters(adapters, plan.adapted, config.lora_weight_decay, world.device)
    optimiser = Optimiser(trained.parameters(), (config.beta1, config.beta2), config.eps)
    facts, position = run_facts(plan), Position()
    if resume_from is not None:
        saved = load_checkpoint(resume_from)
        check_facts(saved, facts)
        position = saved.position
        if position.step >= plan.steps.total_steps:
            raise UsageError(
                f"{resume_from} is the end of this run already: {position.step} of {plan.steps.total_steps} steps.\n"
                "Raise epochs or max_steps to go on."
            )
        load_into(adapters, resume_from)
        optimiser.load_state(saved.optimiser)
    return Run(
        config=config,
        world=world,
        layout=layout,
        directory=directory,
        pipeline=pipeline,
        loss=loss,
        trained=trained,
        optimiser=optimiser,
        plan=plan.steps,
        batches=StepBatches(plan.data.train, plan.steps),
        evaluation=_evaluation(plan),
        evaluation_accumulation=_evaluation_accumulation(config),
        writer=AdapterWriter(
            control_settings(config),
            plan.adapted,
            (config.model_dir, plan.model.config.model_type),
            describe_layers(plan.model.checkpoint, plan.adapted),
        ),
        facts=facts,
        position=position,
    )


def _evaluation_accumulation(config: Config) -> int:
    return config.eval_gradient_accumulation_steps or config.gradient_accumulation_steps


def _evaluation(plan: Plan) -> EvaluationBatches | None:
    data, config, layout = plan.data, plan.config, plan.layout
    if data.evaluation is None or not len(data.evaluation):
        return None
    accumulation = _evaluation_accumulation(config)
    return evaluation_batches(data.evaluation, layout.replica, layout.replicas, config.micro_batch_size, accumulation)


def record_run(plan: Plan, directory: RunDirectory, config_text: str, facts: dict[str, Any]) -> None:
    """Write the config as given, and everything as used, into the run's directory."""
    write_text(directory.path / "config.toml", config_text)
    versions = {name: version(name) for name in RECORDED_VERSIONS}
    resolved = {
        "config": json.loads(plan.config.model_dump_json()),
        "layout": {"stages": plan.layout.stages, "replicas": plan.layout.replicas, "bounds": plan.bounds},
        "steps": {"total": plan.steps.total_steps, "per_epoch": plan.steps.steps_per_epoch},
        "facts": facts,
        "versions": {"cadapter": __version__, "python": platform.python_version(), **versions},
    }
    write_json(directory.path / "resolved.json", resolved)
