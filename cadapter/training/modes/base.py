"""What the pipeline, the trainer and the checkpointer ask of a training mode, whichever it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cadapter.adapters.trained import Trained
from cadapter.errors import UsageError
from cadapter.planning.blocks import Change
from cadapter.planning.memory import TrainedBytes
from cadapter.training.state import PartWriter


def trained_bytes(dtype: torch.dtype, gradient: torch.dtype) -> TrainedBytes:
    """Bytes of a trained number, its gradient, and Adam's two moments with, below float32, Kahan's compensation."""
    size = dtype.itemsize
    return TrainedBytes(size, gradient.itemsize, 2 * size + (size if size < 4 else 0))


def check_rank_and_alpha(
    directory: Path, stored: tuple[int, float], wanted: tuple[int, float], scaled: bool = True
) -> None:
    """Make sure that an adapter in ``directory`` has the rank and the alpha that a run wants.

    Args:
        scaled: whether it has a scale; without one there is no alpha to choose, and only the rank counts.

    Raises:
        UsageError: it has others; what the run would have to say is named.
    """
    if not scaled:
        if stored[0] != wanted[0]:
            raise UsageError(
                f"{directory} has rank {stored[0]}; this run has {wanted[0]}.\nSet lora_rank = {stored[0]}."
            )
        return
    if stored[0] != wanted[0] or not math.isclose(stored[1], wanted[1], rel_tol=1e-9):
        raise UsageError(
            f"{directory} has rank {stored[0]} and alpha {stored[1]:g}; this run has {wanted[0]} and {wanted[1]:g}.\n"
            f"Set lora_rank = {stored[0]} and lora_alpha = {stored[1]!r}."
        )


class Mode(Protocol):
    """How a model is trained: what is put into its blocks, what of it is trained, and how that is kept.

    Attributes:
        name: "control", "lora" or "full".
        layers: the decoder blocks that take part.
        per_trained: bytes that each trained number takes besides the weights of the base.
        applications: how often adapters act on a token in the whole model, which the neutral loss averages over.
    """

    name: str
    layers: list[int]

    @property
    def per_trained(self) -> TrainedBytes: ...

    @property
    def applications(self) -> int: ...

    def wrap(self, block: nn.Module, index: int) -> nn.Module:
        """Give decoder block ``index``, just loaded, what is trained in it."""

    def trainable(self) -> list[int]:
        """Trained numbers of each pipeline layer: embedding, blocks, final norm with head."""

    def change(self, index: int) -> Change:
        """What is trained in decoder block ``index``, not yet wrapped, as far as memory depends on it."""

    def trained(self, layers: Sequence[nn.Module]) -> Trained:
        """Choose what is trained among this stage's pipeline layers."""

    def parts(self, layers: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
        """What this stage's pipeline layers contribute to a saved directory, a piece at a time."""

    def writer(self, directory: Path) -> PartWriter:
        """A writer of all stages' parts into ``directory``, on rank 0."""

    def look_up_base(self) -> None:
        """Find out what a saved directory must say of the base, on the process that writes it.

        Before the run: what fails here would end it at its first save.
        """

    def check_start(self, directory: Path) -> None:
        """Make sure that a run can start from what ``directory`` holds, as far as the directory itself says.

        Raises:
            UsageError: it cannot.
        """

    def load(self, layers: Sequence[nn.Module], directory: Path) -> None:
        """Take over what ``directory``, once written by :meth:`writer`, holds for this stage's pipeline layers.

        Raises:
            UsageError: it does not fit.
        """

    def facts(self) -> dict[str, Any]:
        """What a resume must find unchanged."""

    def description(self) -> str:
        """One sentence for the user."""
