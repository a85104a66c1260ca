"""Whether documents that share a sequence can be kept from seeing each other, which not every model allows.

Blocks mix tokens in attention alone, as far as is known of their family, and attention heeds a mask. Two checks make
sure of it. Before weights are read: what the model hands to its blocks for two documents in one sequence must be, for
the second, what it hands them for the second alone, with everything before it masked. And of each block as it was
loaded: no output of the second document may depend on the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from cadapter.errors import UsageError
from cadapter.models.loading import CausalLM

_LENGTH = 6
"""Tokens of each of the two documents."""


def _positions() -> Tensor:
    return torch.arange(_LENGTH).repeat(2).unsqueeze(0)


def check_isolation(model: CausalLM) -> None:
    """Make sure that ``model`` tells its blocks of documents in a sequence.

    Raises:
        UsageError: it does not.
    """
    packed = model.isolating_arguments(_positions())
    alone = model.isolating_arguments(_positions()[:, :_LENGTH])
    for index, (both, second) in enumerate(zip(packed, alone, strict=True)):
        if not _is_masked(both.get("attention_mask"), second.get("attention_mask")):
            raise _refusal(model, f"its block {index} is given no mask that keeps documents apart")
        if not all(torch.equal(a[:, _LENGTH:], b) for a, b in zip(_embedded(both), _embedded(second), strict=True)):
            raise _refusal(model, f"its block {index} is given positions that do not begin again with a document")


def _embedded(arguments: dict[str, Any]) -> list[Tensor]:
    """The rotary embeddings among a block's arguments."""
    found = arguments.get("position_embeddings")
    return [each for each in found if isinstance(each, Tensor)] if isinstance(found, (tuple, list)) else []


def _is_masked(packed: Any, alone: Any) -> bool:
    """Whether the mask of two documents lets the second see what it sees alone, and nothing of the first."""
    packed, alone = _dense(packed), _dense(alone)
    if not isinstance(packed, Tensor) or packed.ndim != 4:
        return False
    causal = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=packed.device).tril()
    own = _allowed(alone) if isinstance(alone, Tensor) and alone.ndim == 4 else causal
    seen = _allowed(packed)[..., _LENGTH:, :]
    return not bool(seen[..., :_LENGTH].any()) and bool((seen[..., _LENGTH:] == own).all())


def _dense(mask: Any) -> Any:
    """What FlexAttention's mask of blocks lets tokens see, as a tensor [B, 1, T, T]; other masks as they are."""
    if not isinstance(mask, BlockMask):
        return mask
    rows, _, queries, keys = mask.shape
    return create_mask(mask.mask_mod, rows, 1, queries, keys, device=str(mask.kv_num_blocks.device))


def _allowed(mask: Tensor) -> Tensor:
    """Which tokens [.., T, T] see which: a mask is that, or what is added to scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def check_block(model: CausalLM, block: nn.Module, index: int) -> None:
    """Make sure that no output of a document depends on the document before it, with the block's real weights.

    Raises:
        UsageError: one does.
    """
    arguments = model.isolating_arguments(_positions())[index]
    generator = torch.Generator().manual_seed(index)
    hidden = torch.randn(1, 2 * _LENGTH, model.hidden_size, generator=generator).to(model.device, model.dtype)
    with torch.enable_grad():
        output = block(hidden.requires_grad_(), **arguments)
        (gradient,) = torch.autograd.grad(output[:, _LENGTH:].float().square().sum(), hidden)
    if gradient[:, :_LENGTH].any():  # exactly: what is masked has a weight of 0
        raise _refusal(model, f"its block {index} mixes documents in other ways than attention")


def _refusal(model: CausalLM, reason: str) -> UsageError:
    return UsageError(
        f'document_attention = "isolated" is not possible with a model of type {model.config.model_type!r}: {reason}.\n'
        'Use "packed".'
    )
