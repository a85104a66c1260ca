"""Which decoder blocks are computed again in the backward pass instead of keeping what they computed.

Keeping everything is fastest; recomputing every block keeps one residual stream for each. "auto" keeps everything
where an estimate says that it fits the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEPT_SHARE = 0.85
"""Share of the GPU's free memory that weights and kept activations may take by the estimate."""

BYTES_PER_HIDDEN = 18
BYTES_PER_INTERMEDIATE = 6
"""Bytes that a bfloat16 block of the Llama shape with its adapter keeps for each token, per component of hidden size
(residual streams, norms, queries to attention output, float32 Δh) and of intermediate size (gate, up, product).
0.61 GiB for 4,096 tokens of an 8B model's block, where an H200 showed 0.54 GiB: a little on the safe side."""


@dataclass(frozen=True)
class Recompute:
    """The decision: block i keeps what ``keep`` says where ``i % every == 0``, the others everything; 0: all do.

    ``keep`` is one of :data:`cadapter.models.execution.SHARES`; ``reason`` is for the user.
    """

    every: int
    reason: str = ""
    keep: str = "full"

    def block(self, index: int) -> str:
        """What block ``index`` keeps."""
        return self.keep if self.every > 0 and index % self.every == 0 else "none"


def kept_bytes(config: Any, tokens: int, blocks: int, bytes_per_number: int) -> float:
    """Estimate what ``blocks`` blocks keep of ``tokens`` tokens when nothing is recomputed."""
    per_token = BYTES_PER_HIDDEN * config.hidden_size + BYTES_PER_INTERMEDIATE * config.intermediate_size
    return per_token * tokens * blocks * bytes_per_number / 2


def decide(
    setting: str | int, config: Any, dtype_bytes: int, tokens: int, stages: int, weights: int, free: int | None
) -> Recompute:
    """Decide by the config's ``activation_checkpointing``.

    Args:
        setting: "auto", "none", "full" or N: every Nth block.
        config: the model's.
        dtype_bytes: of one number of the hidden states.
        tokens: that the first stage keeps at once: of one micro-batch for each stage, at most those of a step.
        stages: of the pipeline.
        weights: bytes of weights of the heaviest stage.
        free: bytes of free GPU memory; None on CPU.
    """
    if isinstance(setting, int):
        return Recompute(setting)
    if setting in ("selective", "full", "offload"):
        return Recompute(1, keep=setting)
    if setting == "none" or free is None:
        return Recompute(0)
    blocks = -(-config.num_hidden_layers // stages)
    kept = kept_bytes(config, tokens, blocks, dtype_bytes)
    estimate = f"{(weights + kept) / 2**30:.0f} GiB by estimate, {free / 2**30:.0f} GiB free"
    if weights + kept <= KEPT_SHARE * free:
        return Recompute(0, f"activation_checkpointing: none, since everything fits ({estimate}).")
    return Recompute(1, f"activation_checkpointing: full, since keeping everything may not fit ({estimate}).")
