"""A Hugging Face causal LM taken apart: single modules, loaded one at a time, straight to their device.

The model is built once without memory (on the meta device) for its module classes, its rotary embedding and its
forward pass; real tensors are then read for the modules that this process needs, and for no others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES, Family, LogitFacts, config_number, logit_facts
from cadapter.models.own_code import auto_model, failures, is_own_class
from cadapter.models.quantise import (
    KINDS,
    load_bitsandbytes,
    planned_bytes,
    quantise_block_,
    refuse_unfit,
    stored_bytes,
)
from cadapter.models.shell import arguments_after, arguments_at, check_cut, inferred_family, inner_model, record_calls
from cadapter.models.stored import StoredWeights

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM_PREFIX = "model.norm."
LAYER_PREFIX = "model.layers.{}."

NOISE = ("dropout", "pdrop", "jitter")
"""What keys of a config have in their names that say how much a model does at random in training."""

FLEX_ATTENTION = "flex_attention"

_WRONG_NAME = (ValueError, KeyError, TypeError, ImportError, AttributeError)
"""What transformers raises where it knows no implementation of a name, or its package is missing."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def make_skeleton(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Build the causal LM of ``config`` without memory; what it computes itself (rotary frequencies) is real.

    Args:
        config: transformers'. What it does at random in training (dropout, routers' jitter) is turned off: it would
            differ with the layout and under recomputation.
        dtype: of all weights.
        attention: transformers' name of the attention implementation; None: what the family needs.

    Raises:
        UsageError: no such model can be built.
    """
    from accelerate import init_empty_weights

    for key, value in config.to_dict().items():
        if isinstance(value, float) and any(word in key for word in NOISE):
            setattr(config, key, 0.0)
    needed = needed_attention(config)
    if needed == "eager" and attention == "sdpa":  # not every version of transformers refuses it
        raise UsageError(
            f"{config.model_type} models cap their attention scores, which sdpa cannot do.\n"
            f'Set attn_implementation = "auto" or "{needed}".'
        )
    attention = attention or needed
    try:
        with init_empty_weights(include_buffers=False):
            return auto_model(config).from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=is_own_class(config)
            )
    except failures(config, *_WRONG_NAME) as error:
        wanted = f"with {attention} attention" if attention else f"of type {config.model_type}"
        raise UsageError(f"no causal LM can be built {wanted}.\n{type(error).__name__}: {error}") from error


def needed_attention(config: Any) -> str | None:
    """The attention implementation that the family of a model needs; None: whichever transformers chooses."""
    if config_number(config, "attn_logit_softcapping", 0.0):  # sdpa would leave the cap out
        return "eager"
    family = FAMILIES.get(config.model_type)
    return family.attention if family else None


def facts_of(skeleton: Any) -> Family:
    """The facts of a model's family: from the table, or inferred from its structure.

    The cut into embedding, blocks, norm and head is checked against the model's own forward pass.

    Raises:
        UsageError: the model cannot be cut; the reason is the text.
    """
    inner_model(skeleton)
    try:
        family = FAMILIES.get(skeleton.config.model_type) or inferred_family(skeleton)
        scale = config_number(skeleton.config, family.embedding_scale)
        check_cut(skeleton, scale, logit_facts(family, skeleton.config))
    except UsageError:
        raise
    except Exception as error:  # the model's own code, which was not made to be called like this
        raise UsageError(f"its forward pass cannot be followed ({type(error).__name__}: {error})") from error
    return family


def family_for(checkpoint: Checkpoint) -> Family:
    """The facts of the family of the model in ``checkpoint``, inferred from its structure where no table has them.

    Raises:
        UsageError: the model cannot be cut into pipeline layers.
    """
    known = FAMILIES.get(checkpoint.config.model_type)
    if known is not None:
        return known
    try:
        return facts_of(make_skeleton(checkpoint.config, torch.float32))
    except UsageError as error:
        raise _uncuttable(checkpoint, error) from error


def _uncuttable(checkpoint: Checkpoint, reason: UsageError) -> UsageError:
    kind = checkpoint.config.model_type
    return UsageError(f"{checkpoint.directory}: a model of type {kind!r} cannot be cut into pipeline layers: {reason}.")


class CausalLM:
    """A causal LM on disk, from which single modules are built.

    Args:
        directory: the model's; or its opened checkpoint.
        dtype: of all weights.
        device: where modules are loaded to.
        attention: transformers' name of the attention implementation; None: sdpa, or what the family needs instead.
        four_bit: hold the blocks' weights in nf4.

    Attributes:
        stored: bytes of the blocks loaded so far by kind of storage (:func:`cadapter.models.quantise.stored_bytes`).

    Raises:
        UsageError: the directory is no usable model, it cannot be cut into pipeline layers, or its weights cannot be
            held in 4 bits.
    """

    def __init__(
        self,
        directory: Path | Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str | None = None,
        four_bit: bool = False,
    ) -> None:
        self.checkpoint = directory if isinstance(directory, Checkpoint) else Checkpoint(directory)
        self.config: Any = self.checkpoint.config
        self.dtype = dtype
        self.device = torch.device(device)
        self.four_bit = four_bit
        try:
            self.skeleton: Any = make_skeleton(self.config, dtype, attention)
        except UsageError as error:
            raise UsageError(f"{self.checkpoint.directory / 'config.json'}: {error}") from error
        try:
            self.family: Family = facts_of(self.skeleton)
        except UsageError as error:
            raise _uncuttable(self.checkpoint, error) from error
        self.weights = StoredWeights(self.checkpoint, self.skeleton)
        self._compare_names()
        self._inner = inner_model(self.skeleton)
        self.stored = dict.fromkeys(KINDS, 0)
        if four_bit:
            load_bitsandbytes(self.device)
            for block in self._inner.layers:
                refuse_unfit(block, self.device)
        if isinstance(getattr(self._inner, "rotary_emb", None), nn.Module):
            self._inner.rotary_emb.to(self.device)

    @property
    def attention(self) -> str:
        """transformers' name of the attention implementation."""
        return self.config._attn_implementation

    def attend_by_block_masks(self) -> None:
        """Use FlexAttention from now on: for isolated documents it computes the blocks of scores that hold any."""
        self.config._attn_implementation = FLEX_ATTENTION

    @property
    def takes_block_masks(self) -> bool:
        """Whether the family's blocks can use FlexAttention."""
        return bool(self.skeleton._supports_flex_attn)

    @property
    def layer_count(self) -> int:
        """Number of decoder blocks."""
        return len(self._inner.layers)

    @property
    def hidden_size(self) -> int:
        """H, the width of the residual stream."""
        return self.config.hidden_size

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's: where the config says so and the files hold no other."""
        return bool(self.config.tie_word_embeddings) and HEAD not in self.weights

    @property
    def embedding_scale(self) -> float:
        """What token embeddings are multiplied by, outside of the embedding module."""
        return config_number(self.config, self.family.embedding_scale)

    @property
    def residual_scale(self) -> float:
        """What a block multiplies the outputs of its two modules by before it adds them to the residual stream."""
        return config_number(self.config, self.family.residual_scale)

    @property
    def logits(self) -> LogitFacts:
        """What is done to the products of hidden states and head weight."""
        return logit_facts(self.family, self.config)

    @property
    def has_experts(self) -> bool:
        """Whether a block holds experts, fused in one tensor [experts, out, in]."""
        return any(parameter.ndim == 3 for parameter in self._inner.layers.parameters())

    def skeleton_block(self, index: int) -> nn.Module:
        """Block ``index`` as it is built, on the meta device unless it was loaded."""
        return self._inner.layers[index]

    def layer_bytes(self) -> list[int]:
        """Bytes of weights of each pipeline layer as it will lie in memory: embedding, blocks, final norm with head."""
        size = self.dtype.itemsize
        vocabulary = size * self.weights.numbers(EMBEDDING)
        head = size * self.weights.numbers(EMBEDDING if self.tied else HEAD)
        if self.four_bit:
            blocks = [planned_bytes(self._inner.layers[index]) for index in range(self.layer_count)]
        else:
            blocks = [size * self.weights.numbers(LAYER_PREFIX.format(index)) for index in range(self.layer_count)]
        return [vocabulary, *blocks, head]

    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """The keyword arguments that the model calls each of its blocks with, for sequences of ``length`` tokens."""
        embeddings = torch.zeros(1, length, self.hidden_size, dtype=self.dtype, device=self.device)
        return record_calls(self.skeleton, embeddings)[1]

    def isolating_arguments(self, positions: Tensor) -> list[dict[str, Any]]:
        """The same for documents that do not see each other: ``positions`` [B, T] begin again with each."""
        embeddings = torch.zeros((), dtype=self.dtype, device=self.device).expand(*positions.shape, self.hidden_size)
        # A copy: the arguments may hold the positions, and what holds its own key is never let go.
        return arguments_at(self.skeleton, embeddings, positions.to(self.device, copy=True))

    def cached_arguments(self, length: int, cache: Any) -> list[dict[str, Any]]:
        """The same for the next ``length`` tokens, where ``cache`` holds the keys and values of those before them."""
        embeddings = torch.zeros(1, length, self.hidden_size, dtype=self.dtype, device=self.device)
        return arguments_after(self.skeleton, embeddings, cache)

    def _compare_names(self) -> None:
        def is_ours(name: str) -> bool:
            parts = name.split(".")
            number = next((part for part in parts if part.isdigit()), None)
            # Some files hold further blocks, for predicting several tokens at once.
            return number is None or int(number) < len(inner_model(self.skeleton).layers)

        unknown = [name for name in self.weights.unknown if is_ours(name)]
        if unknown or self.weights.missing:
            raise self._misfit(self.weights.missing, unknown)

    def _misfit(self, missing: list[str], unknown: list[str]) -> UsageError:
        return UsageError(
            f"{self.checkpoint.directory}: the weights do not fit the config's {self.config.model_type} model.\n"
            + "".join(f"Missing: {name}\n" for name in missing[:5])
            + "".join(f"Unknown: {name}\n" for name in unknown[:5])
            + "A model that was quantised or whose parts were renamed cannot be used; take the original."
        )

    def _fill(self, module: nn.Module, prefix: str, device: torch.device | None = None) -> nn.Module:
        """Load every tensor of ``module`` from the names that start with ``prefix``, and freeze it."""
        device = device or self.device
        found = self.weights.read(prefix, self.dtype, device)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        missing = [prefix + name for name in module.state_dict() if name not in tensors]
        if missing:
            raise self._misfit(missing, [])
        try:
            module.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise UsageError(f"{self.checkpoint.directory}: {error}") from error
        module.to(device)  # what is no parameter: computed buffers
        return module.requires_grad_(False)

    def embedding(self, device: torch.device | None = None) -> nn.Module:
        """Load the token embedding, to ``device`` if it is to lie elsewhere than the model."""
        return self._fill(self._inner.embed_tokens, EMBEDDING.removesuffix("weight"), device)

    def block(self, index: int) -> nn.Module:
        """Load decoder block ``index``, in 4 bits where that was asked for."""
        block = self._fill(self._inner.layers[index], LAYER_PREFIX.format(index))
        if self.four_bit:
            quantise_block_(block)
        for kind, size in stored_bytes([block]).items():
            self.stored[kind] += size
        return block

    def final_norm(self) -> nn.Module:
        """Load the norm before the head."""
        return self._fill(self._inner.norm, NORM_PREFIX)

    def head_weight(self, embedding: nn.Module | None = None) -> nn.Parameter:
        """Return the head's weight [V, H]: the embedding's own where it is tied and ``embedding`` is at hand."""
        if self.tied and embedding is not None:
            return embedding.weight  # type: ignore[return-value]  # nn.Module types its attributes loosely
        name = EMBEDDING if self.tied else HEAD
        found = self.weights.read(name, self.dtype, self.device)
        if name not in found:
            raise self._misfit([name], [])
        return nn.Parameter(found[name], requires_grad=False)

    def head_weights(self, embedding: nn.Module | None = None) -> list[nn.Parameter]:
        """The head's weights of a pipeline's last layer: one, which all rows of a micro-batch share."""
        return [self.head_weight(embedding)]
