"""LoRA on the linear layers (and, where asked for, the fused experts) of a decoder block.

A linear layer y = W·x becomes

    y = W·x + s·B·(A·(m ∘ x)),    s = alpha / r

with A [r, in], B [out, r] and dropout's mask m (1 outside of training). It is what PEFT's layers compute; experts have
PEFT's own. Products with A and B take their inputs in the dtype of x, as W·x does. Where factors start (A
Kaiming-uniform, B zero) and what is dropped are functions of the run's seed and of names, not of the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadapter.adapters.control import attribute_of, initial_factor
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

    place: Tensor

    def __init__(self, rate: float, place: int, call: _Call, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.rate = rate
        # A tensor, since compiled code would treat each number by itself.
        self.register_buffer("place", torch.tensor(place, device=device), persistent=False)
        self._call = call

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs [B, T, in], or [B·T, in] as some modules flatten them, with the mask applied."""
        rows = self._call.rows
        if not self.training or rows is None:
            return inputs
        by_row = inputs.reshape(len(rows), -1, inputs.shape[-1])
        return inputs * keep_mask(rows, self.place, by_row.shape, self.rate).view_as(inputs).to(inputs.dtype)


class LoraLinear(nn.Module):
    """A linear layer with a pair of factors beside it.

    Args:
        base_layer: a linear layer, frozen; its weight may be in 4 bits.
        settings: rank, scale, dtype of the factors.
        first: A's initial value, [r, in].
        dropout: of what A reads; None: none.
    """

    def __init__(self, base_layer: nn.Linear, settings: LoraSettings, first: Tensor, dropout: nn.Module | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = settings.scale
        self.on = True
        self.dropout = dropout
        self.lora_A = nn.Parameter(first)
        self.lora_B = nn.Parameter(first.new_zeros(base_layer.out_features, settings.rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """W·x + s·B·(A·(m ∘ x)) for inputs [.., in], or W·x alone where it is switched off."""
        output = self.base_layer(inputs)
        if not self.on:
            return output
        dropped = inputs if self.dropout is None else self.dropout(inputs)
        reduced = self.scale * (dropped @ self.lora_A.to(inputs.dtype).T)  # here, where there are few numbers
        return output + reduced @ self.lora_B.to(inputs.dtype).T


class LoraBlock(nn.Module):
    """A decoder block with LoRA in it; it stands in for the block wherever the block is called.

    The block is changed in place and frozen, but for the factors: these are of the settings' dtype, on its device.

    Args:
        block: with its weights, in 4 bits or not.
        layer: its number in the model.
        targets: what LoRA goes to; not empty.
        settings: of all pairs.
        seed: of the run.

    Attributes:
        paths: where the adapted modules are as PEFT names them: module names within the block by target.

    Raises:
        CadapterError: a target is nothing that LoRA can be put on.
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
        # First, since PEFT freezes what it has not made.
        self._experts = _put_on_experts(block, layer, targets, settings, seed, device)
        self._linears: dict[str, LoraLinear] = {}
        for name in targets.linears:
            linear = block.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise _unfit(name, layer, type(linear).__name__)
            first = _first_factor(seed, layer, name, (settings.rank, linear.in_features), settings.dtype, device)
            dropout = None
            if settings.dropout > 0:
                dropout = RowDropout(settings.dropout, PLACES_PER_BLOCK * layer + places[name], self._call, device)
            self._linears[name] = LoraLinear(linear, settings, first, dropout)
            block.set_submodule(name, self._linears[name])
        self.paths = {name: name for name in self._linears} | {name: path for name, (path, _) in self._experts.items()}
        self.train(block.training)

    def __getattr__(self, name: str) -> Any:
        """Give what only the block has, such as the ``attention_type`` that some models read from their layers."""
        return attribute_of(self, "block", name, super().__getattr__)

    def pairs(self) -> dict[str, Pair]:
        """The trained factors, by what they change: its name within the block."""
        rank = self.settings.rank
        pairs = {name: Pair(linear.lora_A, linear.lora_B, rank) for name, linear in self._linears.items()}
        for name, (_, module) in self._experts.items():
            pairs[name] = Pair(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, rank)
        return pairs

    def switch(self, on: bool) -> None:
        """Apply the adapter, as at the start, or be the bare block bit for bit. What is trained stays the same."""
        for linear in self._linears.values():
            linear.on = on
        trained = {parameter: parameter.requires_grad for pair in self.pairs().values() for parameter in pair[:2]}
        for _, module in self._experts.values():
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


def _unfit(name: str, layer: int, reason: str) -> CadapterError:
    return CadapterError(f"LoRA cannot be put on {name} of layer {layer}: {reason}.\nLeave it out of target_modules.")


def _first_factor(
    seed: int, layer: int, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The initial A, [r, in], Kaiming-uniform: a function of (seed, layer, name) only."""
    return initial_factor(seed, layer, f"{name}.lora_A", *shape).to(device, dtype)


def _put_on_experts(
    block: nn.Module, layer: int, targets: Targets, settings: LoraSettings, seed: int, device: torch.device
) -> dict[str, tuple[str, Any]]:
    """Have PEFT put its layers around the fused experts that are targets; the name and module of each, by target."""
    if not targets.experts:
        return {}
    from peft import LoraConfig, inject_adapter_in_model

    # PEFT renames the targets of known model types; within a bare module it takes them as they are.
    holder = nn.Module()
    holder.block = block
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # PEFT says int, and divides by r
        target_modules=[],
        target_parameters=[f"block.{name}" for name in targets.experts],
        init_lora_weights=False,
    )
    try:
        inject_adapter_in_model(config, holder, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise _unfit(", ".join(targets.experts), layer, str(error)) from error
    found = dict(_adapted_experts(block, layer, targets))
    for name, (_, module) in found.items():
        A, B = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        A.weight = nn.Parameter(_first_factor(seed, layer, name, tuple(A.weight.shape), settings.dtype, device))
        B.weight = nn.Parameter(torch.zeros(B.weight.shape, dtype=settings.dtype, device=device))
    return found


def _adapted_experts(block: nn.Module, layer: int, targets: Targets) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Each target, and the name and module of what PEFT put around it; of two in one module, one is in the other."""
    from peft.tuners.lora import LoraLayer

    for name in targets.experts:
        path, _, tensor = name.rpartition(".")
        module: Any = block.get_submodule(path)
        while isinstance(module, LoraLayer) and module.parameter_name != tensor:
            path, module = f"{path}{NESTED}", module.base_layer
        if not isinstance(module, LoraLayer):
            raise _unfit(name, layer, "peft does not know how")
        yield name, (path, module)
