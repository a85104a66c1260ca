"""Which of PyTorch's attention kernels is the fastest on a GPU: found out by running each once it is warm.

It depends on the GPU, on the version of PyTorch and cuDNN, and on the model's shape. All give the same sums, in another
order.

Documents that are isolated need a mask. A dense one, [T, T], costs every kernel that takes one twice the arithmetic of
a causal pass or more. FlexAttention is compiled for a rule and for a map of the blocks of 128 × 128 scores that hold
any: what lies between documents is never computed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from cadapter.errors import UsageError

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PACKAGES = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn; it is built with CUDA's compiler"),
    "flash_attention_3": ("flash_attn_interface", "it is the directory hopper of flash-attention's sources"),
}
"""Of attention implementations that come in packages of their own: the module, and how to install it."""

BLOCK_MASKS = "block masks"
"""FlexAttention, among the kernels of isolated documents."""

DOCUMENT = 1024
"""Tokens of the documents that isolated attention is timed with."""

PASSES = 5
"""Timed passes of each kernel, forward and backward; some milliseconds each."""


def check_installed(attention: str) -> None:
    """Make sure that the package of an attention implementation is there.

    Raises:
        UsageError: it is not; how to install it is said.
    """
    module, install = PACKAGES.get(attention, ("", ""))
    if module and find_spec(module) is None:
        raise UsageError(
            f'attn_implementation = "{attention}": its package ({module}) is not installed.\n'
            f'Install it ({install}), or set attn_implementation = "auto".'
        )


@dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of a forward and backward pass by kernel, fastest first; those that can do it."""

    milliseconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """Its name."""
        return next(iter(self.milliseconds))

    def preferred(self) -> contextlib.AbstractContextManager[Any]:
        """Have PyTorch try the kernels in this order; what none of them can do it does without them."""
        order = [KERNELS[name] for name in self.milliseconds if name in KERNELS]
        rest = [kernel for kernel in KERNELS.values() if kernel not in order]
        return sdpa_kernel([*order, *rest, SDPBackend.MATH], set_priority=True)

    def in_words(self) -> str:
        """For the user."""
        fastest, *others = (f"{name} {time:.2f} ms" for name, time in self.milliseconds.items())
        return f"attention: {fastest} a layer" + (f" ({', '.join(others)})." if others else ".")


def time_kernels(
    config: Any,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    isolated: bool = False,
    block_masks: bool = False,
) -> KernelTimes | None:
    """Time attention of a model's shape on [rows, tokens]; None where there is nothing to choose.

    Args:
        config: transformers'.
        rows, tokens, dtype, device: of the hidden states.
        isolated: with a mask that keeps documents apart, not only causal.
        block_masks: FlexAttention may be taken for that.
    """
    if device.type != "cuda":
        return None
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # As the model makes them: [rows, tokens, heads, width], transposed.
    query, key, value = (
        torch.randn(rows, tokens, count, width, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    direction = torch.randn_like(query)
    mask = _document_mask(tokens, device) if isolated else None

    def by_kernel() -> Tensor:
        if mask is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != groups)
        # transformers repeats keys and values where there is a mask
        keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def passes(attend: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad((attend(),), (query, key, value), (direction,))

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a kernel cannot do it; that it cannot, it says by raising
        for name, kernel in KERNELS.items():
            with contextlib.suppress(RuntimeError), sdpa_kernel([kernel]):
                found[name] = _milliseconds(passes(by_kernel))
        if isolated and block_masks:
            with contextlib.suppress(RuntimeError):
                by_blocks = _by_blocks(query, key, value)
                found[BLOCK_MASKS] = _milliseconds(passes(by_blocks))
    if not found:
        return None
    return KernelTimes(dict(sorted(found.items(), key=lambda item: item[1])))


def _document_mask(tokens: int, device: torch.device) -> Tensor:
    """Which tokens [T, T] see which, in documents of ``DOCUMENT`` tokens."""
    document = torch.arange(tokens, device=device) // DOCUMENT
    return (document[:, None] == document) & torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _by_blocks(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """The same by FlexAttention."""

    def sees(_row: Tensor, _head: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return (here >= there) & (here // DOCUMENT == there // DOCUMENT)

    tokens = query.shape[2]
    blocks = create_block_mask(sees, None, None, tokens, tokens, device=query.device)
    attend: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(query, key, value, block_mask=blocks, enable_gqa=True)


def _milliseconds(call: Any) -> float:
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(PASSES):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / PASSES
