"""A whole ``train``: from config and options to a finished, stopped or rehearsed run."""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cadapter.config import Config, config_warnings, idle_in_run, idle_keys, located, locating
from cadapter.data.remarks import data_warnings, repeats_of
from cadapter.models.attention import BLOCK_MASKS, time_kernels
from cadapter.models.loading import CausalLM
from cadapter.planning.memory import all_stages
from cadapter.planning.tables import memory_table
from cadapter.terminal import is_quiet, note, warn
from cadapter.training.build import Plan, build_run, compiles, plan_run, record_run, run_facts
from cadapter.training.distributed import World, from_main, on_main, sum_over_world
from cadapter.training.engine import check_deepspeed
from cadapter.training.failures import joined_world
from cadapter.training.out_of_memory import WEIGHTS, advising, training_advice
from cadapter.training.recompute import in_a_word
from cadapter.training.report import Reporter
from cadapter.training.resuming import compare_settings, difference, given_keys, settings_of
from cadapter.training.room import check_room, naming_what_is_kept, room_of
from cadapter.training.run_directory import RunDirectory
from cadapter.training.signals import StopSignals
from cadapter.training.state import Position, load_checkpoint
from cadapter.training.trainer import Run, Trainer

GIB = 2**30
TITLES = {"control": "Control Adapters", "lora": "LoRA", "full": "full fine-tuning"}
"""What a mode of training is called where someone watches."""


@dataclass(frozen=True)
class TrainOptions:
    """What the command line adds to a config."""

    resume: bool = False
    force: bool = False
    dry_run: bool = False
    overrides: tuple[str, ...] = ()


def train(config: Config, source: Path, options: TrainOptions) -> None:
    """Train, or with ``dry_run`` check everything that can be checked and show the plan.

    Raises:
        UsageError: something does not go together; nothing was written.
        Stopped: a signal asked for it; a checkpoint was written.
    """
    directory = RunDirectory(Path(config.output_dir))
    with joined_world(directory.path) as world, contextlib.closing(directory):
        _train(config, source, options, directory, world)


def _train(config: Config, source: Path, options: TrainOptions, directory: RunDirectory, world: World) -> None:
    signals = StopSignals()
    remark = check_deepspeed()
    config_text = source.read_bytes().decode("utf-8")  # as it is, line ends included
    resume_from = _checkpoint_to_resume(directory, options, config_text, world)
    if world.is_main:
        idle = located(idle_keys(config), source, options.overrides)
        for text in (*config_warnings(config), *idle, *filter(None, [remark])):
            warn(text)
    given = given_keys(options.overrides)
    if resume_from is not None:
        _tell_changes(config, resume_from, given, world)
    with locating(source, options.overrides):
        plan = plan_run(config, world, resume_from)
    if world.is_main:
        _tell_batch(plan, resume_from)
        neutral = int(plan.data.train.trained[2])
        steps, model = plan.steps, plan.model
        missed = idle_in_run(
            config,
            steps.total_steps,
            model.layer_count,
            neutral,
            model.hidden_size,
            steps.count,
            steps.sequences_per_step,
        )
        hardly_meant = data_warnings(plan.data, config, repeats_of(plan.data))
        for text in (*located(missed, source, options.overrides), *hardly_meant):
            warn(text)
        show_plan(plan)
    on_main(lambda: check_room(room_of(plan), directory), world)
    if options.dry_run:
        with contextlib.ExitStack() as stack:
            prepare_for_speed(plan, world, stack)
        if world.is_main:
            note("Everything checked, nothing trained. Leave out --dry-run to train.")
        return
    if options.resume and world.is_main:
        note(f"Resuming from {resume_from}." if resume_from else "No checkpoint to resume from: starting afresh.")
    world.watch.enter("loading the model")
    started = time.monotonic()
    with advising(world, lambda: training_advice(config, plan.mode, world.size, None, WEIGHTS)):
        run = build_run(plan, world, directory, resume_from, given)
    if world.is_main:
        read = plan.model.checkpoint
        note(
            f"Loaded this stage's layers in {time.monotonic() - started:.1f} s "
            f"({read.bytes_read / GIB:.2f} GiB read in {read.seconds_reading:.1f} s)."
        )

    def start() -> None:
        directory.start(fresh=resume_from is None, keep_best=options.resume and not options.force)
        record_run(plan, directory, config_text, run_facts(plan))

    on_main(start, world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_what_is_kept(directory))
        stack.enter_context(advising(world, lambda: _advice(run)))
        reporter = None
        if world.is_main:
            reporter = stack.enter_context(_reporter(run))
        prepare_for_speed(plan, world, stack)
        signals.from_now_on_save()
        Trainer(run, reporter, signals).train()
    show_peak_memory(world)
    if world.is_main:
        _show_end(run.position, directory, plan)
        # The run's own config.toml is the config as given: what was overridden has to be given again.
        again = [part for override in options.overrides for part in ("--set", override)]
        note(f"Next: {shlex.join(['cadapter', 'eval', str(directory.path / 'config.toml'), *again])}")


def _advice(run: Run) -> str:
    """What would take less memory than training does now."""
    kept = run.rehearsal.keep or run.config.activation_checkpointing
    return training_advice(run.config, run.mode, run.world.size, kept)


def _reporter(run: Run) -> Reporter:
    position, directory = run.position, run.directory.path
    lowest = None if position.best_loss is None else (position.best_loss, position.best_step)
    stages, replicas = run.layout.stages, run.layout.replicas
    several = [f"{count} {name}" for count, name in ((stages, "stages"), (replicas, "replicas")) if count > 1]
    title = " · ".join([TITLES[run.mode.name], *several, str(directory)])
    return Reporter(directory, run.plan.total_steps, position.step + 1, title, lowest)


def prepare_for_speed(plan: Plan, world: World, stack: contextlib.ExitStack) -> None:
    """Until ``stack`` closes, use the fastest attention kernel; say what will be compiled."""
    config, model = plan.config, plan.model
    attention = f"attention: {model.attention}."
    if model.attention == "sdpa":
        times = time_kernels(
            model.config,
            config.micro_batch_size,
            config.sequence_len,
            model.dtype,
            world.device,
            isolated=plan.builder.carrier.positions,
            block_masks=config.attn_implementation == "auto" and compiles(config, model) and model.takes_block_masks,
        )
        if times is not None:
            if times.fastest == BLOCK_MASKS:
                model.attend_by_block_masks()
            stack.enter_context(times.preferred())
            attention = times.in_words()
    if not world.is_main:
        return
    note(attention)
    if compiles(config, model):
        note("Compiling as training starts, once for all decoder blocks that are alike: up to some minutes.")
    else:
        note("compile: decoder blocks run as they are.")


def _tell_changes(config: Config, resume_from: Path, given: set[str], world: World) -> None:
    """Say which settings differ from the checkpoint's; refuse those that would make it another run."""
    saved = load_checkpoint(resume_from).settings
    for line in compare_settings(saved, settings_of(config), given, str(resume_from)):
        if world.is_main:
            note(f"Changed since the checkpoint: {line}.")


def _tell_batch(plan: Plan, resume_from: Path | None) -> None:
    """Say so if a resumed run takes other steps than before."""
    now = plan.steps.sequences_per_step
    before = now if resume_from is None else load_checkpoint(resume_from).facts.get("sequences per step")
    if before != now:
        note(
            f"Changed since the checkpoint: {difference('sequences per step', before, now)}. "
            f"{plan.steps.after_sequences:,} sequences are read; the next step goes on with those after them."
        )


def _checkpoint_to_resume(
    directory: RunDirectory, options: TrainOptions, config_text: str, world: World
) -> Path | None:
    """Look for the checkpoint on rank 0, whose directory is the one that counts, and tell everyone."""
    found = [""]

    def look() -> None:
        directory.claim()
        tidied = directory.tidy_up() if options.resume and not options.dry_run else []
        checkpoint, remarks = directory.checkpoint_to_resume(options.resume, options.force, world.watch.moved)
        for remark in [*tidied, *remarks]:
            warn(remark)
        if checkpoint is None:
            directory.refuse_foreign(config_text)
        found[0] = str(checkpoint or "")

    on_main(look, world)
    name = from_main(found[0], world)
    return Path(name) if name else None


def show_plan(plan: Plan) -> None:
    """Print the layout, the steps and what each stage holds."""
    config, layout, steps = plan.config, plan.layout, plan.steps
    recompute = plan.builder.recompute
    if not is_quiet():
        memory_table(
            f"Pipeline stages × data-parallel replicas: {layout.stages} × {layout.replicas}",
            plan.sizes,
            plan.bounds,
            all_stages(plan.sizes, plan.bounds, recompute.block),
        )
    note(recompute.reason or f"activation_checkpointing: {in_a_word(recompute)}.")
    tokens = int(plan.data.train.tokens.sum())
    if plan.model.family.inferred:
        warn(inferred_note(plan.model))
    note(plan.mode.description())
    note(
        f"{len(plan.data.train):,} sequences of {config.sequence_len} ({tokens:,} tokens with their prefixes), "
        f"{steps.sequences_per_step} sequences a step, {steps.steps_per_epoch:,} steps an epoch, "
        f"{steps.total_steps:,} steps in all."
    )


def inferred_note(model: CausalLM) -> str:
    """What was taken from the structure of a model whose family is in no table."""
    family = model.family
    writers = ", ".join((*family.attention_writers, *family.mlp_writers)) or "none"
    return (
        f"Models of type {model.config.model_type!r} are in no table of families; these facts are inferred from the "
        f"model's structure: what a block adds is its output minus its input; its residual writers are {writers}; "
        f"embeddings times {model.embedding_scale:g}, logits times {model.logits.scale:g}, "
        f"soft cap {model.logits.softcap or 'none'}."
    )


def show_peak_memory(world: World) -> None:
    """Print the largest peak of GPU memory among the processes; nothing on CPU."""
    if world.device.type != "cuda":
        return
    peaks = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    peaks[world.rank] = torch.cuda.max_memory_allocated(world.device) / GIB
    highest = sum_over_world(peaks).max().item()
    if world.is_main:
        note(f"Peak GPU memory: {highest:.1f} GiB.")


def _show_end(position: Position, directory: RunDirectory, plan: Plan) -> None:
    seconds, tokens = position.seconds, position.tokens
    skipped = f" ({position.skipped:,} of them skipped)" if position.skipped else ""
    note(
        f"Trained {position.step:,} steps{skipped} on {tokens:,} tokens in {seconds:,.0f} s "
        f"({tokens / max(seconds, 1e-9):,.0f} tokens/s)."
    )
    what = "model" if plan.mode.name == "full" else "adapter"
    note(f"The {what} is in {directory.final}.")
