"""A whole Hugging Face model with a LoRA beside its linear layers, additive or multiplicative, and the dial of it.

With the pair A, B and the scale s of a linear layer ``y = W_lin·x + b``, at strength t,

    additive          y' = y + t·s·(B·A·x + v)       A [r, in], B [out, r]; v [out] is the bias of lora_B, if any
    multiplicative    y' = (I + W)^t·y               W = s·B·A with A [r, out], B [out, r]

Nothing is merged, and strength 0 is exactly the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cadapter.adapters.control import attribute_of, innermost, repeats_of
from cadapter.adapters.factors import LowRank
from cadapter.errors import UsageError
from cadapter.models.attach import Strength, rows_of


class Pair(Protocol):
    """The factors of one linear layer as a LoRA's directory holds them."""

    @property
    def A(self) -> Tensor: ...  # noqa: N802
    @property
    def B(self) -> Tensor: ...  # noqa: N802
    @property
    def scale(self) -> float: ...
    @property
    def bias(self) -> Tensor | None: ...


class SteeredLinear(nn.Module):
    """A linear layer with a pair beside it; it stands in for the layer wherever the layer is called.

    Args:
        base_layer: a linear layer, or one that has a pair already.
        pair: which fits the layer.
        multiplicative: of which kind the pair is.
        where: the layer's name, for messages.
    """

    def __init__(self, base_layer: nn.Module, pair: Pair, multiplicative: bool, where: str) -> None:
        super().__init__()
        device = next(base_layer.parameters()).device
        self.base_layer = base_layer
        self.multiplicative = multiplicative
        self.lora_A = nn.Parameter(pair.A.to(device), requires_grad=False)
        self.lora_B = nn.Parameter(pair.scale * pair.B.to(device), requires_grad=False)
        self.lora_bias = None
        if pair.bias is not None:
            self.lora_bias = nn.Parameter(pair.scale * pair.bias.to(device), requires_grad=False)
        self._factors = LowRank(pair.A, pair.B)
        self._scale = pair.scale
        self._where = where
        self._between: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Give what only the layer has, such as its weight."""
        return attribute_of(self, "base_layer", name, super().__getattr__)

    def between(self, rows: Sequence[float]) -> Tensor | None:
        """What stands between B and A for each row: T [rows, r, r], or t [rows, 1, 1]; None where all rows are 0.

        Raises:
            UsageError: a power does not exist for this layer, which is named.
        """
        if not any(rows):
            return None
        if not self.multiplicative:
            return torch.tensor(rows, dtype=torch.float32).view(-1, 1, 1)
        identity = torch.eye(len(self.lora_A))
        powers = {t: self._factors.power(t, self._scale, self._where) for t in rows if t != 0}
        return torch.stack([0 * identity if t == 0 else identity if (T := powers[t]) is None else T for t in rows])

    def fix(self, between: Tensor | None) -> None:
        """Take what :meth:`between` gave from now on."""
        self._between = between

    def forward(self, inputs: Tensor) -> Tensor:
        """y' for inputs [.., in], whose first dimension runs over the rows of the batch."""
        output = self.base_layer(inputs)
        if self._between is None:
            return output
        read = output if self.multiplicative else inputs
        T = self._between = self._between.to(read.device)
        repeats_of(len(read), len(T))
        z = (read @ self.lora_A.to(read.dtype).T).view(len(T), -1, len(self.lora_A)).to(T.dtype)
        z = z @ T.mT if self.multiplicative else z * T
        change = z.to(output.dtype) @ self.lora_B.to(output.dtype).T
        if self.lora_bias is not None:
            change = change + (T * self.lora_bias).to(output.dtype)
        return output + change.view_as(output)


class SteeredLora:
    """A model each of whose adapted linear layers applies its pair at a strength, at every position.

    The layers are wrapped in place, inside of all control adapters: these act on what the changed layers write.

    Args:
        model: a Hugging Face model.
        path: the LoRA's directory, for messages.
        pairs: by full module name ("model.layers.0.mlp.down_proj").
        multiplicative: of which kind all are.
        strength: t to start with.

    Attributes:
        strength: t, or those of the rows of a batch.

    Raises:
        UsageError: a pair does not fit the model, or this strength does not exist for it.
    """

    def __init__(
        self, model: Any, path: Path, pairs: Mapping[str, Pair], multiplicative: bool, strength: Strength = 1.0
    ) -> None:
        self.linears: dict[str, SteeredLinear] = {}
        self._places: list[tuple[nn.Module, str, SteeredLinear]] = []
        for name, pair in pairs.items():
            owner, attribute = _place_of(model, name, path)
            layer = getattr(owner, attribute)
            _check_pair(layer, pair, multiplicative, f"{path}: {name}")
            self.linears[name] = SteeredLinear(layer, pair, multiplicative, f"{path}, {name}")
            self._places.append((owner, attribute, self.linears[name]))
        self.set_strength(strength)
        for owner, attribute, linear in self._places:
            setattr(owner, attribute, linear)

    def set_strength(self, strength: Strength) -> None:
        """Apply the pairs at this strength from now on: for all rows of a batch, or one for each.

        Raises:
            UsageError: this power does not exist for a layer, which is named; the strength stays as it was.
        """
        rows = rows_of(strength)
        found = {name: linear.between(rows) for name, linear in self.linears.items()}
        for name, linear in self.linears.items():
            linear.fix(found[name])
        self.strength = strength

    def remove(self) -> None:
        """Give the model its layers back as they were; of several adapters, the last one first."""
        for owner, attribute, linear in self._places:
            setattr(owner, attribute, linear.base_layer)


def _place_of(model: nn.Module, name: str, path: Path) -> tuple[nn.Module, str]:
    """The module that holds the module ``name``, and under which name; of wrapped modules the wrapped ones."""
    *parents, attribute = name.split(".")
    owner: Any = model
    for part in parents:
        owner = innermost(getattr(owner, part, None))
    if owner is None or getattr(owner, attribute, None) is None:
        raise UsageError(f"{path} adapts {name}, which the model does not have.\nUse it with the model that it is for.")
    return owner, attribute


def _check_pair(layer: Any, pair: Pair, multiplicative: bool, where: str) -> None:
    inner = layer
    while isinstance(inner, SteeredLinear):
        inner = inner.base_layer
    if not isinstance(inner, nn.Linear) or pair.A.ndim != 2:
        raise UsageError(
            f"{where} is no linear layer ({type(inner).__name__}), and only these are adapted natively.\n"
            "Merge the LoRA: cadapter merge BASE LORA OUTPUT."
        )
    reads = inner.out_features if multiplicative else inner.in_features
    if (pair.A.shape[1], pair.B.shape[0]) != (reads, inner.out_features):
        raise UsageError(
            f"{where} has lora_A {list(pair.A.shape)} and lora_B {list(pair.B.shape)}, where the model's layer needs "
            f"[r, {reads}] and [{inner.out_features}, r].\nUse it with the model it was made for."
        )
