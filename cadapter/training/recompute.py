"""Which decoder blocks are computed again in the backward pass instead of keeping what they computed.

Keeping everything is fastest, and each other choice of :data:`cadapter.models.execution.SHARES` is slower and keeps
less. "auto" takes the fastest that an estimate says will fit the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from cadapter.models.execution import SHARES

FASTEST_FIRST = ("none", "selective", "full", "offload")

USABLE_SHARE = 0.93
"""Share of the GPU's free memory that an estimate may take up."""
USABLE_SHARE_OF_SEVERAL = 0.88
"""The same where several processes train: what does not fit is found out too late to choose again."""

KEPT_BYTES = {
    (True, False): (10, 4),
    (True, True): (14, 6),
    (False, False): (18, 6),
    (False, True): (22, 8),
}
"""Bytes that a bfloat16 block of the Llama shape keeps for each token per component of hidden and of intermediate size,
if it keeps everything: (compiled?, trained inside, so that what weights read is kept as well?). Of the 32 blocks of an
8B model and 4,096 tokens that is 12 GiB for compiled blocks with Control Adapters, as a GPU showed."""
KEPT_BYTES_SELECTIVE = 14
"""The same of a block that is not compiled and keeps its narrow products, per component of hidden size."""

WORKING_BYTES = (8, 16)
"""Bytes for each token, per component of hidden and intermediate size, while one block is computed backwards."""
LOSS_BYTES = 3 * 2**28
"""What the loss takes: three chunks of logits."""


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


@dataclass(frozen=True)
class Needs:
    """What the memory of a GPU goes to in training, by estimate.

    Attributes:
        weights: bytes of the heaviest stage's weights, and of what is trained with its gradients and moments.
        blocks: of a stage.
        hidden_size, intermediate_size: of the model.
        number_bytes: of one number of the hidden states.
        micro_batch: tokens of a micro-batch.
        in_flight: micro-batches that the first stage keeps at once.
        compiled: whether blocks are compiled.
        trained_inside: whether weights within blocks are trained, or factors beside them, and not around blocks.
    """

    weights: float
    blocks: int
    hidden_size: int
    intermediate_size: int
    number_bytes: int
    micro_batch: int
    in_flight: int = 1
    compiled: bool = False
    trained_inside: bool = False

    def bytes(self, keep: str) -> float:
        """With blocks that keep what ``keep`` says."""
        working = self._each(*WORKING_BYTES) * self.micro_batch
        kept = self._kept(keep) * self.blocks * self.micro_batch * self.in_flight
        return self.weights + kept + max(working, LOSS_BYTES)

    def _kept(self, keep: str) -> float:
        """Bytes for each token and block."""
        stream = self._each(2, 0)
        everything = self._each(*KEPT_BYTES[self.compiled, self.trained_inside])
        if keep == "offload":
            return 0
        if keep == "selective" and not self.compiled:
            return self._each(KEPT_BYTES_SELECTIVE, 0)
        return stream + SHARES[keep] * (everything - stream)

    def _each(self, per_hidden: float, per_intermediate: float) -> float:
        in_bfloat16 = per_hidden * self.hidden_size + per_intermediate * self.intermediate_size
        return in_bfloat16 * self.number_bytes / 2


def decide(setting: str | int, needs: Needs, free: int | None, several: bool = False) -> Recompute:
    """Decide by the config's ``activation_checkpointing``.

    Args:
        setting: "auto", what to keep, or N: every Nth block is computed again.
        needs: of the heaviest stage.
        free: bytes of free GPU memory; None on CPU.
        several: whether several processes train.
    """
    if isinstance(setting, int):
        return Recompute(setting)
    if setting != "auto":
        return Recompute(1, keep=setting)
    if free is None:
        return Recompute(0)
    usable = free * (USABLE_SHARE_OF_SEVERAL if several else USABLE_SHARE)
    fitting = [keep for keep in FASTEST_FIRST if needs.bytes(keep) <= usable]
    chosen = fitting[0] if fitting else FASTEST_FIRST[-1]
    gib = 2**30
    what = f"by estimate {needs.bytes(chosen) / gib:.1f} GiB of {free / gib:.1f} GiB free"
    if chosen != FASTEST_FIRST[0]:
        faster = FASTEST_FIRST[FASTEST_FIRST.index(chosen) - 1]
        what += f"; {faster} would take {needs.bytes(faster) / gib:.1f} GiB"
    return Recompute(1, f"activation_checkpointing: {chosen} ({what}).", chosen)


def slower(keep: str) -> str | None:
    """What takes less memory than ``keep``; None: nothing does."""
    place = FASTEST_FIRST.index(keep) + 1
    return FASTEST_FIRST[place] if place < len(FASTEST_FIRST) else None
