"""What llama.cpp calls the modules of each family, and how it lays out their weights: the facts behind ``to-gguf``.

A pair ``W + B·A`` on a module becomes ``<name>.weight.lora_a`` [r, in] and ``<name>.weight.lora_b`` [out, r], or
[experts, r, in] and [experts, out, r]. Names come from the table of the gguf package.

Where llama.cpp turns neighbouring rows of a head by rotary angles and Hugging Face's model turns row i and row i + d/2,
the rows of q and k are in another order in a GGUF file. Which families that concerns is a fact of the program that
writes those files, llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor

from cadapter.convert.lora_directory import LoraPair
from cadapter.errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp; ``permuted``: rows of q and k are reordered in its files."""

    kind: gguf.MODEL_ARCH
    permuted: bool = False

    @property
    def name(self) -> str:
        """As files name it."""
        return gguf.MODEL_ARCH_NAMES[self.kind]


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3),
    "qwen2_moe": Architecture(gguf.MODEL_ARCH.QWEN2MOE),
    "qwen3_moe": Architecture(gguf.MODEL_ARCH.QWEN3MOE),
    "cohere": Architecture(gguf.MODEL_ARCH.COMMAND_R),  # neighbouring rows in Hugging Face's model, too
    "cohere2": Architecture(gguf.MODEL_ARCH.COHERE2),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3),
    "phi3": Architecture(gguf.MODEL_ARCH.PHI3),
    "olmo2": Architecture(gguf.MODEL_ARCH.OLMO2),
    "granite": Architecture(gguf.MODEL_ARCH.GRANITE, permuted=True),
    "glm4": Architecture(gguf.MODEL_ARCH.GLM4),
    "smollm3": Architecture(gguf.MODEL_ARCH.SMOLLM3, permuted=True),
}
"""By ``model_type``."""

_OTHERWISE = "Use cadapter merge, and convert the merged model with llama.cpp's own tools."

_FUSED_GATE_UP = "mlp.experts.gate_up_proj"
"""Experts' first matrices, one tensor in Hugging Face's model and two in llama.cpp."""


@dataclass(frozen=True)
class LayoutPair:
    """A pair as llama.cpp has it: ``tensor`` is its weight's name, A [.., r, in], B [.., out, r].

    ``reordered``: rows of B are in another order than in Hugging Face's model.
    """

    tensor: str
    A: Tensor
    B: Tensor
    scale: float
    reordered: bool


def architecture_of(model_type: str) -> Architecture:
    """The architecture that llama.cpp has for ``model_type``.

    Raises:
        UsageError: none is known here.
    """
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"to-gguf does not know how llama.cpp names the modules of a model of type {model_type!r}; it knows "
            f"{', '.join(ARCHITECTURES)}.\n{_OTHERWISE}"
        )
    return ARCHITECTURES[model_type]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder ``rows`` [heads·d, …]: of each head, i and i + d/2 become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def laid_out(
    pairs: Mapping[str, LoraPair], config: Any, shapes: Mapping[str, Sequence[int]], where: str
) -> list[LayoutPair]:
    """Name and lay out ``pairs`` as llama.cpp has them.

    Args:
        pairs: by module in Hugging Face's model, or by the tensor of fused experts.
        config: the base model's.
        shapes: of the base model's tensors, by their names in memory.
        where: the LoRA's directory, for messages.

    Raises:
        UsageError: llama.cpp has no such modules, or the base model has none, or of another shape.
    """
    names = gguf.get_tensor_name_map(architecture_of(config.model_type).kind, config.num_hidden_layers)
    refused = {"model.embed_tokens", "lm_head"} if config.tie_word_embeddings else {"model.embed_tokens"}
    found: list[LayoutPair] = []
    unknown: list[str] = []
    for module, pair in pairs.items():
        weight = module if module in shapes else f"{module}.weight"
        if weight not in shapes:
            raise UsageError(
                f"{where} adapts {module}, which is no module of the base model as transformers builds it.\n"
                "Use it with the model it was trained on."
            )
        heads = _reordered_heads(module, config)
        for part, A, B in _parts(module, pair, shapes[weight], where):
            name = None if module in refused else names.get_name(part)
            if name is None:
                unknown.append(module)
            else:
                rows = interleaved(B, heads) if heads else B
                found.append(LayoutPair(f"{name}.weight", A, rows, pair.scale, bool(heads)))
    if unknown:
        raise UsageError(
            f"{where} adapts what llama.cpp cannot adapt in a model of type {config.model_type!r}: "
            f"{', '.join(dict.fromkeys(unknown))}.\n{_OTHERWISE}"
        )
    return found


def _reordered_heads(module: str, config: Any) -> int:
    """How many heads have their rows in another order in this module's weight; 0: none."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rpartition(".")[2], 0) if architecture_of(config.model_type).permuted else 0


def _parts(module: str, pair: LoraPair, shape: Sequence[int], where: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The pair or pairs that a module's becomes, each with the module's name as gguf's table has it."""
    A, B = pair.A.float(), pair.B.float()
    if (*A.shape[:-2], B.shape[-2], A.shape[-1]) != tuple(shape):
        order = ", and let target_parameters name a module's tensors in the module's order"
        raise UsageError(
            f"{where}: {module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, which do not fit the base "
            f"model's weight {list(shape)}.\nUse it with the model it was trained on{order * (len(shape) == 3)}."
        )
    if module.endswith(_FUSED_GATE_UP):
        for name, half in zip(("gate_proj", "up_proj"), B.chunk(2, dim=1), strict=True):
            yield module.replace("gate_up_proj", name), A, half
    else:
        yield module, A, B
