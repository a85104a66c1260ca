"""A Hugging Face causal LM taken apart: single modules, loaded one at a time, straight to their device.

The model is built once without memory (on the meta device) for its module classes and its rotary embedding;
real tensors are then read for the modules that this process needs, and for no others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import Family, family_of

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM_PREFIX = "model.norm."
LAYER_PREFIX = "model.layers.{}."

COMPUTED_BUFFERS = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and that models now compute."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class CausalLM:
    """A causal LM on disk, from which single modules are built.

    Args:
        directory: the model's.
        dtype: of all weights.
        device: where modules are loaded to.
        attention: transformers' name of the attention implementation.

    Raises:
        UsageError: the directory is no usable model, or its family is not supported.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str = "sdpa"
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.checkpoint = Checkpoint(directory)
        self.config: Any = self.checkpoint.config
        self.family: Family = family_of(self.config.model_type)
        # The base is frozen; dropout inside it would differ with the layout and under recomputation.
        self.config.attention_dropout = 0.0
        self.dtype = dtype
        self.device = torch.device(device)
        # Buffers such as the rotary frequencies are in no checkpoint: they are computed here, on the CPU.
        try:
            with init_empty_weights(include_buffers=False):
                self._skeleton = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
                )
        except (ValueError, KeyError, TypeError, ImportError) as error:  # a wrong name, a package that is not there
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"{directory / 'config.json'}: no model can be built with {attention} attention.\n{reason}"
            ) from error
        self.rotary: nn.Module = self._skeleton.model.rotary_emb.to(self.device)

    @property
    def layer_count(self) -> int:
        """Number of decoder blocks."""
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """H, the width of the residual stream."""
        return self.config.hidden_size

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's: where the config says so and the files hold no other."""
        return bool(self.config.tie_word_embeddings) and HEAD not in self.checkpoint

    def layer_bytes(self) -> list[int]:
        """Bytes of weights of each pipeline layer: embedding, blocks, final norm with head."""
        size = self.dtype.itemsize
        info = self.checkpoint.info
        blocks = [0] * self.layer_count
        for name in self.checkpoint.names():
            if name.startswith("model.layers."):
                index = int(name.split(".")[2])
                if index < self.layer_count:
                    blocks[index] += size * _count(info(name).shape)
        head = size * _count(info(EMBEDDING if self.tied else HEAD).shape)
        return [size * _count(info(EMBEDDING).shape), *blocks, head]

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self.checkpoint.tensors(names, self.device)
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        """Load every tensor of ``module`` from the names that start with ``prefix``, and freeze it."""
        wanted = list(module.state_dict())
        present = {name.removeprefix(prefix) for name in self.checkpoint.names() if name.startswith(prefix)}
        missing = [name for name in wanted if name not in present]
        unknown = [name for name in present if name not in wanted and not name.endswith(COMPUTED_BUFFERS)]
        if missing or unknown:
            raise UsageError(
                f"{self.checkpoint.directory}: the weights do not fit the config's {self.config.model_type} model.\n"
                + "".join(f"Missing: {prefix}{name}\n" for name in missing[:5])
                + "".join(f"Unknown: {prefix}{name}\n" for name in sorted(unknown)[:5])
                + "A model that was quantised or whose parts were renamed cannot be used; take the original."
            )
        tensors = {name.removeprefix(prefix): t for name, t in self._read([prefix + n for n in wanted]).items()}
        try:
            module.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise UsageError(f"{self.checkpoint.directory}: {error}") from error
        module.to(self.device)  # what is no parameter: computed buffers
        return module.requires_grad_(False)

    def embedding(self) -> nn.Module:
        """Load the token embedding."""
        return self._fill(self._skeleton.model.embed_tokens, EMBEDDING.removesuffix("weight"))

    def block(self, index: int) -> nn.Module:
        """Load decoder block ``index``."""
        return self._fill(self._skeleton.model.layers[index], LAYER_PREFIX.format(index))

    def final_norm(self) -> nn.Module:
        """Load the norm before the head."""
        return self._fill(self._skeleton.model.norm, NORM_PREFIX)

    def head_weight(self, embedding: nn.Module | None = None) -> Tensor:
        """Return the head's weight [V, H]: the embedding's own where it is tied and ``embedding`` is at hand."""
        if self.tied and embedding is not None:
            return embedding.weight  # type: ignore[return-value]  # nn.Module types its attributes loosely
        name = EMBEDDING if self.tied else HEAD
        return self._read([name])[name]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
