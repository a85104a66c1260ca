"""Which decoder blocks are computed again in the backward pass instead of keeping what they computed.

Keeping everything is fastest, and each other choice of :data:`cadapter.models.execution.SHARES` is slower and keeps
less. "auto" takes the fastest that an estimate says will fit the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cadapter.planning.memory import RunSizes, heaviest

FASTEST_FIRST = ("none", "selective", "full", "offload")

USABLE_SHARE = 0.93
"""Share of the GPU's free memory that an estimate may take up."""


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


def usable_bytes(free: float) -> float:
    """Of free GPU memory, what an estimate may take up."""
    return free * USABLE_SHARE


def decide(setting: str | int, needed: Callable[[str], float], free: float | None) -> Recompute:
    """Decide by the config's ``activation_checkpointing``.

    Args:
        setting: "auto", what to keep, or N: every Nth block is computed again.
        needed: bytes of the heaviest stage, if all its blocks keep what is named.
        free: bytes of free GPU memory; None on CPU.
    """
    if isinstance(setting, int):
        return Recompute(setting)
    if setting != "auto":
        return Recompute(1, keep=setting)
    if free is None:
        return Recompute(0)
    fitting = [keep for keep in FASTEST_FIRST if needed(keep) <= usable_bytes(free)]
    chosen = fitting[0] if fitting else FASTEST_FIRST[-1]
    gib = 2**30
    what = f"by estimate {needed(chosen) / gib:.1f} GiB of {free / gib:.1f} GiB free"
    if chosen != FASTEST_FIRST[0]:
        faster = FASTEST_FIRST[FASTEST_FIRST.index(chosen) - 1]
        what += f"; {faster} would take {needed(faster) / gib:.1f} GiB"
    return Recompute(1, f"activation_checkpointing: {chosen} ({what}).", chosen)


def recompute_for(setting: str | int, run: RunSizes, bounds: Sequence[int], free: float | None) -> Recompute:
    """:func:`decide` for a run of these sizes, cut at ``bounds``."""
    if setting == "auto" and run.four_bit and any(block.shape.experts for block in run.blocks):
        return Recompute(1, "activation_checkpointing: full, since experts in 4 bits would be kept unpacked otherwise.")
    return decide(setting, lambda keep: heaviest(run, bounds, lambda _: keep), free)


def in_a_word(recompute: Recompute) -> str | int:
    """The setting that a decision comes to."""
    if recompute.every > 1:
        return recompute.every
    return recompute.keep if recompute.every else "none"


def slower(keep: str) -> str | None:
    """What takes less memory than ``keep``; None: nothing does."""
    place = FASTEST_FIRST.index(keep) + 1
    return FASTEST_FIRST[place] if place < len(FASTEST_FIRST) else None
