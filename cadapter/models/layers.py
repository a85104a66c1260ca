"""The pipeline's layers: token embedding, decoder blocks, final norm with head; and what travels between them.

What crosses a stage boundary is defined here once, ``pack`` beside ``unpack``. Masks and rotary embeddings are
functions of the sequence length, or of the positions where documents are isolated, and are made on each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cadapter.adapters.control import ClassTransforms, ControlledBlock, Transform
from cadapter.adapters.lora import LoraBlock
from cadapter.models.device import to_device
from cadapter.models.execution import BlockRunner
from cadapter.models.families import LogitFacts
from cadapter.models.loading import CausalLM


class Carrier(NamedTuple):
    """What one micro-batch carries from layer to layer.

    Attributes:
        hidden: the residual stream, [B, T, H].
        codes: which transform each position receives, [B, T] int8: in training its class.
        penalty: the neutral loss summed over the layers so far, [1] float32; None when no neutral examples train.
        dropout_rows: [B] int64, what dropout's masks are a function of; None without dropout.
        positions: [B, T] int64, which begin again with each document; None where documents see those before them.
    """

    hidden: Tensor
    codes: Tensor
    penalty: Tensor | None
    dropout_rows: Tensor | None
    positions: Tensor | None = None


class CarrierFormat(NamedTuple):
    """Which optional parts the carriers of a run have."""

    penalty: bool = False
    dropout: bool = False
    positions: bool = False

    def pack(self, carrier: Carrier) -> tuple[Tensor, ...]:
        """Return the flat tuple that the pipeline engine sends.

        Floating-point tensors come first: the engine pools its receive buffers by place without looking at
        dtypes, and a float behind an integer can deadlock from three stages on.
        """
        parts = [carrier.hidden, carrier.penalty, carrier.codes, carrier.dropout_rows, carrier.positions]
        return tuple(part for part in parts if part is not None)

    def unpack(self, parts: tuple[Tensor, ...]) -> Carrier:
        """Invert :meth:`pack`."""
        rest = list(parts)
        hidden = rest.pop(0)
        penalty = rest.pop(0) if self.penalty else None
        codes = rest.pop(0)
        dropout_rows = rest.pop(0) if self.dropout else None
        return Carrier(hidden, codes, penalty, dropout_rows, rest.pop(0) if self.positions else None)

    def start(self, hidden: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What sets out with hidden states [B, T, H] for a micro-batch, the ``inputs`` of :class:`EmbeddingLayer`."""
        _, codes, rows, *positions = inputs
        penalty = hidden.new_zeros(1, dtype=torch.float32) if self.penalty else None
        kept_rows = to_device(rows, hidden.device) if self.dropout else None
        where = to_device(positions[0], hidden.device) if self.positions else None
        return self.pack(Carrier(hidden, to_device(codes, hidden.device), penalty, kept_rows, where))


class Frame:
    """What every block of one stage is called with besides hidden states: positions, rotary embeddings, masks.

    It is what the model's own forward pass hands to its blocks (see :mod:`cadapter.models.shell`). Where documents see
    those before them it depends on the sequence length alone: it is found out once and kept until another length comes,
    and no longer, since a mask grows with the square of its length. Where they are isolated it depends on the
    positions: it is found out once for each micro-batch, and kept for as long as the micro-batch's positions are, so
    that blocks that are computed again find it.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._length = 0
        self._made: list[dict[str, Any]] = []
        self._isolated: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def arguments(self, hidden: Tensor, index: int, positions: Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments for decoder block ``index`` on hidden states [B, T, H]."""
        if positions is not None:
            if positions not in self._isolated:
                self._isolated[positions] = self._model.isolating_arguments(positions)
            return self._isolated[positions][index]
        length = hidden.shape[1]
        if length != self._length:
            self._made = []  # first, so that there need not be room for both
            self._made, self._length = self._model.block_arguments(length), length
        return self._made[index]


class EmbeddingLayer(nn.Module):
    """First pipeline layer: token ids, codes and dropout rows in, all on the host; a carrier out.

    Args:
        embedding: the table of token embeddings. Where it lies on the host, the rows of a micro-batch are looked up
            there and sent to the device, and the table takes no memory of the device.
        scale: what embeddings are multiplied by.
        carrier: what travels.
        device: where hidden states are.
    """

    def __init__(self, embedding: nn.Module, scale: float, carrier: CarrierFormat, device: torch.device) -> None:
        super().__init__()
        self._place = next(embedding.parameters()).device
        self._table = [embedding]  # in a list: not a submodule, which the pipeline would move to the device
        if self._place == device:
            self.embedding = embedding
        self.scale = scale
        self.carrier = carrier
        self.device = device
        self._ahead: tuple[Tensor, Tensor] | None = None

    @property
    def table(self) -> nn.Module:
        """The module that looks embeddings up."""
        return self._table[0]

    def look_ahead(self, input_ids: Tensor) -> None:
        """Look up on the host, while the GPU works, what the next pass will start with."""
        if self._place != self.device:
            self._ahead = input_ids, self.table(input_ids).pin_memory()

    def _embeddings(self, input_ids: Tensor) -> Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and torch.equal(ahead[0], input_ids):
            return ahead[1]
        return self.table(to_device(input_ids, self._place))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``inputs``: input_ids [B, T] int64, codes [B, T] int8, dropout rows [B] int64, and positions where needed."""
        hidden = to_device(self._embeddings(inputs[0]), self.device)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return self.carrier.start(hidden, inputs)


def run_block(
    block: nn.Module,
    hidden: Tensor,
    codes: Tensor,
    transforms: list[Transform],
    dropout_rows: Tensor | None,
    penalise_neutral: bool,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Call a decoder block, with an adapter of either kind or as it is; its output and its neutral penalty.

    What differs from block to block is in tensors, so that compiled code serves all of them.
    """
    if isinstance(block, LoraBlock):
        return block(hidden, dropout_rows=dropout_rows, **arguments), None
    if not isinstance(block, ControlledBlock):
        return block(hidden, **arguments), None
    return block.controlled(
        hidden,
        codes,
        transforms,
        dropout_rows=dropout_rows,
        penalise_neutral=penalise_neutral,
        kwargs=arguments,
    )


class DecoderLayer(nn.Module):
    """A decoder block, with an adapter of either kind or as it is.

    Args:
        block: the block.
        index: its number in the model.
        frame: what it is called with.
        carrier: what travels.
        keep: what is kept for the backward pass, see :mod:`cadapter.models.execution`.
        runner: of :func:`run_block`.
        classes: where the transforms of the classes come from, for blocks with a Control Adapter.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        frame: Frame,
        carrier: CarrierFormat,
        keep: str,
        runner: BlockRunner,
        classes: ClassTransforms,
    ) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.frame = frame
        self.carrier = carrier
        self.keep = keep
        self.runner = runner
        self.classes = classes
        self.transforms: list[Transform] | None = None

    def set_transforms(self, transforms: list[Transform] | None) -> None:
        """Use these transforms instead of the classes' (None: the classes')."""
        self.transforms = transforms

    def forward(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Carrier in, carrier out."""
        carrier = self.carrier.unpack(parts)
        transforms = self.transforms
        if transforms is None:
            transforms = self.classes.of(self.block.adapter) if isinstance(self.block, ControlledBlock) else []
        hidden, penalty = self.runner(
            self.keep,
            self.block,
            carrier.hidden,
            carrier.codes,
            transforms,
            carrier.dropout_rows,
            carrier.penalty is not None,
            self.frame.arguments(carrier.hidden, self.index, carrier.positions),
        )
        if carrier.penalty is not None and penalty is not None:
            carrier = carrier._replace(penalty=carrier.penalty + penalty)
        return self.carrier.pack(carrier._replace(hidden=hidden))


class HeadInputs(NamedTuple):
    """What the last layer hands to the loss.

    Attributes:
        hidden: normed hidden states, [B, T, H].
        weights: the head's weight [V, H] that all rows share, or one for each of some equal parts of the rows.
        logits: what is done to the products of the two.
        codes, penalty: as in :class:`Carrier`.
    """

    hidden: Tensor
    weights: Sequence[Tensor]
    logits: LogitFacts
    codes: Tensor
    penalty: Tensor | None


def run_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Call the final norm."""
    return norm(hidden)


class HeadLayer(nn.Module):
    """Last pipeline layer: the final norm. The head's weight goes along, since the loss multiplies by it in chunks.

    Args:
        norm: the final norm.
        weights, logits: see :class:`HeadInputs`.
        carrier: what travels.
        run: :func:`run_norm`, as it is or compiled for training.
    """

    def __init__(
        self,
        norm: nn.Module,
        weights: Sequence[nn.Parameter],
        logits: LogitFacts,
        carrier: CarrierFormat,
        run: Callable[[nn.Module, Tensor], Tensor] = run_norm,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.run = run
        self.weights = nn.ParameterList(weights)
        self.logits = logits
        self.carrier = carrier

    def forward(self, parts: tuple[Tensor, ...]) -> HeadInputs:
        """Carrier in, normed hidden states and the head's weight out."""
        carrier = self.carrier.unpack(parts)
        run = self.run if torch.is_grad_enabled() else run_norm
        hidden = run(self.norm, carrier.hidden)
        return HeadInputs(hidden, list(self.weights), self.logits, carrier.codes, carrier.penalty)
