"""LoRA on the linear layers (and, where asked for, the fused experts) of a decoder block, through PEFT.

A linear layer y = W·x becomes

    y = W·x + s·B·(A·(m ∘ x)),    s = alpha / r

with A [r, in], B [out, r] and dropout's mask m (1 outside of training). PEFT's layers do the work; where they start
(A Kaiming-uniform, B zero) and what is dropped are functions of the run's seed and of names, not of the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadapter.adapters.control import initial_factor
from cadapter.adapters.dropout import keep_mask
from cadapter.adapters.lora_targets import Targets
from cadapter.errors import CadapterError

ADAPTER = "default"
"""PEFT's name of the adapter within a layer."""

NESTED = ".base_layer"
"""What PEFT puts behind a module's name for a layer within another of its layers."""

PLACES_PER_BLOCK = 1 << 16
"""Distance between the numbers that two blocks' modules have for dropout: more modules than any block holds."""


@dataclass(frozen=True)
class LoraSettings:
    """What the pairs of one run have in common.

    Attributes:
        rank: r.
        alpha: the scale is ``s = alpha / r``.
        dropout: probability with which a component of what a linear layer reads is left out before A, in training.
        dtype: of the factors.
        targets: what LoRA goes to, see :func:`cadapter.adapters.lora_targets.match_targets`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank


class Pair(NamedTuple):
    """The factors of one linear layer or of one tensor of E experts, as PEFT lays them out.

    Attributes:
        A: [r·E, in], expert after expert.
        B: [out, r·E], where column j·E + e is column j of expert e.
        rank: r.
    """

    A: nn.Parameter
    B: nn.Parameter
    rank: int

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """Views of the factors as [E, r, in] and [E, out, r]; a linear layer is one expert."""
        A = self.A.detach().unflatten(0, (-1, self.rank))
        B = self.B.detach().unflatten(1, (self.rank, -1)).permute(2, 0, 1)
        return A, B


class _Call:
    """What one forward pass of a block tells the dropout within it: a number for each row, see ``row_seeds``."""

    rows: Tensor | None = None


class RowDropout(nn.Module):
    """Dropout whose mask is a function of the row, the module and the element; none outside of training.

    Args:
        rate: probability of leaving a component out.
        place: the module's own number in the model.
        call: where the numbers of the rows are found.
    """

    def __init__(self, rate: float, place: int, call: _Call) -> None:
        super().__init__()
        self.rate = rate
        self.place = place
        self._call = call

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs [B, T, in], or [B·T, in] as some modules flatten them, with the mask applied."""
        rows = self._call.rows
        if not self.training or rows is None:
            return inputs
        by_row = inputs.reshape(len(rows), -1, inputs.shape[-1])
        return inputs * keep_mask(rows, self.place, by_row.shape, self.rate).view_as(inputs).to(inputs.dtype)


class LoraBlock(nn.Module):
    """A decoder block with LoRA in it; it stands in for the block wherever the block is called.

    The block is changed in place and frozen, but for the factors: these are of the settings' dtype, on its device.

    Args:
        block: with its weights, in 4 bits (``is_loaded_in_4bit``) or not.
        layer: its number in the model.
        targets: what LoRA goes to; not empty.
        settings: of all pairs.
        seed: of the run.

    Attributes:
        paths: where PEFT put its layers: module names within the block by target.

    Raises:
        CadapterError: PEFT cannot put LoRA on a target.
    """

    def __init__(self, block: nn.Module, layer: int, targets: Targets, settings: LoraSettings, seed: int) -> None:
        super().__init__()
        self.block = block
        self.layer = layer
        self.settings = settings
        self._call = _Call()
        places = {name: place for place, (name, _) in enumerate(block.named_modules())}
        device = next(block.parameters()).device
        block.requires_grad_(False)
        _inject(block, layer, targets, settings)
        found = list(_adapted_modules(block, layer, targets))
        self.paths = {name: path for name, path, _ in found}
        self._adapted = {name: module for name, _, module in found}
        for name, module in self._adapted.items():
            _initialise(module, seed, layer, name, settings.dtype, device)
            if settings.dropout > 0 and name in targets.linears:
                place = PLACES_PER_BLOCK * layer + places[name]
                module.lora_dropout[ADAPTER] = RowDropout(settings.dropout, place, self._call)
        self.train(block.training)

    def __getattr__(self, name: str) -> Any:
        """Give what only the block has, such as the ``attention_type`` that some models read from their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":  # while the module is being made, or unpickled
                raise
            return getattr(super().__getattr__("block"), name)

    def pairs(self) -> dict[str, Pair]:
        """The trained factors, by what they change: its name within the block."""
        rank = self.settings.rank
        return {
            name: Pair(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, rank)
            for name, module in self._adapted.items()
        }

    def switch(self, on: bool) -> None:
        """Apply the adapter, as at the start, or be the bare block bit for bit. What is trained stays the same."""
        trained = {parameter: parameter.requires_grad for pair in self.pairs().values() for parameter in pair[:2]}
        for module in self._adapted.values():
            module.enable_adapters(on)
        for parameter, was_trained in trained.items():  # PEFT freezes what it switches off
            parameter.requires_grad_(was_trained)

    def forward(self, hidden: Tensor, *args: Any, dropout_rows: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the block as it would be called without LoRA.

        Args:
            hidden: the residual stream, [B, T, H].
            dropout_rows: [B] int64, one number per row that dropout's masks are a function of; None: no dropout.
            args, kwargs: what else the block is called with.
        """
        self._call.rows = dropout_rows
        try:
            return self.block(hidden, *args, **kwargs)
        finally:
            self._call.rows = None


def _inject(block: nn.Module, layer: int, targets: Targets, settings: LoraSettings) -> None:
    """Have PEFT put its layers around the targets, with factors that have no memory yet."""
    from peft import LoraConfig, inject_adapter_in_model

    # PEFT renames the targets of known model types; within a bare module it takes them as they are.
    holder = nn.Module()
    holder.block = block
    holder.is_loaded_in_4bit = bool(getattr(block, "is_loaded_in_4bit", False))  # type: ignore[assignment]  # a flag
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # PEFT says int, and divides by r
        target_modules=[f"block.{name}" for name in targets.linears],
        target_parameters=[f"block.{name}" for name in targets.experts] or None,
        init_lora_weights=False,
    )
    try:
        inject_adapter_in_model(config, holder, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise CadapterError(f"peft cannot put LoRA in layer {layer}: {error}") from error


def _adapted_modules(block: nn.Module, layer: int, targets: Targets) -> Iterator[tuple[str, str, Any]]:
    """Each target, and the name and module of what PEFT put around it; of two in one module, one is in the other."""
    from peft.tuners.lora import LoraLayer

    for name in targets.names:
        owner, _, tensor = name.rpartition(".")
        path = owner if name in targets.experts else name
        module: Any = block.get_submodule(path)
        while name in targets.experts and isinstance(module, LoraLayer) and module.parameter_name != tensor:
            path, module = f"{path}{NESTED}", module.base_layer
        if not isinstance(module, LoraLayer):
            raise CadapterError(f"peft cannot put LoRA on {name} of layer {layer}.\nLeave it out of target_modules.")
        yield name, path, module


def _initialise(module: Any, seed: int, layer: int, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A Kaiming-uniform, B zero: a function of (seed, layer, name) only."""
    A, B = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    first = initial_factor(seed, layer, f"{name}.lora_A", *A.weight.shape)
    A.weight = nn.Parameter(first.to(device, dtype))
    B.weight = nn.Parameter(torch.zeros(B.weight.shape, dtype=dtype, device=device))
