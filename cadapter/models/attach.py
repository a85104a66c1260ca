"""A whole Hugging Face causal LM with a control adapter around its blocks, and the dial that sets its strength.

The adapter is applied natively, with nothing merged: ``model`` stays an ordinary Hugging Face model, whose ``generate``
and key-value cache work as before, and strength 0 is exactly the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from cadapter.adapters.control import ControlledBlock, new_adapter
from cadapter.adapters.directory import ControlAdapterFiles, validate_against
from cadapter.adapters.strengths import load_factors, native_settings, strength_tables
from cadapter.errors import CadapterError, UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES, Family, config_number
from cadapter.models.loading import family_for, needed_attention
from cadapter.models.own_code import auto_model, failures, is_own_class

Strength = float | Sequence[float]
"""A strength for all rows of a batch, or one for each."""

UNLISTED = Family(added=None)
"""What is known of a block of a family that is in no table: it adds its output minus its input."""


def rows_of(strength: Strength) -> list[float]:
    """The strengths of the rows of a batch; one stands for all.

    Raises:
        UsageError: there is none, or one is no number.
    """
    rows = strength if isinstance(strength, Sequence) else [strength]
    for t in rows:
        if not isinstance(t, Real) or not math.isfinite(t):
            raise UsageError(f"The strength {t!r} is not a finite number.\nGive one, such as 1, -1 or 0.5.")
    if not rows or isinstance(rows, str):
        raise UsageError("There is no strength.\nGive a number, or one for each row of a batch.")
    return [float(t) for t in rows]


def load_causal_lm(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """Load the model of ``checkpoint`` with transformers, for inference, straight to ``device``.

    Args:
        checkpoint: its directory; code of the model's own is run where the checkpoint was opened with it.
        dtype: of all weights; None: what the model's config says.
        device: for example "cpu" or "cuda:1".

    Raises:
        UsageError: the weights do not fit the config, or transformers cannot load them.
        CadapterError: the device has too little memory.
    """
    directory = checkpoint.directory
    if (directory / "adapter_config.json").exists():
        raise UsageError(
            f"{directory} holds an adapter beside the model (adapter_config.json), which transformers would apply to "
            "it.\nMove the adapter's files to a directory of their own, and name that as the adapter."
        )
    try:
        model, found = auto_model(checkpoint.config).from_pretrained(
            directory,
            dtype="auto" if dtype is None else dtype,
            device_map={"": device},
            trust_remote_code=is_own_class(checkpoint.config),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=needed_attention(checkpoint.config),
        )
    except torch.OutOfMemoryError as error:
        raise CadapterError(
            f"{directory} does not fit into the memory of {device}.\nTry the dtype bfloat16, or the device cpu."
        ) from error
    except failures(checkpoint.config, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{directory}: transformers cannot load this model: {reason}") from error
    # transformers fills what is missing with random numbers.
    missing = sorted(found["missing_keys"])
    if missing:
        raise UsageError(
            f"{directory} lacks tensors of its {checkpoint.config.model_type} model "
            f"({len(missing)}, such as {missing[0]}).\nDownload the model again."
        )
    return model.eval()


def check_fit(files: ControlAdapterFiles, checkpoint: Checkpoint) -> None:
    """Make sure that an adapter can be attached to a model, before any of its weights are read.

    Raises:
        UsageError: another hidden size, too few layers, or a model whose blocks cannot be told apart.
    """
    family_for(checkpoint)
    validate_against(files, checkpoint.config.hidden_size, checkpoint.config.num_hidden_layers)


class SteeredModel:
    """A causal LM each of whose adapted blocks applies ``(I + W)^t`` to what it adds, at every position.

    The blocks are wrapped in place; around blocks that are wrapped already, this adapter acts on what those add. With
    ``output_hidden_states`` transformers records what the wrapped blocks return, which for the site "block" is before
    the adapter's change.

    Args:
        model: what ``AutoModelForCausalLM`` gives; its blocks must be ``model.model.layers``.
        files: the adapter, which must fit (see :func:`check_fit`).
        strength: t to start with.

    Attributes:
        model: the model given.
        files: the adapter given.
        blocks: the wrapped blocks by layer.
        strength: t, or those of the rows of a batch.

    Raises:
        UsageError: the adapter does not fit the model, or this strength does not exist for it.
    """

    def __init__(self, model: Any, files: ControlAdapterFiles, strength: Strength = 1.0) -> None:
        validate_against(files, model.config.hidden_size, model.config.num_hidden_layers)
        family = FAMILIES.get(model.config.model_type, UNLISTED)
        residual_scale = config_number(model.config, family.residual_scale)
        settings = native_settings(files)
        self.model = model
        self.files = files
        self.blocks: dict[int, ControlledBlock] = {}
        for layer in files.layers:
            block = model.model.layers[layer]
            # What a block with an adapter adds is no longer the sum of its modules' outputs.
            facts = UNLISTED if isinstance(block, ControlledBlock) else family
            adapter = new_adapter(files.hidden_size, layer, settings, 0, next(block.parameters()).device)
            load_factors(adapter, files)
            self.blocks[layer] = ControlledBlock(block, adapter.requires_grad_(False), facts, residual_scale).eval()
        try:
            self.set_strength(strength)
        except UsageError:
            for controlled in self.blocks.values():
                controlled.remove()
            raise
        for layer, controlled in self.blocks.items():
            model.model.layers[layer] = controlled

    def set_strength(self, strength: Strength) -> None:
        """Apply ``(I + W)^strength`` from now on: 1 as trained, −1 its exact inverse, 0 the base bit for bit.

        Args:
            strength: for all rows of a batch, or one for each.

        Raises:
            UsageError: this power does not exist for a layer, which is named; the strength stays as it was.
        """
        rows = rows_of(strength)
        distinct = sorted(set(rows)) if any(rows) else []
        tables = strength_tables(self.files, distinct)
        codes = torch.tensor([distinct.index(t) for t in rows]) if distinct else None
        for layer, block in self.blocks.items():
            block.fix(tables[layer], codes)
        self.strength = strength

    def remove(self) -> None:
        """Give the model its blocks back as they were; of several adapters, the last one first."""
        for layer, block in self.blocks.items():
            self.model.model.layers[layer] = block.remove()
