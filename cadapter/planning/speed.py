"""How long a stage computes: operations of its products, by what GPUs reach of what they are sold as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cadapter.planning.blocks import Block
from cadapter.planning.machines import Gpu
from cadapter.planning.memory import RunSizes

REACHED = {"control": 0.55, "lora": 0.50, "full": 0.50}
"""The share of a GPU's operations that training reaches with compiled blocks, by what is trained: measured on an H100
for Control Adapters and LoRA, assumed for full fine-tuning."""
NOT_COMPILED = 0.72
"""The speed of blocks that are not compiled, measured."""
IN_4_BITS = 0.96
"""The speed on a base in 4 bits, measured on an H200."""
AGAIN = {"none": 0.0, "selective": 0.4, "full": 0.9, "offload": 0.9}
"""The share of a block's forward pass that is computed again, measured."""


class Seconds(NamedTuple):
    """Of a micro-batch's passes through a stage."""

    forward: float
    backward: float


def _block(run: RunSizes, block: Block, keep: str, reached: bool) -> tuple[float, float]:
    """Operations of a token, forward and backward: 2 for each weight, 2·2·Q for each position that attention sees."""
    shape, change = block.shape, block.change
    seen = run.tokens / 2 if shape.window is None else min(run.tokens / 2, shape.window)
    trained = 0 if run.kind == "full" else change.numbers  # its own weights are trained
    forward = 2.0 * (shape.weights + trained) + 4 * shape.queries * seen
    if not reached and (not change.numbers or change.after):
        return forward, 4.0 * trained
    backward = 2.0 * shape.weights + 8 * shape.queries * seen + 4 * trained
    if run.kind == "full":
        backward += 2 * change.numbers
    return forward, backward + AGAIN[keep] * forward


def stage_operations(
    run: RunSizes, bounds: Sequence[int], stage: int, keep_of: Callable[[int], str]
) -> tuple[float, float]:
    """Operations of a token's passes through a stage. The loss takes its gradient in the forward pass."""
    forward = backward = 0.0
    for layer in range(bounds[stage], bounds[stage + 1]):
        if 0 < layer <= len(run.blocks):
            reached = stage > 0 or layer > run.first_trained
            ahead, back = _block(run, run.blocks[layer - 1], keep_of(layer - 1), reached)
            forward, backward = forward + ahead, backward + back
        elif layer > len(run.blocks):
            forward += (6 if run.head_trained else 4) * run.vocabulary * run.hidden
    return forward, backward


def speed(run: RunSizes, gpu: Gpu) -> float:
    """Operations per second that a GPU will reach in this run."""
    reached = gpu.tflops * 1e12 * REACHED[run.kind]
    return reached * (1 if run.compiled else NOT_COMPILED) * (IN_4_BITS if run.four_bit else 1)


def stage_seconds(run: RunSizes, bounds: Sequence[int], stage: int, keep_of: Callable[[int], str], gpu: Gpu) -> Seconds:
    """Seconds of a micro-batch's passes through a stage."""
    forward, backward = stage_operations(run, bounds, stage, keep_of)
    rate = speed(run, gpu) / run.micro_batch
    return Seconds(forward / rate, backward / rate)
