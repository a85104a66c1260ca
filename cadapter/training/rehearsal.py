"""A step rehearsed before the first one is taken: whether the memory of every GPU is enough for it.

Once processes exchange micro-batches, one whose memory runs out leaves the others waiting, and the run ends. So each
does first, alone, what a step asks of it when most micro-batches are under way. Where that is too much for one of
them, all keep less and try again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cadapter.models.layers import CarrierFormat, DecoderLayer
from cadapter.terminal import warn
from cadapter.training.distributed import GradientGroups, World, sum_over_world
from cadapter.training.engine import Pipeline, PipelineBatch
from cadapter.training.failures import end_with_another
from cadapter.training.gradients import Gradients
from cadapter.training.layout import Layout
from cadapter.training.losses import TrainingLoss
from cadapter.training.optimiser import Optimiser
from cadapter.training.recompute import slower

SPARE_BYTES = 256 * 2**20
"""What must be left beside a rehearsed step. It is an allowance: later steps find memory in other pieces than the
first, and NCCL may take more when it chooses another algorithm than for the messages sent here. Between two H100s 132
MiB more were taken outside of PyTorch at the end of a run than after its rehearsal (benchmarks/gpu_layouts.py)."""


def can_run_out(device: torch.device) -> bool:
    """Whether too large a step would be told of by an OutOfMemoryError."""
    return device.type == "cuda"


@dataclass
class Rehearsal:
    """Finds out what blocks can keep.

    Attributes:
        world, layout, pipeline, loss, gradients, groups, optimiser: those of the run.
        carrier: what travels from stage to stage.
        hidden_size, dtype: of the hidden states.
        keep: what blocks keep, which may become less; None: what the user says, which stays.
    """

    world: World
    layout: Layout
    pipeline: Pipeline
    loss: TrainingLoss
    gradients: Gradients
    groups: GradientGroups
    optimiser: Optimiser
    carrier: CarrierFormat
    hidden_size: int
    dtype: torch.dtype
    keep: str | None

    @property
    def is_needed(self) -> bool:
        """Whether memory may run out in one of several processes, and something could be done about it."""
        return self.keep is not None and self.world.size > 1 and can_run_out(self.world.device)

    def run(self, micro_batch: PipelineBatch) -> None:
        """Rehearse until a step fits; nothing is left of it but what blocks keep.

        Args:
            micro_batch: one of the next step.

        Raises:
            torch.OutOfMemoryError: it does not fit here, whatever is kept.
            CadapterError: it does not fit in another process.
        """
        received = self._connected(micro_batch)
        while True:
            error = self._attempt(micro_batch, received)
            ran_out, less = error is not None, self.slower
            if less is not None:
                error = None  # it holds on to the tensors of where it arose, and the next lines need a little memory
            failed = self._ranks_where(ran_out)
            if not failed:
                break
            if error is not None:
                raise error
            if less is None:
                raise end_with_another(f"GPU memory ran out on {self._named(failed)}.", self.world)
            self.keep_less(less)
            if self.world.is_main:
                warn(
                    f"rehearsal of a step: GPU memory ran out on {self._named(failed)}; "
                    f"going on with activation_checkpointing = {less!r}."
                )
        self.forget()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)  # what was held here is no part of the run's

    @property
    def slower(self) -> str | None:
        """What blocks could keep instead to take less memory; None: there is no such choice."""
        return None if self.keep is None else slower(self.keep)

    def keep_less(self, keep: str) -> None:
        """Let go of a step for which memory ran out, and have all blocks keep what :attr:`slower` said."""
        self.keep = keep
        for layer in self.pipeline.layers():
            if isinstance(layer, DecoderLayer):
                layer.keep = keep
        self.forget()

    def forget(self) -> None:
        """Let go of all that a step has computed so far, and of memory that PyTorch holds in stock."""
        self.pipeline.forget()
        self.gradients.clear()
        self.loss.take_sums()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _connected(self, micro_batch: PipelineBatch) -> tuple[Tensor, ...]:
        """Use each connection between processes once; return what a later stage receives.

        NCCL takes memory outside of PyTorch's when a connection is first used. It is taken here, so that what a
        rehearsed step finds is what is left.
        """
        inputs, _ = micro_batch
        rows, length = inputs[0].shape
        numbers = rows * length * self.hidden_size
        # Any numbers will do that are not all alike; random ones would change what is drawn later.
        hidden = torch.linspace(-1, 1, numbers, dtype=self.dtype, device=self.world.device)
        hidden = hidden.view(rows, length, self.hidden_size)
        self.pipeline.connect(hidden)
        self.gradients.reduce(self.groups)
        self.gradients.clear()
        return () if self.layout.first_stage else self.carrier.start(hidden, inputs)

    def _attempt(self, micro_batch: PipelineBatch, received: tuple[Tensor, ...]) -> torch.OutOfMemoryError | None:
        """Rehearse a step once, with memory taken for what comes later; return the error if there is too little."""
        device = self.world.device
        later = self.optimiser.missing_bytes() + SPARE_BYTES
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                held = torch.empty(later, dtype=torch.uint8, device=device)
                self.pipeline.rehearse(micro_batch, received)
                del held
        except torch.OutOfMemoryError as error:
            return error
        return None

    def _ranks_where(self, failed: bool) -> list[int]:
        """The processes that say so."""
        flags = torch.zeros(self.world.size, device=self.world.device)
        flags[self.world.rank] = failed
        return sum_over_world(flags).nonzero().flatten().tolist()

    def _named(self, ranks: list[int]) -> str:
        stages = self.layout.stages
        return ", ".join(
            f"rank {rank}" + (f" (stage {self.layout.stage_of(rank)} of {stages})" if stages > 1 else "")
            for rank in ranks
        )
