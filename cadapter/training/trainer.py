"""The loop: forward and backward through the pipeline, clip, Adam, decay, report; evaluate and save when due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadapter.adapters.trained import Norms, Trained
from cadapter.config import Config
from cadapter.data.batches import BatchPlan, EvaluationBatches, StepBatches
from cadapter.errors import CadapterError, Stopped
from cadapter.files import new_directory
from cadapter.models.device import memory_in_words, peak_memory
from cadapter.terminal import note, warn
from cadapter.training.batches import evaluation_micro_batches, training_micro_batches
from cadapter.training.distributed import GradientGroups, World, barrier, stream_to_main, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.gradients import Gradients
from cadapter.training.layout import Layout
from cadapter.training.losses import SUMS, TrainingLoss
from cadapter.training.modes.base import Mode
from cadapter.training.optimiser import Optimiser
from cadapter.training.out_of_memory import advising, training_advice
from cadapter.training.rehearsal import Rehearsal
from cadapter.training.report import Reporter
from cadapter.training.resuming import settings_of
from cadapter.training.run_directory import RunDirectory
from cadapter.training.samples import Sampler
from cadapter.training.schedule import evaluation_steps, schedule_factor
from cadapter.training.signals import STOPS, StopSignals
from cadapter.training.state import Position, last_sound, save_checkpoint, tagged, unsound
from cadapter.training.warnings import ClassWatch, NormWatch


@dataclass
class Run:
    """The parts of a run, as :func:`cadapter.training.build.build_run` makes them."""

    config: Config
    world: World
    layout: Layout
    directory: RunDirectory
    pipeline: Pipeline
    loss: TrainingLoss
    mode: Mode
    trained: Trained
    gradients: Gradients
    groups: GradientGroups
    optimiser: Optimiser
    rehearsal: Rehearsal
    plan: BatchPlan
    batches: StepBatches
    evaluation: EvaluationBatches | None
    evaluation_accumulation: int
    sampler: Sampler | None
    facts: dict[str, Any]
    position: Position


@dataclass
class _Pending:
    """A step whose numbers are still on their way to the host."""

    step: int
    tokens: int
    seconds: float
    step_seconds: float
    step_tokens: int
    lr: float
    gradient_norm: float
    skipped: int
    numbers: Tensor
    report_shape: torch.Size
    arrived: Any


class Trainer:
    """Trains a run from its position to its end.

    Raises (from :meth:`train`):
        Stopped: a signal asked for it; a checkpoint was written first.
        CadapterError: too many steps were skipped.
    """

    def __init__(self, run: Run, reporter: Reporter | None, signals: StopSignals) -> None:
        self.run = run
        self.reporter = reporter
        self.signals = signals
        self.position = run.position
        self._pending: _Pending | None = None
        self._prefetched: tuple[int, list[PipelineBatch]] = (0, [])
        self._evaluations = evaluation_steps(run.config.evals_per_run if run.evaluation else 0, run.plan.total_steps)
        self._last_checkpoint = time.monotonic()
        self._checkpointed_step = self.position.step
        self._told_bound = False
        self._norm_watch, self._class_watch = NormWatch(), ClassWatch(run.evaluation is not None)

    def train(self) -> None:
        """Take all remaining steps; afterwards ``final/`` is there."""
        if self._goes_on and self.run.rehearsal.is_needed:
            self._rehearse()
        self._evaluate_if_due()
        while self._goes_on:
            stop, save = self._step()
            if self.position.skipped > self.run.config.max_skipped_steps:
                self._flush()
                raise self._too_many_skipped()
            step, plan = self.position.step, self.run.plan
            stops = stop and step < plan.total_steps
            if not stops:  # whoever stops a run does not wait for long; going on, it evaluates first
                self._evaluate_if_due()
            if plan.ends_epoch(step):
                self._save_adapter(self.run.directory.epoch(plan.epoch_of(step)))
            if save or stop or plan.ends_epoch(step):
                self._save_checkpoint()
            if stops:
                self._flush()
                raise Stopped(f"Stopped after step {self.position.step}; a checkpoint is saved.", stop)
        self._flush()
        self._save_checkpoint()
        self._save_adapter(self.run.directory.final)

    @property
    def _goes_on(self) -> bool:
        """Whether another step is to be taken."""
        return self.position.step < self.run.plan.total_steps and not self.position.is_enough(self._patience)

    @property
    def _patience(self) -> int | None:
        return self.run.config.early_stopping_patience if self.run.evaluation is not None else None

    def _too_many_skipped(self) -> CadapterError:
        """What ends a run whose gradients are not finite any more, and from where it can go on."""
        config, position, checkpoints = self.run.config, self.position, self.run.directory.checkpoints
        found, broken = last_sound(checkpoints, position), [path.name for path in unsound(checkpoints, position)]
        remove = f"; remove {', '.join(broken)}, written when gradients were no longer finite" if broken else ""
        decay = "" if config.full_fine_tune else " or raise lora_weight_decay"
        go_on = "go on: --resume-from-checkpoint" if found else "start again: --force"
        return CadapterError(
            f"Step {position.step}: {position.skipped} steps were skipped, since a gradient was not finite; "
            f"max_skipped_steps = {config.max_skipped_steps} allows no more.\n"
            + (f"The last good checkpoint is {found}{remove}.\n" if found else "There is no good checkpoint.\n")
            + f"Lower lr (it is {config.lr:g}){decay}, and {go_on} --set lr=VALUE"
        )

    def _enter(self, phase: str) -> None:
        """Something else begins: tell the other processes, and whoever watches."""
        self.run.world.watch.enter(phase)
        if self.reporter is not None:
            self.reporter.phase(phase)

    # ---- one step -------------------------------------------------------------------------------------------------

    def _step(self) -> tuple[int, bool]:
        """Take one optimiser step; return the signal that asks to stop (0: none) and whether to save a checkpoint."""
        run, step = self.run, self.position.step + 1
        started = time.monotonic()
        run.world.watch.enter(f"step {step}")
        if self.reporter is not None:
            self.reporter.phase("training")
        lr = run.config.lr * self._schedule(step)
        self._forward_and_backward(step)
        # While the GPU works on that: report the step before, read the sequences of the step after.
        self._flush()
        if step < run.plan.total_steps:
            self._prefetched = step + 1, self._micro_batches(step + 1)
            run.pipeline.look_ahead(self._prefetched[1][0])
        run.gradients.reduce(run.groups)
        norm, stop, save = self._agree()
        self.position.count_step(step, was_skipped=not math.isfinite(norm))
        if math.isfinite(norm):
            clip = run.config.gradient_clipping
            run.optimiser.step(lr, clip / (norm + 1e-6) if clip else 1.0, run.gradients)
            report = run.trained.after_step(lr)
        else:
            report = run.trained.after_step(0.0)
            if run.world.is_main:
                warn(f"step {step}: a gradient is not finite; the step is skipped ({self.position.skipped} so far).")
        run.gradients.clear()
        memory = torch.zeros(run.world.size, dtype=torch.float64, device=run.world.device)
        memory[run.world.rank] = peak_memory(run.world.device)
        numbers = torch.cat([run.loss.take_sums(), memory, report.flatten() * (run.layout.replica == 0)])
        tokens = run.batches.totals(step).tokens
        self.position.tokens += tokens
        self.position.sequences = run.plan.read_by(step)
        seconds = time.monotonic() - started
        self.position.seconds += seconds
        self._pending = self._send(numbers, report.shape, lr, norm, seconds, tokens)
        return stop, save

    def _rehearse(self) -> None:
        """See to it that the next step fits every GPU, while all processes can still choose otherwise."""
        step = self.position.step + 1
        self._enter("rehearsal of a step")
        self._prefetched = step, self._micro_batches(step)
        self.run.rehearsal.run(self._micro_batches(step)[0])

    def _forward_and_backward(self, step: int) -> None:
        """Run the step's micro-batches; where memory runs out and the choice is ours, again with less kept."""
        run = self.run
        while True:
            try:
                return run.pipeline.train(self._micro_batches(step))
            except torch.OutOfMemoryError:
                less = run.rehearsal.slower
                if less is None or run.world.size > 1:  # other processes would wait for this one
                    raise
            # Here, since the error holds on to the tensors of where it arose.
            run.rehearsal.keep_less(less)
            warn(f"step {step}: GPU memory ran out; going on with activation_checkpointing = {less!r}.")

    def _micro_batches(self, step: int) -> list[PipelineBatch]:
        """The micro-batches of ``step`` that this process's replica reads."""
        ready, batches = self._prefetched
        if ready == step:
            return batches
        run, config = self.run, self.run.config
        size, accumulation = config.micro_batch_size, config.gradient_accumulation_steps
        return list(training_micro_batches(run.batches, step, run.layout, size, accumulation, run.loss.settings))

    def _schedule(self, step: int) -> float:
        config = self.run.config
        return schedule_factor(config.lr_schedule, step, self.run.plan.total_steps, config.warmup_steps, config.beta2)

    def _agree(self) -> tuple[float, int, bool]:
        """Sum up what all processes must know alike: the global gradient norm, a stop signal, a due checkpoint."""
        run = self.run
        squares = run.gradients.squared_norm(run.world.device)
        hours = (time.monotonic() - self._last_checkpoint) / 3600
        save_asked, self.signals.save = self.signals.save, False
        due = run.world.is_main and hours >= run.config.checkpoint_interval_hours
        # Gradients are equal on all replicas after their reduction, so one replica's count.
        flags = torch.tensor(
            [*(self.signals.stop == number for number in STOPS), save_asked or due],
            dtype=torch.float64,
            device=run.world.device,
        )
        values = torch.cat([squares.reshape(1) * (run.layout.replica == 0), flags])
        total, *asked, save = sum_over_world(values).tolist()
        every = run.config.checkpoint_interval_steps
        by_steps = every is not None and (self.position.step + 1) % every == 0
        stop = next((int(number) for number, processes in zip(STOPS, asked, strict=True) if processes), 0)
        return math.sqrt(total), stop, bool(save) or by_steps

    def _send(
        self, numbers: Tensor, report_shape: torch.Size, lr: float, norm: float, seconds: float, tokens: int
    ) -> _Pending:
        """Sum a step's numbers over the processes and start their way to the host, without waiting for it."""
        summed, arrived = sum_over_world(numbers), None
        if summed.is_cuda:
            host = torch.empty(summed.shape, dtype=summed.dtype, pin_memory=True)
            host.copy_(summed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            summed = host
        position = self.position
        return _Pending(
            position.step,
            position.tokens,
            position.seconds,
            seconds,
            tokens,
            lr,
            norm,
            position.skipped,
            summed,
            report_shape,
            arrived,
        )

    def _flush(self) -> None:
        """Report the step whose numbers are on their way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None or self.reporter is None:
            return
        if pending.arrived is not None:
            pending.arrived.synchronize()
        sums = dict(zip(SUMS, pending.numbers[: len(SUMS)].tolist(), strict=True))
        memory, report = pending.numbers[len(SUMS) :].split([self.run.world.size, pending.report_shape.numel()])
        norms = self.run.trained.norms(report.view(pending.report_shape))
        if norms is not None:
            self._tell_bound(norms, pending)
        totals = self.run.batches.totals(pending.step)
        values = self._loss_metrics("train", sums, totals.neutral) | {
            "train/lr": pending.lr,
            "train/grad_norm": pending.gradient_norm,
            "train/tokens_per_second": pending.step_tokens / max(pending.step_seconds, 1e-9),
            "train/skipped_steps": pending.skipped,
            **(norms.metrics() if norms else {}),
        }
        epoch = self.run.plan.epoch_of(pending.step)
        self.reporter.training_step(
            pending.step, epoch, pending.tokens, pending.seconds, values, norms.frobenius if norms else None,
            norms.guideline if norms else None, memory_in_words(memory.max().item(), self.run.world.device),
        )  # fmt: skip
        passed = self._norm_watch.look(norms.guideline if norms else None)
        apart = self._class_watch.after_step(values.get("train/loss_pos"), values.get("train/loss_neg"))
        for text in filter(None, [passed, apart]):
            warn(f"step {pending.step}: {text}")

    def _tell_bound(self, norms: Norms, pending: _Pending) -> None:
        """Say once that the bound of the weight decay acts."""
        if norms.bounded and not self._told_bound:
            self._told_bound = True
            warn(
                f"step {pending.step}: weight decay is bounded in {norms.bounded} of {len(norms.frobenius)} adapters, "
                f"since lr·λ = {pending.lr * self.run.config.lora_weight_decay:.3g} would overshoot; lower lr or "
                "lora_weight_decay. This is said once."
            )

    def _loss_metrics(self, prefix: str, sums: dict[str, float], neutral_positions: int) -> dict[str, float]:
        """Means from sums; a class without tokens has no mean."""
        settings, applications = self.run.loss.settings, self.run.loss.settings.applications
        count = sums["tokens_pos"] + sums["tokens_neg"]
        weighted = settings.positive * sums["tokens_pos"] + settings.negative * sums["tokens_neg"]
        means = {
            "loss": (sums["weighted_nll"], weighted),
            "loss_pos": (sums["nll_pos"], sums["tokens_pos"]),
            "loss_neg": (sums["nll_neg"], sums["tokens_neg"]),
            "top1_accuracy": (sums["correct"], count),
        }
        if settings.neutral > 0:
            means["loss_neutral"] = (sums["neutral"], applications * neutral_positions)
        return {f"{prefix}/{name}": total / number for name, (total, number) in means.items() if number > 0}

    # ---- now and then ---------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        run, step = self.run, self.position.step
        if run.evaluation is None or step not in self._evaluations or self.position.evaluated >= step:
            return
        # No block keeps anything for a backward pass here.
        with advising(run.world, lambda: training_advice(run.config, run.mode, run.world.size, kept=None)):
            self._evaluate(run.evaluation)

    def _evaluate(self, evaluation: EvaluationBatches) -> None:
        run, step = self.run, self.position.step
        self._flush()
        self._enter(f"evaluation after step {step}")
        run.loss.take_sums()
        count = len(evaluation) * run.evaluation_accumulation
        run.pipeline.evaluate(evaluation_micro_batches(evaluation, run.loss.settings), count)
        numbers = sum_over_world(run.loss.take_sums())
        sums = dict(zip(SUMS, numbers.tolist(), strict=True))
        neutral = sum(evaluation.totals(number).neutral for number in range(len(evaluation)))
        values = self._loss_metrics("eval", sums, neutral)
        epoch = run.plan.epoch_of(max(step, 1))
        if self.reporter is not None:
            self.reporter.evaluation(step, epoch, self.position.tokens, self.position.seconds, values)
            apart = self._class_watch.after_evaluation(values.get("eval/loss_pos"), values.get("eval/loss_neg"))
            if apart:
                warn(f"evaluation after step {step}: {apart}")
        self._write_samples(epoch)
        if self.position.count_evaluation(values.get("eval/loss", math.inf)):
            self._save_adapter(run.directory.best)
        if self._checkpointed_step == step:  # before this evaluation, which may be the one that ends the run
            self._checkpointed_step = -1
        if self.position.is_enough(self._patience) and step < run.plan.total_steps and run.world.is_main:
            note(self.position.why_enough())

    def _write_samples(self, epoch: int) -> None:
        """Continue the config's prompts with what is trained as it is now."""
        run, position = self.run, self.position
        if run.sampler is None:
            return
        self._enter(f"samples after step {position.step}")
        samples, trouble = run.sampler.samples()
        if self.reporter is None:
            return
        if trouble:
            warn(f"samples after step {position.step}: none at strength −1: {trouble}")
        self.reporter.samples(position.step, epoch, position.tokens, position.seconds, samples)

    def _save_adapter(self, target: Path) -> None:
        """Write what is trained, of all stages, as directory ``target``, replacing an earlier one whole."""
        run = self.run
        self._enter(f"writing {target.name}")

        def write(parts: Iterator[dict[str, Tensor]]) -> None:
            with new_directory(target, force=True, moved=run.world.watch.moved) as temporary:
                writer = run.mode.writer(temporary)
                for part in parts:
                    writer.add(part)
                writer.finish()

        stream_to_main(run.mode.parts(run.pipeline.layers()), run.layout.stage_leaders(), run.world, write)

    def _save_checkpoint(self) -> None:
        run = self.run
        if self._checkpointed_step == self.position.step:
            return
        self._flush()
        self._enter(f"writing the checkpoint of step {self.position.step}")
        own = run.trained.parameters().keys() - run.trained.copies
        moments = tagged(run.optimiser.state(own))

        def write(parts: Iterator[dict[str, Tensor]]) -> None:
            kept = run.config.max_checkpoints
            settings = settings_of(run.config)
            save_checkpoint(
                run.directory.checkpoints, self.position, run.facts, parts, run.mode.writer, kept, settings,
                run.world.watch.moved,
            )  # fmt: skip

        parts = chain(run.mode.parts(run.pipeline.layers()), moments)
        stream_to_main(parts, run.layout.stage_leaders(), run.world, write)
        barrier()
        self._checkpointed_step = self.position.step
        self._last_checkpoint = time.monotonic()
