"""Dropout whose mask is a function of what it is applied to, not of when and where the program runs.

A generator with a state would give other masks under recomputation, in another layout or after a resume. Here
every element's fate is a hash of (row, place, element), so all of them agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def row_seeds(seed: int, step: int, sequence_ids: Sequence[int]) -> list[int]:
    """Return one 32-bit number for each sequence of a micro-batch: a hash of (seed, step, global sequence index)."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:4], "little")
        for index in sequence_ids
    ]


def _mix(value: Tensor) -> Tensor:
    """A 32-bit integer mix (multiply and xor-shift rounds), on int64 tensors that hold 32-bit values."""
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _MASK_32
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _MASK_32
    return value ^ (value >> 15)


def keep_mask(rows: Tensor, place: int | Tensor, shape: Sequence[int], rate: float) -> Tensor:
    """Return the mask [B, T, H] by which Δh is multiplied: 0 with probability ``rate``, else 1 / (1 − rate).

    Args:
        rows: [B] int64, one number per row (see :func:`row_seeds`).
        place: which application of which layer this is, below 2^30: a number, or an int64 tensor of one, whose value
            compiled code need not know.
        shape: [B, T, H].
        rate: the dropout probability, in [0, 1).
    """
    batch, tokens, width = shape
    elements = torch.arange(tokens * width, device=rows.device, dtype=torch.int64)
    starts = _mix((rows + 0x9E3779B9 * (place + 1)) & _MASK_32)
    hashed = _mix((_mix(elements & _MASK_32).unsqueeze(0) + starts.unsqueeze(1)) & _MASK_32)
    keep = hashed >= int(rate * 2**32)
    return (keep.float() / (1.0 - rate)).view(batch, tokens, width)
