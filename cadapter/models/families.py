"""Facts about model families, by ``model_type``: what training, conversion and merging need to know of a block.

Each entry answers the same questions in the same order. A decoder block here reads the residual stream, lets an
attention module and an MLP module write to it, and gives it back; the facts say which linear layers are those
*residual writers*, and what happens to what they write on its way to the stream.

What a block is called with (masks and windows by layer, rotary embeddings by layer) is not among the facts: it is
taken from the model's own forward pass (:class:`cadapter.models.layers.Frame`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MODULES = ATTENTION, MLP = ("self_attn", "mlp")
"""The names that the two modules of a block have in every family of the table."""

PER_EXPERT, FUSED, SHARED = "mlp.experts.*.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        attention_writers, mlp_writers: the linear layers, by name within the block, whose output is what the
            attention and the MLP module write. The names are those on disk; ``*`` stands for an expert's number, and
            not every layer has each of them (experts in one layer, a dense MLP in another). A name of a
            three-dimensional tensor [experts, out, in], which has no ``.weight`` behind it, is one too.
        added: the two modules of a block whose outputs are added to the residual stream: attention and MLP
            themselves, or norms that follow them. None: not known.
        residual_scale: the key of the model's config whose number both outputs are multiplied by.
        parallel: attention and MLP read the same normed input, so that a conversion of a ``block`` adapter to
            its writers is exact.
        embedding_scale: the key whose number the model multiplies the token embeddings by, outside of their module.
        logit_scale, logit_divisor: keys whose numbers multiply and divide the logits.
        logit_softcap: the key whose number c, where it is set, caps logits to ``c·tanh(logits / c)``.
        attention: the attention implementation that the family needs; None: whichever transformers chooses.
        experts: a block may hold experts, whose tensors are fused in memory and one by one on disk.
        inferred: these facts were read from the model's structure and are in no table.
    """

    attention_writers: tuple[str, ...] = ("self_attn.o_proj",)
    mlp_writers: tuple[str, ...] = ("mlp.down_proj",)
    added: tuple[str, str] | None = MODULES
    residual_scale: str | None = None
    parallel: bool = False
    embedding_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    attention: str | None = None
    experts: bool = False
    inferred: bool = False

    @property
    def post_norms(self) -> bool:
        """Whether a norm stands between a writer and the addition to the residual stream."""
        return self.added is not None and self.added != MODULES

    def writers_among(self, names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the attention's and the MLP's writers among a layer's ``names`` (without ``.weight``), in order."""
        listed = list(names)

        def chosen(patterns: tuple[str, ...]) -> tuple[str, ...]:
            found = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns]
            return tuple(name for name in listed if any(pattern.fullmatch(name) for pattern in found))

        return chosen(self.attention_writers), chosen(self.mlp_writers)


@dataclass(frozen=True)
class LogitFacts:
    """What a model does to the product of hidden states and head weight: ``softcap·tanh(scale·x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Return what the model makes of float32 products ``logits``."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


LLAMA = Family()
EXPERTS = Family(mlp_writers=("mlp.down_proj", PER_EXPERT, FUSED), experts=True)
COHERE = Family(parallel=True, logit_scale="logit_scale")
GEMMA = Family(
    added=("post_attention_layernorm", "post_feedforward_layernorm"), logit_softcap="final_logit_softcapping"
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(EXPERTS, mlp_writers=("block_sparse_moe.experts.*.w2", FUSED)),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen2_moe": replace(EXPERTS, mlp_writers=("mlp.down_proj", PER_EXPERT, FUSED, SHARED)),
    "qwen3_moe": EXPERTS,
    "cohere": COHERE,
    "cohere2": COHERE,
    "gemma2": replace(GEMMA, attention="eager"),  # its attention scores are capped, which sdpa cannot do
    "gemma3_text": GEMMA,
    "phi3": LLAMA,
    "olmo2": Family(added=("post_attention_layernorm", "post_feedforward_layernorm")),
    "granite": Family(
        residual_scale="residual_multiplier",
        embedding_scale="embedding_multiplier",
        logit_divisor="logits_scaling",
    ),
    "glm4": Family(added=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "smollm3": LLAMA,
}


def config_number(config: Any, key: str | None, default: float = 1.0) -> float:
    """The number under ``key`` in a model's config, ``default`` where there is no key or no number."""
    value = getattr(config, key, None) if key else None
    return default if value is None else float(value)


def logit_facts(family: Family, config: Any) -> LogitFacts:
    """What a model of ``family`` with this config does to its logits."""
    scale = config_number(config, family.logit_scale) / config_number(config, family.logit_divisor)
    softcap = config_number(config, family.logit_softcap, 0.0)
    return LogitFacts(scale, softcap or None)
