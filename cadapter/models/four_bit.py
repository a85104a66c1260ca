"""Linear layers with weights in 4 bits, whose product is one operation that compiled code takes as a whole.

bitsandbytes quantises the weights and holds them. What it leaves to autograd and to compilers is done here: a product
keeps no dequantised weight for the backward pass, compiled or not, and asks for no gradient of the weight. On GPUs a
kernel of our own dequantises in one pass (see :mod:`cadapter.models.nf4_kernel`), where it is found to give the bits
that bitsandbytes gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from cadapter.terminal import warn

QUANT_TYPE = "nf4"
BLOCK_SIZE = 64
"""Numbers that share one scale, their largest magnitude."""
SCALE_GROUP = 256
"""Scales that are held in 8 bits are so in groups of this size, with a float32 scale of their own."""


Dequantise = Callable[[Tensor, Sequence[Tensor], tuple[int, int], torch.dtype], Tensor]
"""Packed numbers, their constants, shape and dtype of the weight: the weight."""


def by_bitsandbytes(packed: Tensor, constants: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantise with bitsandbytes' own operations."""
    scales, _values, *of_scales = constants
    if of_scales:
        largest, table, mean = of_scales
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, largest, table, SCALE_GROUP, torch.float32) + mean
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, BLOCK_SIZE, QUANT_TYPE, list(shape), dtype)


def in_one_pass(packed: Tensor, constants: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantise with our kernel; Triton must be there."""
    from cadapter.models.nf4_kernel import unpack

    return unpack(packed, constants, shape, dtype, BLOCK_SIZE, SCALE_GROUP)


@cache
def dequantiser(device: torch.device, dtype: torch.dtype, double: bool) -> Dequantise:
    """Our kernel where it runs and gives what bitsandbytes gives, bit for bit; else bitsandbytes.

    Args:
        device, dtype: of the weights.
        double: whether scales are held in 8 bits.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return by_bitsandbytes
    trial = _trial(device, double)
    try:
        same = torch.equal(in_one_pass(*trial, dtype), by_bitsandbytes(*trial, dtype))
    except Exception as error:  # whatever Triton's compiler and the GPU's driver raise
        warn(f"4 bits: no kernel of our own on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return by_bitsandbytes
    if not same:
        warn(f"4 bits: our kernel does not give what bitsandbytes gives on {device}, and is not used.")
        return by_bitsandbytes
    return in_one_pass


def _trial(device: torch.device, double: bool) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    """A weight to try kernels with: several groups of scales, the last not full, and a block of zeros."""
    import bitsandbytes

    weight = torch.randn(65, 4160, generator=torch.Generator().manual_seed(0)).to(device)
    weight[0, :BLOCK_SIZE] = 0
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type=QUANT_TYPE
    )
    return packed, constants_of(state), (65, 4160)


def _weight(packed: Tensor, constants: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that ``packed`` and its constants (see :func:`constants_of`) stand for."""
    dequantise = dequantiser(packed.device, dtype, len(constants) > PLAIN_CONSTANTS)
    return dequantise(packed, constants, (out_features, in_features), dtype)


def _linear_4bit(
    inputs: Tensor, packed: Tensor, constants: list[Tensor], out_features: int, bias: Tensor | None
) -> Tensor:
    """W·x + b for inputs [.., in]: [.., out]."""
    weight = _weight(packed, constants, out_features, inputs.shape[-1], inputs.dtype)
    return nn.functional.linear(inputs, weight, bias)


def _linear_4bit_backward(gradient: Tensor, packed: Tensor, constants: list[Tensor], in_features: int) -> Tensor:
    """Wᵀ·g for gradients [.., out]: [.., in]."""
    return gradient @ _weight(packed, constants, gradient.shape[-1], in_features, gradient.dtype)


def _shape_of_linear(
    inputs: Tensor, packed: Tensor, constants: list[Tensor], out_features: int, bias: Tensor | None
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def _shape_of_backward(gradient: Tensor, packed: Tensor, constants: list[Tensor], in_features: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, packed, constants, _, _ = inputs
    ctx.in_features = states.shape[-1]
    ctx.save_for_backward(packed, *constants)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, list[None], None, None]:
    packed, *constants = ctx.saved_tensors
    of_inputs = torch.ops.cadapter.linear_4bit_backward(gradient, packed, constants, ctx.in_features)
    return of_inputs, None, [None] * len(constants), None, None


# Defined by hand: what ``torch.library.custom_op`` checks in every call takes longer than launching the kernels.
_library = torch.library.Library("cadapter", "FRAGMENT")
_library.define(
    "linear_4bit(Tensor inputs, Tensor packed, Tensor[] constants, int out_features, Tensor? bias) -> Tensor"
)
_library.define("linear_4bit_backward(Tensor gradient, Tensor packed, Tensor[] constants, int in_features) -> Tensor")
for _name, _function, _shape in (
    ("linear_4bit", _linear_4bit, _shape_of_linear),
    ("linear_4bit_backward", _linear_4bit_backward, _shape_of_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)
    torch.library.register_fake(f"cadapter::{_name}", _shape, lib=_library)
torch.library.register_autograd("cadapter::linear_4bit", _backward, setup_context=_setup_context, lib=_library)


@register_flop_formula([torch.ops.cadapter.linear_4bit, torch.ops.cadapter.linear_4bit_backward])
def _flops(inputs: Any, packed: Any, constants: Any, features: int, *args: Any, **kwargs: Any) -> int:
    """What is there to compute again, where it is decided what to keep."""
    return 2 * inputs.numel() * features


PLAIN_CONSTANTS = 2
"""How many constants there are where scales are held in float32."""


def constants_of(state: Any) -> list[Tensor]:
    """What bitsandbytes' ``QuantState`` holds besides the weight.

    Scales and the values of the 16 codes; where scales are held in 8 bits also what they are dequantised with: the
    largest of each group, the table of their 256 codes, and their mean.
    """
    plain = [state.absmax, state.code]
    if state.state2 is None:
        return plain
    return [*plain, state.state2.absmax, state.state2.code, state.offset]


class FourBitLinear(nn.Linear):
    """A linear layer with its weight in 4 bits; bitsandbytes must have been loaded.

    Args:
        source: the layer whose weight is to be held in 4 bits, on its final device.
        double: hold scales in 8 bits.
    """

    def __init__(self, source: nn.Linear, double: bool) -> None:
        import bitsandbytes

        weight = source.weight
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        quantised: Any = bitsandbytes.nn.Params4bit(
            weight.data,
            requires_grad=False,
            blocksize=BLOCK_SIZE,
            compress_statistics=double,
            quant_type=QUANT_TYPE,
            module=self,
        ).to(weight.device)  # quantises
        self.weight = quantised
        self.bias = source.bias
        # Plain tensors, the same memory: what compiled code takes as its inputs.
        self._packed = quantised.data.as_subclass(Tensor)
        self._constants = constants_of(quantised.quant_state)
        self.train(source.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """W·x + b in the dtype of the inputs [.., in]."""
        return torch.ops.cadapter.linear_4bit(inputs, self._packed, self._constants, self.out_features, self.bias)
