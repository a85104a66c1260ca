"""From a checked config to the parts of a run: data, model, pipeline, adapters, optimiser, position."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cadapter import __version__
from cadapter.config import Config
from cadapter.config.rules import has_neutral_dataset, idle_neutral
from cadapter.data import PreparedData, prepare_data
from cadapter.data.batches import BatchPlan, EvaluationBatches, StepBatches, evaluation_batches
from cadapter.errors import UsageError
from cadapter.files import write_json, write_text
from cadapter.models.attention import check_installed
from cadapter.models.checkpoint import Checkpoint, resolve_model
from cadapter.models.execution import BlockRunner, compiled_if
from cadapter.models.isolation import check_isolation
from cadapter.models.layers import CarrierFormat, run_block, run_norm
from cadapter.models.loading import DTYPES, EMBEDDING, FLEX_ATTENTION, CausalLM
from cadapter.models.quantise import KINDS, check_mostly_4bit, in_words
from cadapter.planning.memory import RunSizes
from cadapter.terminal import note, warn
from cadapter.training.caching import prepare_in_turn
from cadapter.training.distributed import GradientGroups, World, from_main, new_group, on_main, sum_over_world
from cadapter.training.engine import Pipeline
from cadapter.training.gradients import Gradients
from cadapter.training.layout import Layout, stage_bounds
from cadapter.training.losses import LossSettings, TrainingLoss
from cadapter.training.modes import mode_of
from cadapter.training.modes.base import Mode
from cadapter.training.optimiser import Optimiser
from cadapter.training.recompute import Recompute, recompute_for
from cadapter.training.rehearsal import Rehearsal
from cadapter.training.resuming import excused_facts
from cadapter.training.run_directory import RunDirectory
from cadapter.training.samples import SamplePlan, Sampler, plan_samples
from cadapter.training.sizes import carrier_of, compiles_on, sizes_of
from cadapter.training.stages import StageBuilder
from cadapter.training.state import Position, Saved, check_facts, is_written_out, load_checkpoint
from cadapter.training.trainer import Run

RECORDED_VERSIONS = ("torch", "deepspeed", "transformers", "torch-optimi", "safetensors", "pyarrow")


@dataclass
class Plan:
    """What is known of a run before any weight is read."""

    config: Config
    layout: Layout
    data: PreparedData
    model: CausalLM
    mode: Mode
    builder: StageBuilder
    bounds: list[int]
    steps: BatchPlan
    sizes: RunSizes
    samples: SamplePlan | None = None


def prepare_together(config: Config, world: World) -> PreparedData:
    """Build the data's caches once on each machine that does not see those of rank 0, and open them everywhere."""
    world.watch.enter("preparing the data", patient=True)
    return prepare_in_turn(lambda: prepare_data(config), world)


def load_base(config: Config, world: World, directory: Path | None = None) -> CausalLM:
    """The model of a config, or that of ``directory`` with the config's settings; no weight is read yet.

    Raises:
        UsageError: it is no usable model.
    """
    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    check_installed(config.attn_implementation)
    if attention == FLEX_ATTENTION and world.device.type != "cuda":
        raise UsageError(f'attn_implementation = "{attention}" trains on GPUs only.\nUse "auto".')
    trusted = config.trust_remote_code
    world.watch.enter("finding the model", patient=True)  # which may have to be fetched
    place = directory or resolve_model(config.model_dir, trust_remote_code=trusted)
    world.watch.enter("reading the model's config")
    return CausalLM(Checkpoint(place, trusted), DTYPES[config.dtype], world.device, attention, config.load_in_4bit)


def plan_run(config: Config, world: World, resume_from: Path | None = None) -> Plan:
    """Check everything that can be checked without reading weights, and decide the layout.

    Raises:
        UsageError: model, data, layers and layout do not go together.
    """
    layout = Layout.of(world.size, config.pipeline_stages, world.rank, config.use_column_major_topology)
    world.watch.lay_out(layout.stage, layout.stages)
    # A checkpoint of full fine-tuning is the model itself.
    model = load_base(config, world, resume_from if config.full_fine_tune else None)
    mode = mode_of(config, model)
    on_main(mode.look_up_base, world)
    if config.init_from is not None and resume_from is None:
        mode.check_start(Path(config.init_from))
    if config.document_attention == "isolated":
        check_isolation(model)
    bounds = stage_bounds(config.partition_method, layout.stages, model.layer_bytes(), mode.trainable())
    data = prepare_together(config, world)
    _check_early_stopping(config, data)
    has_neutral = any(part is not None and part.trained[2] > 0 for part in (data.train, data.evaluation))
    if has_neutral and not has_neutral_dataset(config) and world.is_main:  # such a dataset was warned of before
        for text in idle_neutral(config):
            warn(text)
    carrier = carrier_of(config, mode, has_neutral)
    _check_that_something_trains(data.train.trained, loss_settings(config, mode, carrier))
    is_compiled, required = compiles(config, model), config.compile is True
    runner = BlockRunner(run_block, is_compiled, required)
    head = compiled_if(is_compiled, run_norm, "the final norm", required)
    sizes = sizes_of(config, model, mode, carrier, is_compiled)
    recompute = _recompute(config, world, sizes, bounds)
    builder = StageBuilder(model, mode, carrier, recompute, runner, layout.stages, head)
    per_step = config.micro_batch_size * config.gradient_accumulation_steps * layout.replicas
    done = Position() if resume_from is None else load_checkpoint(resume_from).position
    steps = BatchPlan(
        len(data.train), per_step, config.epochs, config.max_steps, config.seed, done.step, done.sequences
    )
    samples = plan_samples(config, model) if data.evaluation is not None else None
    return Plan(config, layout, data, model, mode, builder, bounds, steps, sizes, samples)


def loss_settings(config: Config, mode: Mode, carrier: CarrierFormat) -> LossSettings:
    """What the losses of the three classes count."""
    weights = config.class_weights
    neutral = config.control_class0_lambda * weights.neutral if carrier.penalty else 0.0
    return LossSettings(weights.positive, weights.negative, neutral, mode.applications)


def _check_that_something_trains(trained: Sequence[int], settings: LossSettings) -> None:
    """Make sure that some of the ``trained`` tokens of the classes +1, −1 and 0 have a weight.

    Raises:
        UsageError: the run would train nothing.
    """
    of_classes = list(
        zip(("+1", "-1", "0"), trained, (settings.positive, settings.negative, settings.neutral), strict=True)
    )
    if not any(tokens * weight for _, tokens, weight in of_classes):
        there = ", ".join(f"{tokens:,} of class {name}" for name, tokens, _ in of_classes if tokens)
        raise UsageError(
            f"Nothing would be trained: the training data's tokens ({there}) all have the weight 0.\n"
            "Set class_weights above 0, and control_class0_lambda for class 0."
        )


def _check_early_stopping(config: Config, data: PreparedData) -> None:
    """Make sure that early stopping has a loss to go by.

    Raises:
        UsageError: no held-out token has one.
    """
    if config.early_stopping_patience is None or data.evaluation is None:
        return
    positive, negative, _ = data.evaluation.trained
    if not config.class_weights.positive * positive + config.class_weights.negative * negative:
        raise UsageError(
            "early_stopping_patience waits for a lower eval/loss, and there is none: all held-out texts are of class 0 "
            "or of a class of weight 0.\nRemove early_stopping_patience, or give texts of class 1 or -1."
        )


def compiles(config: Config, model: CausalLM) -> bool:
    """Whether decoder blocks and the loss are compiled."""
    return compiles_on(model.device.type, config, model)


def _recompute(config: Config, world: World, sizes: RunSizes, bounds: list[int]) -> Recompute:
    """What blocks keep; all processes decide by the GPU of which the least is free."""
    least = None
    if world.device.type == "cuda":
        free = torch.zeros(world.size, dtype=torch.float64, device=world.device)
        free[world.rank] = torch.cuda.mem_get_info(world.device)[0]
        least = sum_over_world(free).min().item()
    return recompute_for(config.activation_checkpointing, sizes, bounds, least)


def run_facts(plan: Plan) -> dict[str, Any]:
    """What a resume must find unchanged: it would continue another run otherwise."""
    return {
        "mode": plan.mode.name,
        "model_type": plan.model.config.model_type,
        "hidden_size": plan.model.hidden_size,
        **plan.mode.facts(),
        "seed": plan.config.seed,
        "sequence_len": plan.config.sequence_len,
        "sequences per step": plan.steps.sequences_per_step,
        "training data": plan.data.fingerprint,
    }


def gradient_groups(plan: Plan, pipeline: Pipeline) -> GradientGroups:
    """Who adds up gradients with whom: the replicas of a stage, and the two stages of a tied embedding."""
    layout, count = plan.layout, plan.layout.replicas
    is_shared = plan.mode.name == "full" and plan.model.tied and layout.stages > 1
    if not is_shared:
        return GradientGroups(count, pipeline.replicas())
    ends = [rank for rank in range(layout.stages * count) if layout.stage_of(rank) in (0, layout.stages - 1)]
    return GradientGroups(count, pipeline.replicas(), EMBEDDING, new_group(ends))


def check_stored(model: CausalLM, layout: Layout, world: World) -> str:
    """Return how the decoder blocks of all stages are stored, in words.

    Raises:
        CadapterError: 4 bits were asked for, and most bytes are something else.
    """
    sizes = torch.tensor([model.stored[kind] for kind in KINDS], dtype=torch.int64, device=world.device)
    sizes = sum_over_world(sizes * (layout.replica == 0))
    stored = dict(zip(KINDS, sizes.tolist(), strict=True))
    if model.four_bit:
        check_mostly_4bit(stored)
    return in_words(stored)


def build_run(
    plan: Plan, world: World, directory: RunDirectory, resume_from: Path | None, given: Collection[str] = ()
) -> Run:
    """Load this process's stage and make or restore everything that training needs.

    Args:
        given: keys of the config that ``--set`` names, which may differ from the checkpoint's.
    """
    config, layout, builder, facts = plan.config, plan.layout, plan.builder, run_facts(plan)
    saved = None if resume_from is None else _saved(plan, facts, directory, resume_from, given, world)
    settings = loss_settings(config, plan.mode, builder.carrier)
    is_compiled = compiles(config, plan.model)
    averaged_over = config.gradient_accumulation_steps * layout.replicas
    loss = TrainingLoss(settings, averaged_over, world.device, is_compiled, config.compile is True)
    pipeline = Pipeline(
        builder.builders(), plan.bounds, layout, loss, config.micro_batch_size, config.gradient_accumulation_steps,
        world.watch.moved,
    )  # fmt: skip
    stored = check_stored(plan.model, layout, world)
    if world.is_main:
        note(f"Decoder blocks in memory: {stored}.")
    trained = plan.mode.trained(pipeline.layers())
    parameters = trained.parameters()
    optimiser = Optimiser(parameters, (config.beta1, config.beta2), config.eps)
    if saved is not None:
        plan.mode.load(pipeline.layers(), saved.path)
        optimiser.load_state(saved.moments)
    elif config.init_from is not None:
        plan.mode.load(pipeline.layers(), Path(config.init_from))
    gradients, groups = Gradients(parameters, trained.copies, _gradient_dtype(config)), gradient_groups(plan, pipeline)
    return Run(
        config=config,
        world=world,
        layout=layout,
        directory=directory,
        pipeline=pipeline,
        loss=loss,
        mode=plan.mode,
        trained=trained,
        gradients=gradients,
        groups=groups,
        optimiser=optimiser,
        rehearsal=Rehearsal(
            world=world,
            layout=layout,
            pipeline=pipeline,
            loss=loss,
            gradients=gradients,
            groups=groups,
            optimiser=optimiser,
            carrier=builder.carrier,
            hidden_size=plan.model.hidden_size,
            dtype=plan.model.dtype,
            keep=builder.recompute.block(0) if config.activation_checkpointing == "auto" else None,
        ),
        plan=plan.steps,
        batches=StepBatches(plan.data.train, plan.steps),
        evaluation=_evaluation(plan),
        evaluation_accumulation=_evaluation_accumulation(config),
        sampler=_sampler(plan, pipeline, world),
        facts=facts,
        position=Position() if saved is None else saved.position,
    )


def _saved(
    plan: Plan, facts: dict[str, Any], directory: RunDirectory, checkpoint: Path, given: Collection[str], world: World
) -> Saved:
    """Read a checkpoint and make sure, before any weight is read, that the run can go on from it.

    Raises:
        UsageError: it is of another run, or the run is done.
    """
    saved, total = load_checkpoint(checkpoint), plan.steps.total_steps
    check_facts(saved, facts, excused_facts(given))
    step, stopped = saved.position.step, saved.position.is_enough(plan.config.early_stopping_patience)
    if step < total and not stopped:
        return saved
    # Killed after its last checkpoint, a run has still to write final/, which is read to know it: by one process.
    found = world.is_main and is_written_out(checkpoint, directory.final, world.watch.moved)
    written = bool(from_main("yes" if found else "", world))
    if written and stopped:
        raise UsageError(f"{checkpoint} is the end of this run already.\n{saved.position.why_enough()}")
    if step > total or (step == total and written):
        raise UsageError(
            f"{checkpoint} is the end of this run already: {saved.position.step} of {total} steps.\n"
            "Raise epochs or max_steps to go on."
        )
    return saved


def _gradient_dtype(config: Config) -> torch.dtype:
    """In which gradients of bfloat16 parameters add up: those of adapters, which are small, in float32."""
    return DTYPES[config.gradient_dtype] if config.full_fine_tune else torch.float32


def _evaluation_accumulation(config: Config) -> int:
    return config.eval_gradient_accumulation_steps or config.gradient_accumulation_steps


def _evaluation(plan: Plan) -> EvaluationBatches | None:
    data, config, layout = plan.data, plan.config, plan.layout
    if data.evaluation is None or not len(data.evaluation):
        return None
    accumulation = _evaluation_accumulation(config)
    return evaluation_batches(data.evaluation, layout.replica, layout.replicas, config.micro_batch_size, accumulation)


def _sampler(plan: Plan, pipeline: Pipeline, world: World) -> Sampler | None:
    if plan.samples is None:
        return None
    return Sampler(plan.samples, pipeline, plan.layout, world, plan.config.micro_batch_size * plan.config.sequence_len)


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
