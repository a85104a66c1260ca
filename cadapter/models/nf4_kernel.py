"""Weights out of 4 bits on a GPU in one pass, a kernel in Triton: each byte is read once, each number written once.

bitsandbytes takes three passes where scales are held in 8 bits: it unpacks the scales, adds their mean, and unpacks the
weights. A number costs 0.5 bytes, 1/64 of a scale and the bytes that it has when unpacked; of that, 2.5 bytes in
bfloat16, a pass cannot be faster than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024
"""Packed bytes that one program of the kernel takes."""


@triton.jit
def _unpack(
    packed: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    largest: tl.tensor,
    table: tl.tensor,
    mean: tl.tensor,
    weight: tl.tensor,
    numbers: tl.tensor,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Number i of ``weight`` is values[4 bits of i] · scale of block i // BLOCK; the first of two has the upper bits.

    Where GROUP is not 0 the scale of block j is table[scales[j]] · largest[j // GROUP] + mean.
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    left = tl.minimum(numbers - 2 * first, 2 * BYTES).to(tl.int32)
    blocks = tl.arange(0, 2 * BYTES // BLOCK)
    there = blocks * BLOCK < left
    scale = tl.load(scales + 2 * first // BLOCK + blocks, mask=there, other=0)
    if GROUP:  # all blocks of a program are of one group
        of_group = tl.load(largest + 2 * first // BLOCK // GROUP)
        scale = tl.load(table + scale.to(tl.int32)) * of_group + tl.load(mean)
    place = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(packed + first + place, mask=2 * place < left, other=0).to(tl.int32)
    upper, lower = tl.load(values + (pair >> 4)), tl.load(values + (pair & 15))
    both = tl.interleave(upper * scale[:, None], lower * scale[:, None])
    target = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(weight + 2 * first + target, both.to(weight.dtype.element_ty), mask=target < left)


def unpack(
    packed: Tensor, constants: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, block: int, group: int
) -> Tensor:
    """The weight that ``packed``, with two numbers a byte, stands for.

    Args:
        packed: uint8.
        constants: the scales and the 16 values; where scales are held in 8 bits also the largest scale of each group,
            the table of 256 codes, and the mean scale.
        shape, dtype: of the weight.
        block: numbers that share a scale, a power of 2.
        group: scales that share a largest one, where they are held in 8 bits; group · block is a multiple of 2 · BYTES.
    """
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    numbers = weight.numel()
    scales, values, *of_scales = constants
    largest, table, mean = of_scales or (values, values, values)  # not looked at
    # Products and sums are rounded one by one, as bitsandbytes' are.
    with torch.cuda.device_of(packed):
        _unpack[(triton.cdiv(numbers, 2 * BYTES),)](
            packed,
            scales,
            values,
            largest,
            table,
            mean,
            weight,
            numbers,
            BYTES=BYTES,
            BLOCK=block,
            GROUP=group if of_scales else 0,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return weight
