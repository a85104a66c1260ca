"""The memory of a pipeline stage's GPU in training, by what it goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from cadapter.models.loss import chunk_length
from cadapter.planning.blocks import FLOAT32, Block

GIB = 2**30
CONTEXT_BYTES = GIB // 2
"""What CUDA itself takes of a GPU, which PyTorch does not count."""
WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS works in."""
LOGIT_COPIES = 3
"""How many float32 chunks of logits there are at once: products, softmax, gradient."""


class TrainedBytes(NamedTuple):
    """Bytes for each trained number.

    Attributes:
        weight: of the number itself, where it is none of the model's own.
        gradient: in which its gradient adds up.
        optimiser: Adam's two moments, and below float32 Kahan's compensation.
    """

    weight: int
    gradient: int
    optimiser: int


@dataclass(frozen=True)
class RunSizes:
    """A run in numbers, as far as its memory, traffic and time depend on them.

    Attributes:
        kind: "control", "lora" or "full".
        layer_bytes: bytes of weights of each pipeline layer (embedding, blocks, norm with head) on the GPU; where the
            head is tied, those of the embedding as well.
        trainable: trained numbers of each pipeline layer.
        per_number: bytes of each.
        blocks: the decoder blocks, in order.
        hidden: H.
        vocabulary: rows of the head's weight.
        number_bytes: of one number of the hidden states.
        tokens: T, of a sequence.
        rows: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        compiled: whether blocks are compiled.
        four_bit: whether their weights are held in 4 bits.
        tied: whether the head's weight is the embedding's: one tensor where one stage holds both, else two copies, of
            which the embedding's is on the host unless it is trained.
        penalty, dropout, positions: which optional parts travel from stage to stage.
    """

    kind: str
    layer_bytes: tuple[int, ...]
    trainable: tuple[int, ...]
    per_number: TrainedBytes
    blocks: tuple[Block, ...]
    hidden: int
    vocabulary: int
    number_bytes: int
    tokens: int
    rows: int = 1
    accumulation: int = 1
    compiled: bool = False
    four_bit: bool = False
    tied: bool = False
    penalty: bool = False
    dropout: bool = False
    positions: bool = False

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.tokens

    @property
    def stream_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states."""
        return self.number_bytes * self.hidden * self.micro_batch

    @property
    def first_trained(self) -> int:
        """The first pipeline layer in which something is trained: on its stage no gradient goes further."""
        return next((index for index, count in enumerate(self.trainable) if count), len(self.trainable))

    @property
    def head_trained(self) -> bool:
        """Whether the head's weight, its own or the embedding's, is trained."""
        return self.trainable[-1] >= self.vocabulary * self.hidden or (self.tied and self.trainable[0] > 0)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the GPU of a stage at its peak.

    Attributes:
        weights: of the model.
        adapter: trained numbers beside them.
        gradients, optimiser: of what is trained.
        activations: what blocks keep for the backward pass, of all micro-batches that are under way.
        backward: while one block is computed backwards: what it had not kept, and gradients.
        logits: chunks of logits and their gradient, on the last stage. Of these two the larger counts.
        buffers: what was received from the neighbours, masks, the matrix library's workspace.
    """

    weights: float
    adapter: float
    gradients: float
    optimiser: float
    activations: float
    backward: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it at the peak."""
        always = self.weights + self.adapter + self.gradients + self.optimiser + self.buffers
        return always + self.activations + max(self.backward, self.logits)

    def parts(self) -> dict[str, float]:
        """By name, in bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def in_flight(stage: int, stages: int, accumulation: int) -> int:
    """Micro-batches whose activations a stage keeps at once in the 1F1B schedule: min(S − s, M)."""
    return min(stages - stage, accumulation)


def stage_memory(run: RunSizes, bounds: Sequence[int], stage: int, keep_of: Callable[[int], str]) -> StageMemory:
    """The memory of a stage.

    Args:
        run: the run's sizes.
        bounds: which pipeline layers each stage holds, as one more number than there are stages.
        stage: from 0.
        keep_of: what a decoder block keeps, by its number.
    """
    first, stop, stages = bounds[stage], bounds[stage + 1], len(bounds) - 1
    weights, numbers = sum(run.layer_bytes[first:stop]), sum(run.trainable[first:stop])
    last = stop == len(run.layer_bytes)
    if run.tied and first == 0 and (last or not run.trainable[0]):
        weights -= run.layer_bytes[0]
    if run.tied and last and first > 0:
        numbers += run.trainable[0]
    held = [index - 1 for index in range(first, stop) if 0 < index <= len(run.blocks)]
    # What comes from another stage has a gradient that goes back there, whatever is trained.
    reached = {index: stage > 0 or index + 1 > run.first_trained for index in held}
    shapes = {index: run.blocks[index] for index in held}
    kept = sum(
        block.kept(keep_of(index), run.number_bytes, run.tokens, run.compiled, reached[index])
        for index, block in shapes.items()
    )
    sizes = run.per_number
    return StageMemory(
        weights=weights,
        adapter=numbers * sizes.weight,
        gradients=numbers * sizes.gradient,
        optimiser=numbers * sizes.optimiser,
        activations=kept * run.micro_batch * in_flight(stage, stages, run.accumulation),
        backward=max((_backward(run, index, keep_of(index), reached[index]) for index in held), default=0.0),
        logits=_logits(run) if last else 0.0,
        buffers=_buffers(run, stage, stages, list(shapes.values())),
    )


def _backward(run: RunSizes, index: int, keep: str, reached: bool) -> float:
    """Bytes while a block is computed backwards, beyond what all blocks keep."""
    block = run.blocks[index]
    arguments = (run.number_bytes, run.tokens, run.compiled)
    if not reached and not block.change.numbers:
        return 0.0
    again = block.kept("none", *arguments, reached) - block.kept(keep, *arguments, reached)
    copies = 2 * run.stream_bytes if keep == "offload" else 0  # two streams are on their way back at a time
    # Products in 4 bits unpack one weight at a time.
    unpacked = run.number_bytes * run.hidden * block.shape.inner if run.four_bit else 0
    return (again + block.backward(*arguments)) * run.micro_batch + copies + unpacked


def _logits(run: RunSizes) -> float:
    """Chunks of logits, the final norm's copy, the hidden states' gradient; the head's own where it is trained."""
    rows = min(chunk_length(run.vocabulary), run.micro_batch)
    chunks = LOGIT_COPIES * FLOAT32 * rows * run.vocabulary
    stream = (FLOAT32 + 2 * run.number_bytes) * run.hidden * run.micro_batch
    head = (
        run.vocabulary * run.hidden * (FLOAT32 + run.number_bytes)
        if run.trainable[-1] or (run.tied and run.trainable[0])
        else 0
    )
    return chunks + stream + head


def _buffers(run: RunSizes, stage: int, stages: int, blocks: list[Block]) -> float:
    received = (stage > 0) + (stage < stages - 1)
    under_way = in_flight(stage, stages, run.accumulation)
    kinds = {block.shape.window for block in blocks if block.shape.has_mask(run.tokens)}
    mask = (run.number_bytes if any(block.shape.scores for block in blocks) else 1) * run.tokens**2
    masks = len(kinds) * mask * (run.rows * under_way if run.positions else 1)
    return received * run.stream_bytes + masks + WORKSPACE_BYTES


def all_stages(run: RunSizes, bounds: Sequence[int], keep_of: Callable[[int], str]) -> list[StageMemory]:
    """The memory of every stage."""
    return [stage_memory(run, bounds, stage, keep_of) for stage in range(len(bounds) - 1)]


def heaviest(run: RunSizes, bounds: Sequence[int], keep_of: Callable[[int], str]) -> float:
    """Bytes of the stage that takes the most."""
    return max(each.total for each in all_stages(run, bounds, keep_of))
