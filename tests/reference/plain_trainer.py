"""The method on Hugging Face's own model with hooks, in float64: W formed whole, autograd for everything, no pipeline.

Slow and plain on purpose: each line is a line of the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.reference.naive import full_matrix, identity


@dataclass
class Settings:
    """What the method leaves open."""

    scale: float
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-6
    decay: float = 0.0
    clipping: float = 1.0
    neutral: float = 0.0
    weights: dict[int, float] = field(default_factory=lambda: {1: 1.0, -1: 1.0})


@dataclass
class Step:
    """A step's sequences as packed: token ids, each token's class, and whether it is trained, each [N, S]."""

    ids: Tensor
    classes: Tensor
    trained: Tensor


class PlainTrainer:
    """Trains factors A [r, H], B [H, r] of every layer of ``model`` (a Llama), sequence by sequence.

    ``factors`` holds (A, B) by layer; they are changed in place and are float64.
    """

    def __init__(self, model: nn.Module, factors: dict[int, tuple[Tensor, Tensor]], settings: Settings) -> None:
        self.model = model.double().requires_grad_(False)
        self.settings = settings
        self.factors = {layer: [f.double().requires_grad_() for f in pair] for layer, pair in factors.items()}
        self.moments = {layer: [[torch.zeros_like(f), torch.zeros_like(f)] for f in pair] for layer, pair in
                        self.factors.items()}  # fmt: skip
        self.steps_done = 0
        self.predicted_classes: Tensor | None = None
        self.neutral_ratios: list[Tensor] = []
        for layer in self.factors:
            model.model.layers[layer].register_forward_hook(self._hook(layer))

    def _hook(self, layer: int):
        def change(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            delta = output - inputs[0]
            enhancing, suppressing = self.operators(layer)
            classes = self.predicted_classes.unsqueeze(-1)
            enhanced, suppressed = delta @ enhancing.T, delta @ suppressing.T
            ratio = enhanced.square().sum(-1) / delta.square().sum(-1).clamp(min=1e-6)
            self.neutral_ratios.append(ratio[self.predicted_classes == 0].sum())
            return output + torch.where(classes == 1, enhanced, 0.0) + torch.where(classes == -1, suppressed, 0.0)

        return change

    def operators(self, layer: int) -> tuple[Tensor, Tensor]:
        """``W`` and ``(I + W)^-1 − I`` of a layer, [H, H]."""
        W = full_matrix(*self.factors[layer], self.settings.scale)
        return W, torch.linalg.inv(identity(W) + W) - identity(W)

    def step(self, step: Step) -> dict[str, float]:
        """Take one optimiser step and return what is reported of it."""
        ids, classes = step.ids[:, 1:], step.classes[:, 1:]
        counted = {c: step.trained[:, 1:] & (classes == c) for c in (1, -1)}
        neutral_positions = int((classes == 0).sum())
        nll, correct = {1: torch.zeros(()), -1: torch.zeros(())}, 0
        ratios = torch.zeros((), dtype=torch.float64)
        for row in range(len(ids)):
            self.neutral_ratios = []
            # The last position predicts nothing: a class of its own (2).
            self.predicted_classes = torch.cat([classes[row], torch.tensor([2])]).unsqueeze(0)
            logits = self.model(input_ids=step.ids[row : row + 1], use_cache=False).logits[0, :-1]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            each = -log_probabilities.gather(1, ids[row].unsqueeze(1)).squeeze(1)
            for c in (1, -1):
                nll[c] = nll[c] + each[counted[c][row]].sum()
                correct += int((logits.argmax(-1) == ids[row])[counted[c][row]].sum())
            ratios = ratios + sum(self.neutral_ratios)
        count = {c: int(counted[c].sum()) for c in (1, -1)}
        weighted = sum(self.settings.weights[c] * nll[c] for c in (1, -1))
        cross_entropy = weighted / sum(self.settings.weights[c] * count[c] for c in (1, -1))
        neutral = ratios / (len(self.factors) * neutral_positions) if neutral_positions else ratios
        norm, lr = self._update(cross_entropy + self.settings.neutral * neutral)
        return {
            "loss": float(cross_entropy.detach()),
            "loss_pos": float(nll[1].detach()) / max(count[1], 1),
            "loss_neg": float(nll[-1].detach()) / max(count[-1], 1),
            "loss_neutral": float(neutral.detach()),
            "top1_accuracy": correct / (count[1] + count[-1]),
            "grad_norm": norm,
            "lr": lr,
        }

    def _update(self, loss: Tensor) -> tuple[float, float]:
        """Clip, Adam, decay; return the gradient's norm and the learning rate."""
        settings = self.settings
        everything: Sequence[Tensor] = [factor for pair in self.factors.values() for factor in pair]
        gradients = list(torch.autograd.grad(loss, everything))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        factor = min(1.0, settings.clipping / (norm + 1e-6))
        self.steps_done += 1
        t = self.steps_done
        lr = settings.lr * math.sqrt((1 - settings.beta2**t) / (1 + settings.beta2**t))
        with torch.no_grad():
            for layer, pair in self.factors.items():
                for parameter, moments in zip(pair, self.moments[layer], strict=True):
                    gradient = factor * gradients.pop(0)
                    first, second = moments
                    first.mul_(settings.beta1).add_((1 - settings.beta1) * gradient)
                    second.mul_(settings.beta2).add_((1 - settings.beta2) * gradient**2)
                    unbiased_first = first / (1 - settings.beta1**t)
                    unbiased_second = second / (1 - settings.beta2**t)
                    parameter -= lr * unbiased_first / (unbiased_second.sqrt() + settings.eps)
        self.after_adam(lr)
        return norm, lr

    def after_adam(self, lr: float) -> None:
        """The composite decay of the product, by autograd through the full matrix."""
        for pair in self.factors.values():
            penalty = self.settings.decay * 0.5 * full_matrix(*pair, self.settings.scale).square().sum()
            slopes = torch.autograd.grad(penalty, pair)
            with torch.no_grad():
                for parameter, slope in zip(pair, slopes, strict=True):
                    parameter -= lr * slope


class SymmetricTrainer(PlainTrainer):
    """The same with factors Q [H, r] and S [r] of every layer, ``W = Q·diag(e^S − 1)·Qᵀ``; −S is the inverse."""

    def operators(self, layer: int) -> tuple[Tensor, Tensor]:
        """``Q·diag(e^S − 1)·Qᵀ`` and ``Q·diag(e^−S − 1)·Qᵀ``."""
        Q, S = self.factors[layer]
        return Q @ torch.diag(S.exp() - 1) @ Q.T, Q @ torch.diag((-S).exp() - 1) @ Q.T

    @torch.no_grad()
    def after_adam(self, lr: float) -> None:
        """The nearest orthonormal columns (the polar factor, where the published iteration leads), and S's decay."""
        for Q, S in self.factors.values():
            U, _, Vh = torch.linalg.svd(Q, full_matrices=False)
            Q.copy_(U @ Vh)
            S.mul_(1 - lr * self.settings.decay / len(S))
