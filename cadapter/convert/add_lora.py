"""Control adapter → additive LoRA that ``peft.PeftModel.from_pretrained`` loads.

``(I + B·A)·W_lin = W_lin + B·(A·W_lin)``: the additive pair is ``A_add = A·W_lin`` [r, in] and ``B_add = B`` [out, r],
exactly and at the adapter's own rank, in O(H·in·r) per writer and without a decomposition. A smaller rank needs one of
an r × r matrix. The bias b of a writer changes by ``B·A·b``, which PEFT calls ``lora_B.bias``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, layer_ranges
from cadapter.adapters.factors import LowRank
from cadapter.convert.lora_directory import LoraPair, lora_config, write_lora
from cadapter.convert.operators import (
    Dial,
    Target,
    Writers,
    find_target,
    module_name,
    operators,
    work_dtype,
)
from cadapter.convert.plan import check_writer
from cadapter.errors import UsageError
from cadapter.files import new_directory
from cadapter.models.checkpoint import Checkpoint


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
        A: [r, in].
        B: [out, r].

    Returns:
        A [rank, in], B [out, rank], and ``‖B·A‖_F²`` kept and in all.
    """
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    root, squares = S[:rank].sqrt(), S.square()
    new_A = root[:, None] * (Vh[:rank] @ Q_A.mT)
    new_B = (Q_B @ U[:, :rank]) * root
    return new_A.float(), new_B.float(), squares[:rank].sum().item(), squares.sum().item()


def additive_pair(operator: LowRank, weight: Tensor, bias: Tensor | None) -> LoraPair:
    """``A·W_lin`` [r, in], ``B`` [out, r] and ``B·A·b`` [out] (None without a bias) in float32."""
    A, B = operator.A, operator.B
    dtype = work_dtype(weight)
    shift = None if bias is None else (B.double() @ (A.double() @ bias.double())).float()
    return LoraPair((A.to(dtype) @ weight.to(dtype)).float(), B, 1.0, shift)


def _non_zero_bias(base: Checkpoint, module: str) -> Tensor | None:
    name = f"{module}.bias"
    bias = base.tensor(name) if name in base else None
    return bias if bias is not None and bias.any() else None


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
            below the adapter's, the base has experts, or ``output`` exists.
    """
    _refuse_experts(base)
    if rank is not None and not 1 <= rank <= adapter.rank:
        raise UsageError(f"--rank {rank}: the adapter has rank {adapter.rank}; a smaller one truncates it, 1 at least.")
    target = find_target(adapter, base, dial, writers)
    folded = operators(adapter, dial)
    with new_directory(output, force) as directory:
        pairs, kept = _convert(base, folded, target, rank, advance)
        biases = sum(pair.bias is not None for pair in pairs.values())
        if biases:
            pairs = {module: _with_bias(pair) for module, pair in pairs.items()}
        final_rank = rank or adapter.rank
        config = lora_config("LORA", final_rank, pairs, adapter.layers, base_name, lora_bias=biases > 0)
        overall = sum(k for k, _ in kept.values()) / (sum(total for _, total in kept.values()) or 1.0) if kept else 1.0
        write_lora(directory, config, pairs, _card(adapter, dial, base_name, final_rank, overall, target.notes))
    shares = {layer: k / total if total > 0 else 1.0 for layer, (k, total) in kept.items()}
    exact = target.exact and final_rank == adapter.rank
    return AdditiveSummary(len(folded), len(pairs), biases, final_rank, shares, overall, exact, target.notes)


def _refuse_experts(base: Checkpoint) -> None:
    """Refuse a base with experts: peft loads some LoRAs on such models wrongly, and in their dense layers too."""
    if any("experts" in name.split(".") for name in base.names()):
        raise UsageError(
            f"{base.directory} has experts, and peft loads LoRAs on the writers of such models wrongly, without a "
            "warning: none is written.\nUse cadapter merge, or cadapter to-mult-lora, instead."
        )


def _with_bias(pair: LoraPair) -> LoraPair:
    """PEFT's ``lora_bias`` holds for all pairs or none: a writer without a bias gets zeros."""
    return pair if pair.bias is not None else LoraPair(pair.A, pair.B, pair.scale, torch.zeros(pair.B.shape[0]))


def _convert(
    base: Checkpoint, folded: dict[int, LowRank], target: Target, rank: int | None, advance: Callable[[int], None]
) -> tuple[dict[str, LoraPair], dict[int, tuple[float, float]]]:
    """Pairs by module and, with truncation, ‖ΔW‖_F² kept and in all by layer."""
    pairs: dict[str, LoraPair] = {}
    kept: dict[int, tuple[float, float]] = {}
    for layer, operator in folded.items():
        for writer in target.names(layer):
            module = module_name(layer, writer)
            check_writer(base, f"{module}.weight", operator.B.shape[0])
            pair = additive_pair(operator, base.tensor(f"{module}.weight"), _non_zero_bias(base, module))
            if not torch.isfinite(pair.A).all():
                raise UsageError(f"{module}.weight: A·W_lin is not finite: the base model's weight is broken.")
            if rank is not None:
                A, B, kept_here, total = truncate(pair.A, pair.B, rank)
                pair = LoraPair(A, B, 1.0, pair.bias)
                before = kept.get(layer, (0.0, 0.0))
                kept[layer] = (before[0] + kept_here, before[1] + total)
            pairs[module] = pair
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
