"""What a merge does to which tensor of the base: a list of small changes by tensor name, made before anything is read.

Changes of one tensor are applied in order and in place, in float32 or better, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, kind_of, read_control_adapter
from cadapter.adapters.factors import LowRank
from cadapter.convert.lora_directory import LoraFiles, LoraPair, read_lora
from cadapter.convert.operators import (
    Dial,
    Target,
    Writers,
    does_nothing,
    find_target,
    fold,
    module_name,
    operators,
    weight_name,
)
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.loading import make_skeleton
from cadapter.models.safetensors_format import FLOATS
from cadapter.models.stored import StoredWeights


def add_product_(X: Tensor, B: Tensor, Z: Tensor) -> None:
    """``X ← X + B·Z`` in place; of a matrix without a temporary of its size."""
    if X.ndim == 2:
        X.addmm_(B, Z)
    else:
        X.add_(B @ Z)


@dataclass(frozen=True)
class Multiply:
    """``X ← X + B·(A·X) = (I + B·A)·X`` for a weight [H, in], experts' [E, H, in] or a bias [H]; A [r, H], B [H, r]."""

    A: Tensor
    B: Tensor

    def apply_(self, X: Tensor) -> None:
        """Change ``X`` in place."""
        add_product_(X, self.B.to(X), self.A.to(X) @ X)


@dataclass(frozen=True)
class AddProduct:
    """``X ← X + x·s·B·A`` for a weight [out, in], or experts' [E, out, in] with factors of each; ``factor`` = x·s."""

    A: Tensor
    B: Tensor
    factor: float

    def apply_(self, X: Tensor) -> None:
        """Change ``X`` in place."""
        add_product_(X, self.factor * self.B.to(X), self.A.to(X))


@dataclass(frozen=True)
class AddVector:
    """``b ← b + x·s·v`` for a bias [out]; ``factor`` = x·s."""

    vector: Tensor
    factor: float

    def apply_(self, X: Tensor) -> None:
        """Change ``X`` in place."""
        X.add_(self.vector.to(X), alpha=self.factor)


Change = Multiply | AddProduct | AddVector
Plan = dict[str, list[Change]]


def check_writer(base: Checkpoint, name: str, out_features: int, in_features: int | None = None) -> None:
    """Make sure that the base has a floating-point weight ``name`` [out_features, in_features], of experts or not.

    Raises:
        UsageError: it has none, or of another shape, or a quantised one.
    """
    shape = base.shape(name)
    expected = (*shape[:-2], out_features, shape[-1] if in_features is None else in_features)
    if shape != expected:
        raise UsageError(
            f"{base.directory}: {name} has shape {list(shape)}; the adapter needs {list(expected)}.\n"
            "Use it with the model it was trained on."
        )
    if base.dtype(name) not in FLOATS:
        raise UsageError(
            f"{base.directory}: {name} is quantised ({base.dtype(name)}).\nUse the model's unquantised weights."
        )


def _multiply_module(plan: Plan, base: Checkpoint, module: str, change: Multiply) -> None:
    """Change a writer's weight and, where it has one, its bias."""
    name = weight_name(base, module)
    check_writer(base, name, change.B.shape[0])
    plan.setdefault(name, []).append(change)
    if f"{module}.bias" in base:
        plan.setdefault(f"{module}.bias", []).append(change)


def plan_control(
    plan: Plan, base: Checkpoint, adapter: ControlAdapterFiles, dial: Dial, writers: Writers | None
) -> Target:
    """Add to ``plan`` what a control adapter changes; returns where that is.

    Raises:
        UsageError: the adapter does not fit the base, changes nothing, or its power does not exist.
    """
    target = find_target(adapter, base, dial, writers)
    for layer, operator in operators(adapter, dial).items():
        if not does_nothing(operator):
            for writer in target.names(layer):
                _multiply_module(plan, base, module_name(layer, writer), Multiply(operator.A, operator.B))
    return target


def plan_multiplicative(plan: Plan, base: Checkpoint, lora: LoraFiles, dial: Dial) -> None:
    """Add to ``plan`` what a multiplicative LoRA changes.

    Raises:
        UsageError: a module is not in the base or does not fit, it changes nothing, or its power does not exist.
    """
    touched = 0
    for module, pair in lora.pairs.items():
        _check_module(base, lora, module, weight_name(base, module))
        if pair.A.shape[1] != pair.B.shape[0]:
            raise UsageError(
                f"{lora.path}: {module} has lora_A {list(pair.A.shape)} and lora_B {list(pair.B.shape)}; a "
                "multiplicative LoRA acts on what a module writes, so both need its output size."
            )
        operator = fold(LowRank(pair.A, pair.B), pair.scale, dial, f"{lora.path}, {module}")
        if not does_nothing(operator):
            _multiply_module(plan, base, module, Multiply(operator.A, operator.B))
            touched += 1
    _refuse_nothing(touched, lora, dial)


def plan_additive(plan: Plan, base: Checkpoint, lora: LoraFiles, dial: Dial) -> None:
    """Add to ``plan`` what an additive LoRA changes; strength −1 subtracts it.

    Raises:
        UsageError: a strength, a module that is not in the base or does not fit, a bias where the base
            has none, or it changes nothing.
    """
    if dial.is_power:
        raise UsageError("--strength does not exist for an additive LoRA.\nUse --scale X, or --inverse to subtract it.")
    touched = 0
    stored = _stored(base) if any(pair.A.ndim == 3 for pair in lora.pairs.values()) else None
    for module, pair in lora.pairs.items():
        factor = pair.scale * dial.factor * dial.strength
        if stored is not None and pair.A.ndim == 3:
            changes = _expert_changes(base, lora, stored, module, pair, factor)
        else:
            _check_module(base, lora, module, f"{module}.weight")
            changes = {f"{module}.weight": AddProduct(pair.A, pair.B, factor)}
        for name, change in changes.items():
            check_writer(base, name, change.B.shape[-2], change.A.shape[-1])
            if factor and change.A.any() and change.B.any():
                plan.setdefault(name, []).append(change)
                touched += 1
        if pair.bias is not None and factor and pair.bias.any():
            _add_bias(plan, base, lora, module, pair, factor)
            touched += 1
    _refuse_nothing(touched, lora, dial)


def _stored(base: Checkpoint) -> StoredWeights:
    return StoredWeights(base, make_skeleton(base.config, torch.float32))


def _expert_changes(
    base: Checkpoint, lora: LoraFiles, stored: StoredWeights, tensor: str, pair: LoraPair, factor: float
) -> dict[str, AddProduct]:
    """A pair on fused experts as changes of what the base holds on disk: one tensor, or one for each expert."""
    if tensor not in stored:
        raise UsageError(f"{lora.path} adapts {tensor}, which {base.directory} does not have.")
    changes, experts, out_features = {}, len(pair.A), pair.B.shape[1]
    parts = stored.parts(tensor)
    rows = sum(base.shape(part.name)[-2] for part in parts if part.expert in (None, 0))
    held = base.shape(parts[0].name)[0] if parts[0].expert is None else 1 + max(part.expert or 0 for part in parts)
    if (held, rows) != (experts, out_features):
        raise UsageError(
            f"{lora.path} adapts {experts} experts of {tensor}, each with {out_features} outputs; {base.directory} has "
            f"{held} with {rows}."
        )
    for part in parts:
        A, B = (pair.A, pair.B) if part.expert is None else (pair.A[part.expert], pair.B[part.expert])
        changes[part.name] = AddProduct(A, B[..., part.rows, :], factor)
    return changes


def _add_bias(plan: Plan, base: Checkpoint, lora: LoraFiles, module: str, pair: LoraPair, factor: float) -> None:
    if f"{module}.bias" not in base or pair.bias is None:
        raise UsageError(f"{lora.path} has a bias for {module}, where the base model has none: it cannot be merged.")
    plan.setdefault(f"{module}.bias", []).append(AddVector(pair.bias, factor))


def _check_module(base: Checkpoint, lora: LoraFiles, module: str, tensor: str) -> None:
    if tensor not in base:
        raise UsageError(
            f"{lora.path} adapts {module}, but {base.directory} has no tensor {tensor}.\n"
            "Use it with the model it was trained on."
        )
    tied = getattr(base.config, "tie_word_embeddings", False)
    if module.rpartition(".")[2] in ("lm_head", "embed_tokens") and tied:
        raise UsageError(f"{lora.path} adapts {module}, which is tied to another weight in this model: not supported.")


def _refuse_nothing(touched: int, lora: LoraFiles, dial: Dial) -> None:
    if not touched:
        raise UsageError(f"{lora.path} at {dial} changes nothing: B·A = 0 in every module.\nGive one that was trained.")


@dataclass
class Recipe:
    """A plan, and in words what it does.

    Attributes:
        plan: changes by tensor name.
        steps: one sentence for each adapter, in the order in which they act.
        adapters: the control adapters among them, each at its dial.
        exact: every change is its adapter, to rounding.
        notes: what the user must hear.
    """

    plan: Plan = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    adapters: list[tuple[ControlAdapterFiles, Dial]] = field(default_factory=list)
    exact: bool = True
    notes: list[str] = field(default_factory=list)

    def add_control(self, base: Checkpoint, path: Path, dial: Dial, writers: Writers | None) -> None:
        """Append a control adapter."""
        adapter = read_control_adapter(path)
        target = plan_control(self.plan, base, adapter, dial, writers)
        self.notes.extend(note for note in target.notes if note not in self.notes)
        self.exact &= target.exact
        self.adapters.append((adapter, dial))
        self.steps.append(f"control adapter `{path.name}` (rank {adapter.rank}, site `{adapter.site}`) at {dial}")


def make_recipe(
    base: Checkpoint,
    path: Path,
    dial: Dial,
    also: Sequence[tuple[Path, float]] = (),
    writers: Writers | None = None,
    multiplicative: bool = False,
) -> Recipe:
    """Plan the merge of the adapter at ``path`` at ``dial``, then of further control adapters at their strengths.

    Args:
        writers: for control adapters only; None follows each one's site.
        multiplicative: take a LoRA directory for a multiplicative one, whatever its config says.

    Raises:
        UsageError: an adapter is not right, does not fit the base or changes nothing.
    """
    recipe, kind = Recipe(), kind_of(path)
    if kind == "control":
        if multiplicative:
            raise UsageError(f"{path} is a control adapter, not a LoRA: leave --multiplicative out.")
        recipe.add_control(base, path, dial, writers)
    elif writers is not None:
        raise UsageError(f"{path} is a LoRA, which names its modules itself: --writers is for control adapters.")
    elif kind == "multiplicative" or multiplicative:
        plan_multiplicative(recipe.plan, base, read_lora(path), dial)
        recipe.steps.append(f"multiplicative LoRA `{path.name}` at {dial}")
    else:
        plan_additive(recipe.plan, base, read_lora(path), dial)
        recipe.steps.append(f"additive LoRA `{path.name}`, times {dial.factor * dial.strength:g}")
    for directory, strength in also:
        recipe.add_control(base, directory, Dial(strength=strength), writers)
    return recipe
