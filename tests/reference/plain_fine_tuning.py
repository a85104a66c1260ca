"""Fine-tuning as one would write it for a single process: Hugging Face's model, PEFT's LoRA, autograd, Adam.

Sequence by sequence, with Adam as in its paper and LoRA's decay through W as a full matrix. What a model computes in
is up to the caller: a float64 model gives what float32 runs are measured against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cadapter.adapters.control import initial_factor
from cadapter.config import Config
from cadapter.data import prepare_data
from cadapter.data.batches import BatchPlan
from tests.reference.naive import full_matrix

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]
"""LoRA factors (A [r, in], B [out, r]) by the name that the module has in the base."""


@dataclass(frozen=True)
class Settings:
    """What a run leaves open; ``decay`` is λ and ``scale`` LoRA's alpha / r."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-6
    clipping: float = 1.0
    decay: float = 0.0
    scale: float = 1.0


def steps_of(config: Config, count: int, sequences_per_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``count`` steps' sequences of a run: token ids and whether each token is trained, both [N, S]."""
    packed = prepare_data(config).train
    plan = BatchPlan(len(packed), sequences_per_step, config.epochs, config.max_steps, config.seed)
    for step in range(1, count + 1):
        ids, _, trained = (torch.from_numpy(each) for each in packed.rows(plan.indices(step)))
        yield ids.long(), trained


def losses_of(model: Any, ids: Tensor, trained: Tensor) -> Tensor:
    """−log p of every trained token of the sequences ``ids`` [N, S], one after the other."""
    found = []
    for row, counted in zip(ids, trained[:, 1:], strict=True):
        logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1].double()
        found.append(nn.functional.cross_entropy(logits, row[1:], reduction="none")[counted])
    return torch.cat(found)


def mean_loss(model: Any, ids: Tensor, trained: Tensor) -> float:
    """The mean over all trained tokens, without gradients."""
    with torch.no_grad():
        return losses_of(model, ids, trained).mean().item()


def with_lora(model: Any, rank: int, seed: int, targets: Sequence[str]) -> tuple[Any, Pairs]:
    """PEFT's rank-stabilised LoRA on ``model``, at the start of a run with ``seed``; and its factors."""
    dtype = next(model.parameters()).dtype
    config = LoraConfig(r=rank, lora_alpha=1, use_rslora=True, target_modules=list(targets))
    wrapped = get_peft_model(model, config)
    pairs: Pairs = {}
    for name, module in wrapped.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, own_name = name.partition(".layers.")[2].split(".", 1)
        A, B = module.lora_A["default"], module.lora_B["default"]
        start = initial_factor(seed, int(layer), f"{own_name}.lora_A", *A.weight.shape)
        A.weight = nn.Parameter(start.to(dtype))
        B.weight = nn.Parameter(torch.zeros_like(B.weight, dtype=dtype))
        pairs[f"layers.{layer}.{own_name}"] = (A.weight, B.weight)
    return wrapped, pairs


class PlainFineTuning:
    """Trains ``parameters`` of ``model``.

    Args:
        model: in which they are; anything with ``logits``.
        parameters: each once.
        settings: of the run.
        pairs: those parameters that are LoRA's factors, which decay.
    """

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], settings: Settings, pairs: Pairs | None = None):
        self.model = model.requires_grad_(False)
        self.parameters = [parameter.requires_grad_() for parameter in parameters]
        self.settings = settings
        self.pairs = pairs or {}
        self.moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in self.parameters]
        self.steps_done = 0

    def step(self, ids: Tensor, trained: Tensor) -> dict[str, float]:
        """Take one step on the sequences ``ids`` [N, S] and return what is reported of it."""
        loss = losses_of(self.model, ids, trained).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        self.steps_done += 1
        lr = self._adam([gradient * min(1.0, self.settings.clipping / (norm + 1e-6)) for gradient in gradients])
        for pair in self.pairs.values():
            self._decay(pair, lr)
        return {"loss": loss.item(), "grad_norm": norm, "lr": lr}

    @torch.no_grad()
    def _adam(self, gradients: Sequence[Tensor]) -> float:
        """Adam's step; returns the learning rate that it took: lr·√((1 − β₂ᵗ) / (1 + β₂ᵗ))."""
        settings, t = self.settings, self.steps_done
        lr = settings.lr * math.sqrt((1 - settings.beta2**t) / (1 + settings.beta2**t))
        for parameter, gradient, (first, second) in zip(self.parameters, gradients, self.moments, strict=True):
            first.mul_(settings.beta1).add_(gradient, alpha=1 - settings.beta1)
            second.mul_(settings.beta2).add_(gradient.square(), alpha=1 - settings.beta2)
            unbiased_first = first / (1 - settings.beta1**t)
            unbiased_second = second / (1 - settings.beta2**t)
            parameter -= lr * unbiased_first / (unbiased_second.sqrt() + settings.eps)
        return lr

    def _decay(self, pair: tuple[nn.Parameter, nn.Parameter], lr: float) -> None:
        """A step down λ·½‖s·B·A‖_F² with this learning rate."""
        penalty = self.settings.decay * 0.5 * full_matrix(*pair, self.settings.scale).square().sum()
        slopes = torch.autograd.grad(penalty, pair)
        with torch.no_grad():
            for factor, slope in zip(pair, slopes, strict=True):
                factor -= lr * slope
