"""Control adapter → additive LoRA that ``peft.PeftModel.from_pretrained`` loads.

``(I + B·A)·W_lin = W_lin + B·(A·W_lin)``: the additive pair is ``A_add = A·W_lin`` [r, in] and ``B_add = B`` [out, r],
exactly and at the adapter's own rank, in O(H·in·r) per writer and without a decomposition. A smaller rank needs one of
an r × r matrix. The bias b of a writer changes by ``B·A·b``, which PEFT calls ``lora_B.bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, layer_ranges
from cadapter.adapters.factors import LowRank
from cadapter.adapters.lora_directory import LORA_TYPE, lora_fields, modules_on_disk
from cadapter.adapters.lora_targets import ModelTargets, match_model
from cadapter.convert.lora_directory import LoraPair, write_lora
from cadapter.convert.operators import Dial, Writers, find_target, module_name, operators, weight_name, work_dtype
from cadapter.convert.plan import check_writer
from cadapter.errors import UsageError
from cadapter.files import new_directory
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.loading import make_skeleton
from cadapter.models.shell import inner_model
from cadapter.models.stored import StoredWeights


@dataclass(frozen=True)
class AdditiveSummary:
    """What was written.

    Attributes:
        layers, pairs, biases, rank: counts of layers, writers and their biases, and the rank written.
        kept: share of ‖ΔW‖_F² that truncation kept, by layer; empty without truncation.
        kept_overall: the same over all layers.
        exact, notes: see :class:`Target`; a truncated LoRA is not exact.
    """

    layers: int
    pairs: int
    biases: int
    rank: int
    kept: dict[int, float]
    kept_overall: float
    exact: bool
    notes: tuple[str, ...]


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Best approximation of ``B·A`` at ``rank``: QR of both factors, then an SVD of an r × r matrix, in float64.

    Args:
        A: [.., r, in].
        B: [.., out, r].

    Returns:
        A [.., rank, in], B [.., out, rank], and ``‖B·A‖_F²`` kept and in all.
    """
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    root, squares = S[..., :rank].sqrt(), S.square()
    new_A = root[..., :, None] * (Vh[..., :rank, :] @ Q_A.mT)
    new_B = (Q_B @ U[..., :rank]) * root[..., None, :]
    return new_A.float(), new_B.float(), squares[..., :rank].sum().item(), squares.sum().item()


def additive_pair(operator: LowRank, weight: Tensor, bias: Tensor | None) -> LoraPair:
    """``A·W_lin`` [.., r, in], ``B`` [.., out, r] and ``B·A·b`` [out] (None without a bias) in float32.

    ``weight`` is [out, in], or [E, out, in] of experts, each of which gets the same B.
    """
    A, B = operator.A, operator.B
    dtype = work_dtype(weight)
    shift = None if bias is None else (B.double() @ (A.double() @ bias.double())).float()
    return LoraPair((A.to(dtype) @ weight.to(dtype)).float(), B.expand(*weight.shape[:-2], *B.shape), 1.0, shift)


class _Base:
    """The base's residual writers by their names in memory, by which PEFT knows them."""

    def __init__(self, base: Checkpoint) -> None:
        self.files = base
        self._skeleton = make_skeleton(base.config, torch.float32)
        self._stored = StoredWeights(base, self._skeleton)

    def writers(self, layer: int, names: Iterable[str], out_features: int) -> tuple[str, ...]:
        """Within the layer and in memory, where the experts of a layer are one writer; ``names`` are those on disk."""
        found: dict[str, None] = {}
        for name in names:
            tensor = weight_name(self.files, module_name(layer, name))
            check_writer(self.files, tensor, out_features)
            found[self._stored.memory_name(tensor).removesuffix(".weight").split(".", 3)[3]] = None
        return tuple(found)

    def weight(self, layer: int, writer: str) -> Tensor:
        """[out, in], or [E, out, in] of experts; float32, or float64 where it is stored so."""
        name = module_name(layer, writer)
        name = name if name in self._stored else f"{name}.weight"
        double = any(self.files.dtype(part.name) == "F64" for part in self._stored.parts(name))
        wanted = torch.float64 if double else torch.float32
        return self._stored.read(name, wanted, torch.device("cpu"))[name]

    def bias(self, layer: int, writer: str) -> Tensor | None:
        """The bias [out] of a writer, None where there is none or it is zero."""
        name = f"{module_name(layer, writer)}.bias"
        bias = self.files.tensor(name) if name in self.files else None
        return bias if bias is not None and bias.any() else None

    def spelled(self, writers: Mapping[int, tuple[str, ...]]) -> ModelTargets:
        """The writers by layer as PEFT's config names them."""
        names = list(dict.fromkeys(name for each in writers.values() for name in each))
        return match_model(list(inner_model(self._skeleton).layers), list(writers), names)


def to_add_lora(
    base: Checkpoint,
    base_name: str,
    adapter: ControlAdapterFiles,
    output: Path,
    dial: Dial,
    rank: int | None = None,
    writers: Writers | None = None,
    force: bool = False,
    advance: Callable[[int], None] = lambda writers_done: None,
) -> AdditiveSummary:
    """Write ``adapter`` at ``dial`` as a PEFT LoRA directory for ``base``.

    Args:
        base_name: the base as PEFT's config shall name it.
        rank: truncate to this rank; None keeps the adapter's own, exactly.
        advance: called with 1 after each writer.

    Raises:
        UsageError: the adapter does not fit the base, changes nothing, its power does not exist, ``rank`` is not
            below the adapter's, peft cannot load it, or ``output`` exists.
    """
    if rank is not None and not 1 <= rank <= adapter.rank:
        raise UsageError(
            f"--rank {rank}: the adapter has rank {adapter.rank}.\nGive a smaller rank, at least 1, to truncate it."
        )
    target, folded, model = find_target(adapter, base, dial, writers), operators(adapter, dial), _Base(base)
    chosen = {layer: model.writers(layer, target.names(layer), adapter.hidden_size) for layer in folded}
    targets = model.spelled(chosen)
    _refuse_biases_beside_experts(model, chosen, targets)
    final_rank = rank or adapter.rank
    with new_directory(output, force) as directory:
        pairs, kept = _convert(model, folded, chosen, rank, advance)
        biases = sum(pair.bias is not None for pair in pairs.values())
        if biases:
            pairs = {place: _with_bias(pair) for place, pair in pairs.items()}
        overall = sum(k for k, _ in kept.values()) / (sum(total for _, total in kept.values()) or 1.0) if kept else 1.0
        card = _card(adapter, dial, base_name, final_rank, overall, target.notes)
        write_lora(directory, _config(final_rank, targets, base_name, biases > 0), _by_module(pairs, targets), card)
    shares = {layer: k / total if total > 0 else 1.0 for layer, (k, total) in kept.items()}
    exact = target.exact and final_rank == adapter.rank
    return AdditiveSummary(len(folded), len(pairs), biases, final_rank, shares, overall, exact, target.notes)


def _config(rank: int, targets: ModelTargets, base_name: str, lora_bias: bool) -> dict[str, Any]:
    """PEFT's config; the scale is folded into B (``lora_alpha = r``)."""
    config = lora_fields(LORA_TYPE, rank, rank, targets.target_modules, targets.by_layer, base_name)
    config["lora_bias"] = lora_bias
    if targets.target_parameters:
        config["target_parameters"] = list(targets.target_parameters)
    return config


def _by_module(pairs: Mapping[tuple[int, str], LoraPair], targets: ModelTargets) -> dict[str, LoraPair]:
    """Pairs by the names of modules in PEFT's file."""
    return {
        module_name(layer, module): pairs[layer, writer]
        for layer, each in targets.by_layer.items()
        for writer, module in modules_on_disk(each).items()
    }


def _refuse_biases_beside_experts(base: _Base, writers: Mapping[int, tuple[str, ...]], targets: ModelTargets) -> None:
    """PEFT has no ``lora_bias`` for what it adapts as parameters, and ``lora_bias`` holds for all pairs or none."""
    biased = [
        f"{layer}: {name}" for layer, names in writers.items() for name in names if base.bias(layer, name) is not None
    ]
    if biased and targets.target_parameters:
        raise UsageError(
            f"{base.files.directory} has experts, and a residual writer with a bias (layer {biased[0]}). peft cannot "
            "carry the change of a bias in a LoRA on experts.\nUse cadapter merge, or cadapter to-mult-lora, instead."
        )


def _with_bias(pair: LoraPair) -> LoraPair:
    """PEFT's ``lora_bias`` holds for all pairs or none: a writer without a bias gets zeros."""
    return pair if pair.bias is not None else LoraPair(pair.A, pair.B, pair.scale, torch.zeros(pair.B.shape[0]))


def _convert(
    base: _Base,
    folded: dict[int, LowRank],
    writers: Mapping[int, tuple[str, ...]],
    rank: int | None,
    advance: Callable[[int], None],
) -> tuple[dict[tuple[int, str], LoraPair], dict[int, tuple[float, float]]]:
    """Pairs by layer and writer and, with truncation, ‖ΔW‖_F² kept and in all by layer."""
    pairs: dict[tuple[int, str], LoraPair] = {}
    kept: dict[int, tuple[float, float]] = {}
    for layer, operator in folded.items():
        for writer in writers[layer]:
            pair = additive_pair(operator, base.weight(layer, writer), base.bias(layer, writer))
            if not torch.isfinite(pair.A).all():
                module = module_name(layer, writer)
                raise UsageError(f"{module}.weight: A·W_lin is not finite: the base model's weight is broken.")
            if rank is not None:
                A, B, kept_here, total = truncate(pair.A, pair.B, rank)
                pair = LoraPair(A, B, 1.0, pair.bias)
                before = kept.get(layer, (0.0, 0.0))
                kept[layer] = (before[0] + kept_here, before[1] + total)
            pairs[layer, writer] = pair
            advance(1)
    return pairs, kept


def _card(
    adapter: ControlAdapterFiles, dial: Dial, base_name: str, rank: int, kept: float, notes: tuple[str, ...]
) -> str:
    truncated = f", truncated from {adapter.rank} (keeps {kept:.4%} of ‖ΔW‖²)" if rank < adapter.rank else ""
    return f"""---
library_name: peft
tags:
- lora
---

# LoRA

Made by `cadapter to-add-lora` from the control adapter `{adapter.path.name}` (layers {layer_ranges(adapter.layers)},
site `{adapter.site}`) at {dial}, for `{base_name}`. Rank {rank}{truncated}; the scale is folded into B.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "THIS_DIRECTORY")
```
{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes)}"""
