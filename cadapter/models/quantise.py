"""Decoder blocks in 4 bits: bitsandbytes' nf4, tensor by tensor on the device where the block stays.

Every linear layer of a block is held in 4 bits, in the same bits as by transformers' own ``load_in_4bit``. Experts that
transformers fuses into one parameter [experts, out, in], which that leaves alone, are held in 4 bits as well. Norms
stay as they are, and so do layers that give scores: routers, gates of shared experts.

Rows whose length is no multiple of 64 are refused on the CPU, where bitsandbytes 0.50 reads them at the wrong places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from cadapter.errors import CadapterError, UsageError
from cadapter.models.four_bit import BLOCK_SIZE, QUANT_TYPE, SCALE_GROUP, FourBitLinear

# On some CPUs bitsandbytes advises, whenever it is imported, to install a package that fetches kernels from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

DOUBLE_QUANTISATION = True
"""Scales are held in 8 bits, in groups of 256 with a float32 scale of their own: 0.516 bytes a weight instead of 0.563.
That is 0.3 GiB of an 8B model and 3 GiB of a 70B model. It costs two small kernels each time a layer is used, and
none where :mod:`cadapter.models.nf4_kernel` serves; what it adds to the rounding error of nf4 is hundreds of times
smaller than that error (0.0920 and 0.0921 relative)."""

LARGEST_TENSOR = 2**31 - 1
"""bitsandbytes counts the numbers of a tensor in 32 bits; beyond, it would quantise some of them only."""

FOUR_BIT, CONSTANTS = "4-bit", "quantisation constants"
KINDS = (FOUR_BIT, CONSTANTS, "bfloat16", "float32", "other")
"""How bytes of decoder blocks can be stored."""


def quantise_block_(block: nn.Module) -> None:
    """Hold the weights of ``block`` in 4 bits, in place; it must lie on its final device.

    One tensor after the other is quantised and its source freed. What is computed with a weight has the dtype that the
    weight had. Experts are dequantised as a whole in a forward pass, and autograd keeps the copy for the backward pass
    unless the block is recomputed.

    Raises:
        UsageError: bitsandbytes cannot be used, or a weight cannot be held in 4 bits; nothing is changed then.
    """
    names = four_bit_weights(block)
    device = next(block.parameters()).device
    refuse_unfit(block, device)
    load_bitsandbytes(device)
    for name in names:
        path, _, parameter = name.rpartition(".")
        module = block.get_submodule(path)
        if isinstance(module, nn.Linear):
            block.set_submodule(path, FourBitLinear(module, DOUBLE_QUANTISATION))
        else:
            _quantise_experts_(module, parameter)


def four_bit_weights(block: nn.Module) -> list[str]:
    """Names of the weights of ``block`` that :func:`quantise_block_` holds in 4 bits.

    Weights of plain linear layers, except those that give scores; a subclass of ``nn.Linear`` computes something of
    its own and stays, as with transformers. Of other modules every tensor [experts, out, in]: what has three
    dimensions and belongs to no convolution.
    """
    names = []
    for path, module in block.named_modules():
        if type(module) is nn.Linear:
            names += [] if _gives_scores(path, module) else [f"{path}.weight"]
        elif not isinstance(module, _ConvNd):
            found = module.named_parameters(path, recurse=False)
            names += [name for name, weight in found if weight.dim() == 3 and weight.is_floating_point()]
    return names


def _gives_scores(path: str, linear: nn.Linear) -> bool:
    """Whether ``linear`` weighs experts: a single output, or ``gate`` or ``…router…`` in its name or one above."""
    return linear.out_features == 1 or any(part == "gate" or "router" in part for part in path.split("."))


def refuse_unfit(block: nn.Module, device: torch.device) -> None:
    """Check that every weight of ``block`` that would be quantised on ``device`` can be; it may still be on meta.

    Raises:
        UsageError: no, or there is no such weight; all reasons are named.
    """
    names = four_bit_weights(block)
    if not names:
        raise UsageError("load_in_4bit: a decoder block has no weights that could be held in 4 bits.")
    lines = []
    for name in names:
        weight = block.get_parameter(name)
        shape = f"{name} {list(weight.shape)}"
        if device.type == "cpu" and weight.shape[-1] % BLOCK_SIZE:
            lines.append(
                f"{shape}: on the CPU bitsandbytes computes wrongly where rows are no multiple of {BLOCK_SIZE} long."
            )
        if weight.numel() > LARGEST_TENSOR:
            lines.append(f"{shape}: bitsandbytes quantises at most {LARGEST_TENSOR:,} numbers in one tensor.")
    if lines:
        raise UsageError(
            "load_in_4bit: some weights of a decoder block cannot be held in 4 bits.\n"
            + "".join(f"{line}\n" for line in lines)
            + "Leave load_in_4bit out, or take another model."
        )


def load_bitsandbytes(device: torch.device) -> None:
    """Import bitsandbytes and see that it can compute on ``device``.

    Raises:
        UsageError: it is missing or broken, or has no library for this CUDA.
    """
    try:
        import bitsandbytes
        import bitsandbytes.nn.parametrize
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library of its own may fail to load
        raise UsageError(
            f"load_in_4bit needs bitsandbytes, which cannot be imported: {type(error).__name__}: {error}\n"
            "Install it with: pip install -U bitsandbytes"
        ) from error
    if device.type == "cuda" and not bitsandbytes.cextension.lib.compiled_with_cuda:
        raise UsageError(
            f"bitsandbytes {bitsandbytes.__version__} has no library that works with CUDA {torch.version.cuda}.\n"
            "See what it found with: python -m bitsandbytes"
        )


def _quantise_experts_(experts: nn.Module, name: str) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(
        experts, name, compress_statistics=DOUBLE_QUANTISATION, quant_type=QUANT_TYPE, blocksize=BLOCK_SIZE
    )


def planned_bytes(block: nn.Module) -> int:
    """Bytes that ``block`` will take once it is held in 4 bits; it may be on the meta device."""
    total = sum(stored_bytes([block]).values())
    for name in four_bit_weights(block):
        weight = block.get_parameter(name)
        total += _bytes_in_4_bits(weight.numel()) - weight.nbytes
    return total


def _bytes_in_4_bits(numbers: int) -> int:
    """Two numbers a byte, and what :func:`stored_bytes` calls constants: scales, tables of codes, the mean scale."""
    packed, scales, table = -(-numbers // 2), -(-numbers // BLOCK_SIZE), 16 * 4
    if not DOUBLE_QUANTISATION:
        return packed + table + 4 * scales
    groups, table_of_scales, mean = -(-scales // SCALE_GROUP), 256 * 4, 4
    return packed + table + scales + 4 * groups + table_of_scales + mean


def stored_bytes(blocks: Iterable[nn.Module]) -> dict[str, int]:
    """Count the bytes of parameters, buffers and quantisation constants of ``blocks`` by kind.

    Every one of ``KINDS`` is there, so that the counts of several processes can be added. Storage that is shared counts
    once. Adapters count as well; to learn how the base is stored, count before they are attached.
    """
    found = dict.fromkeys(KINDS, 0)
    seen: set[tuple[torch.device, int]] = set()
    for block in blocks:
        for kind, tensor in _tensors_by_kind(block):
            storage = tensor.untyped_storage()
            place = tensor.device, storage.data_ptr() or id(tensor)  # on meta, nothing lies anywhere
            if place not in seen:
                seen.add(place)
                found[kind] += storage.nbytes()
    return found


def _tensors_by_kind(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module in block.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            state = _quant_state(module, tensor)
            if state is None:
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield dtype if dtype in KINDS else "other", tensor
            else:
                yield FOUR_BIT, tensor
                yield from ((CONSTANTS, constant) for constant in _tensors_of(state))


def _quant_state(module: nn.Module, tensor: Tensor) -> Any:
    """bitsandbytes' constants of ``tensor``: linear layers have them at the weight, experts at its parametrisation."""
    holders = module if isinstance(module, ParametrizationList) else [tensor]
    return next((state for each in holders if (state := getattr(each, "quant_state", None)) is not None), None)


def _tensors_of(state: Any) -> Iterator[Tensor]:
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, type(state)):  # the constants of the constants
            yield from _tensors_of(value)


def in_words(stored: Mapping[str, int]) -> str:
    """Say how many bytes are stored how, largest first: ``4-bit 3,489,660,928 bytes (96.4 %), …``."""
    total = max(sum(stored.values()), 1)
    largest_first = sorted(stored.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size:,} bytes ({size / total:.1%})" for kind, size in largest_first if size)


def check_mostly_4bit(stored: Mapping[str, int]) -> None:
    """Check that more than half of the bytes of decoder blocks, those of all processes, are 4-bit weights.

    Bytes, not numbers: a weight that stayed in bfloat16 counts four times, and the check fails as soon as a fifth of
    the weights did.

    Raises:
        CadapterError: they are not.
    """
    if 2 * stored[FOUR_BIT] <= sum(stored.values()):
        raise CadapterError(
            "load_in_4bit: most bytes of the decoder blocks are not in 4 bits.\n"
            f"They hold {in_words(stored) or 'nothing'}.\n"
            "This kind of model cannot be trained in 4 bits. Leave load_in_4bit out, or take another model."
        )
