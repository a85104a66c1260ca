"""Whether a block's modules write what their residual writers give and nothing else, tried on made-up weights.

A conversion changes the weights of residual writers in place of what a module writes. That is right if rows of those
weights, multiplied by some numbers, multiply the module's output by the same numbers: if no writer was missed, no norm
follows one within the module, and none is stored the other way round. Nothing but the model's own code knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cadapter.models.families import MODULES, Family
from cadapter.models.loading import make_skeleton
from cadapter.models.shell import record_calls

TOKENS = 16
"""So many that an activation that is zero for half of all numbers is not zero for each of them."""


@torch.no_grad()
def proven_modules(config: Any, family: Family, layers: Iterable[int]) -> dict[int, frozenset[str]]:
    """Tell by layer which of a block's two modules its residual writers account for.

    Args:
        config: of the model, whose blocks can be cut apart.
        family: its facts, which name the writers.
        layers: blocks to try; of those that are built alike only one is.
    """
    skeleton = make_skeleton(deepcopy(config), torch.float32, "eager")
    skeleton.set_experts_implementation("eager")  # the others want weights that lie in memory one after the other
    hidden = torch.randn(1, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))
    arguments = record_calls(skeleton, hidden)[1]
    found: dict[int, frozenset[str]] = {}
    tried: dict[Any, frozenset[str]] = {}
    for layer in layers:
        block = skeleton.model.layers[layer]
        build = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        if build not in tried:
            tried[build] = _Trial(block, hidden, arguments[layer]).proven(family)
        found[layer] = tried[build]
    return found


@dataclass(frozen=True)
class _Trial:
    """A block without weights, and what it is called with."""

    block: nn.Module
    hidden: Tensor
    arguments: dict[str, Any]

    def proven(self, family: Family) -> frozenset[str]:
        """Those of the two modules whose output follows the rows of their writers."""
        names = [name.removesuffix(".weight") for name, _ in self.block.named_parameters()]
        scale = torch.rand(self.hidden.shape[-1], generator=torch.Generator().manual_seed(1)) + 0.5
        proven = set()
        try:
            plain = self.outputs((), scale)
            for module, writers in zip(MODULES, family.writers_among(names), strict=True):
                expected, found = plain[module] * scale, self.outputs(writers, scale)[module]
                # float32 rounds at 1e-7; what is no product differs as the numbers of scale do
                close = torch.allclose(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
                if close and expected.any():  # zeros would prove nothing
                    proven.add(module)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):  # the model's own code
            return frozenset()
        return frozenset(proven)

    def outputs(self, writers: Collection[str], scale: Tensor) -> dict[str, Tensor]:
        """What the two modules give with made-up weights; the rows of those of ``writers`` times ``scale`` [H]."""
        seen: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        _replace_linears(self.block, writers, scale)
        hooks = [getattr(self.block, name).register_forward_hook(partial(note, name)) for name in MODULES]
        functional_call(self.block, _other_weights(self.block, writers, scale), (self.hidden,), self.arguments)
        for hook in hooks:
            hook.remove()
        return seen


def _replace_linears(block: nn.Module, writers: Collection[str], scale: Tensor) -> None:
    """Have every linear layer of ``block`` compute with a made-up weight ``u·vᵀ``, which takes no memory.

    Biases are left out: those of linear layers are changed as their weights are.
    """
    generator = torch.Generator().manual_seed(2)
    for name, linear in _linears(block).items():
        u, v = _made_up(linear.out_features, linear.in_features, generator)
        u = u * scale if name in writers else u
        linear.forward = partial(_rank_one, u, v)  # type: ignore[method-assign]  # of this skeleton alone


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _made_up(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two vectors of a weight ``u·vᵀ`` [rows, columns] that keeps the size of what it is multiplied with."""
    u = torch.randn(rows, generator=generator)
    return u, torch.randn(columns, generator=generator) / columns**0.5


def _rank_one(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (x @ v)[..., None] * u


def _other_weights(block: nn.Module, writers: Collection[str], scale: Tensor) -> dict[str, Tensor]:
    """Made-up values for what is no linear layer: norms, routers, and fused experts, which are all alike."""
    generator = torch.Generator().manual_seed(3)
    linears = _linears(block)
    weights: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        if name.rpartition(".")[0] in linears:
            continue
        if parameter.ndim < 3:
            weights[name] = torch.randn(parameter.shape, generator=generator)
            continue
        rows, columns = parameter.shape[-2:]
        u, v = _made_up(rows, columns, generator)
        u = u * scale if name in writers else u
        weights[name] = torch.outer(u, v).expand(parameter.shape)
    return weights
