"""Full fine-tuning: the model's own weights are trained, all of them or those that a filter names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.full import TrainedWeights
from cadapter.errors import UsageError
from cadapter.models.layers import DecoderLayer, EmbeddingLayer, HeadLayer
from cadapter.models.loading import EMBEDDING, HEAD, LAYER_PREFIX, NORM_PREFIX, CausalLM
from cadapter.models.saving import ModelWriter
from cadapter.planning.blocks import Change, block_shape, components_read
from cadapter.training.modes.base import trained_bytes

_ROOT = re.compile(r"model\.(layers\.\d+\.)?")
"""What stands before the names of modules within a block, and of those outside of all blocks."""


class FullMode:
    """Full fine-tuning of a model.

    Args:
        model: the model to train; when a run is resumed, the checkpoint's.
        layers: the decoder blocks that are trained; None: all, and what is outside of them.
        targets: names of modules that are trained with all that is in them, and of tensors of fused experts; whole
            names, or parts of them between dots. None: every module.
        companions: the directory whose tokenizer and generation config go along when the model is saved.
        dtype_name: "bfloat16" or "float32".
        gradient_dtype: in which gradients add up.

    Raises:
        UsageError: a target names nothing.
    """

    name = "full"
    applications = 1

    def __init__(
        self,
        model: CausalLM,
        layers: Sequence[int] | None,
        targets: Sequence[str] | None,
        companions: Path,
        dtype_name: str,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.layers = list(range(model.layer_count)) if layers is None else list(layers)
        self.only_layers = layers is not None
        self.targets = None if targets is None else list(targets)
        self.companions = companions
        self.dtype_name = dtype_name
        widest = max(model.dtype, gradient_dtype, key=lambda dtype: dtype.itemsize)
        # The weights themselves count among those of the model.
        self.per_trained = trained_bytes(model.dtype, widest)._replace(weight=0)
        self._chosen = self._choose()

    def _choose(self) -> set[str]:
        """Names of the trained parameters of the whole model."""
        names = list(self._parameters())
        if self.only_layers:
            prefixes = tuple(LAYER_PREFIX.format(layer) for layer in self.layers)
            names = [name for name in names if name.startswith(prefixes)]
        if self.targets is None:
            return set(names)
        chosen = {target: [name for name in names if _is_within(name, target)] for target in self.targets}
        empty = [target for target, found in chosen.items() if not found]
        if empty:
            there = dict.fromkeys(_ROOT.sub("", name).removesuffix(".weight").removesuffix(".bias") for name in names)
            raise UsageError(
                f"target_modules = {self.targets}: nothing in the chosen layers is called {' or '.join(empty)}.\n"
                f"There are: {', '.join(there)}."
            )
        return {name for found in chosen.values() for name in found}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the whole model; a head tied to the embedding is the embedding."""
        found = dict(self.model.skeleton.named_parameters(remove_duplicate=False))
        if self.model.tied:
            del found[HEAD]
        return found

    def wrap(self, block: nn.Module, index: int) -> nn.Module:
        """Leave the block as it is."""
        return block

    def trainable(self) -> list[int]:
        """Trained numbers of each pipeline layer."""
        counts = [0] * (self.model.layer_count + 2)
        for name, parameter in self._parameters().items():
            if name in self._chosen:
                counts[_pipeline_layer(name, self.model.layer_count)] += parameter.numel()
        return counts

    def change(self, index: int) -> Change:
        """Trained weights keep what their layers read."""
        prefix, block = LAYER_PREFIX.format(index), self.model.skeleton_block(index)
        chosen = {name.removeprefix(prefix) for name in self._chosen if name.startswith(prefix)}
        numbers = sum(block.get_parameter(name).numel() for name in chosen)
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        trained = [name for name in linears if f"{name}.weight" in chosen]
        read = components_read(block, trained, self.model.family.attention_writers)
        has_norms = any("norm" in name for name in chosen)
        experts = [name for name in chosen if block.get_parameter(name).ndim == 3]
        if experts:
            shape = block_shape(block, self.model.config)
            read += shape.inner + shape.experts * shape.hidden
        return Change(numbers=numbers, inputs=read, norms=has_norms)

    def _tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters and persistent buffers of a pipeline layer by the names they have in the whole model."""
        if isinstance(layer, EmbeddingLayer):
            return _named(layer.table, EMBEDDING.removesuffix("weight"))
        if isinstance(layer, DecoderLayer):
            return _named(layer.block, LAYER_PREFIX.format(layer.index))
        if isinstance(layer, HeadLayer):
            tensors = _named(layer.norm, NORM_PREFIX)
            tensors[EMBEDDING if self.model.tied else HEAD] = layer.weights[0]
            return tensors
        return {}

    def trained(self, layers: Sequence[nn.Module]) -> TrainedWeights:
        """Let the chosen parameters of this stage be trained."""
        found: dict[str, nn.Parameter] = {}
        for layer in layers:
            for name, tensor in self._tensors(layer).items():
                if name in self._chosen and isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_()
                    found[name] = tensor
        is_copy = self.model.tied and not any(isinstance(layer, EmbeddingLayer) for layer in layers)
        return TrainedWeights(found, frozenset({EMBEDDING} & found.keys() if is_copy else ()), self.model.device)

    def parts(self, layers: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
        """All tensors of one pipeline layer after the other, trained or not."""
        for layer in layers:
            tensors = self._tensors(layer)
            if isinstance(layer, HeadLayer) and self.model.tied:
                del tensors[EMBEDDING]
            yield {name: tensor.detach() for name, tensor in tensors.items()}

    def writer(self, directory: Path) -> ModelWriter:
        """A writer of a model directory."""
        return ModelWriter(
            self.companions,
            self.model.skeleton,
            directory,
            self.dtype_name,
            self.model.tied,
            with_code=self.model.checkpoint.trust_remote_code,
        )

    def look_up_base(self) -> None:
        """Nothing to do: the base's files are copied."""

    def check_start(self, directory: Path) -> None:
        """Nothing to do: a config says with ``model_dir`` what is trained."""

    def load(self, layers: Sequence[nn.Module], directory: Path) -> None:
        """Nothing to do: the model was loaded from there in the first place."""

    def facts(self) -> dict[str, Any]:
        """What is trained."""
        return {"layers": self.layers, "target_modules": self.targets, "dtype": self.dtype_name}

    def description(self) -> str:
        """How many parameters of how many."""
        total = sum(parameter.numel() for parameter in self._parameters().values())
        return f"Full fine-tuning: {sum(self.trainable()):,} of {total:,} parameters in {self.dtype_name}."


def _named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    kept = module.state_dict(keep_vars=True)
    return {prefix + name: tensor for name, tensor in kept.items() if isinstance(tensor, torch.Tensor)}


def _is_within(name: str, target: str) -> bool:
    """Whether parameter ``name`` is called ``target`` or belongs to a module called so: "mlp" names all of an MLP."""
    return f".{target}." in f".{name}."


def _pipeline_layer(name: str, blocks: int) -> int:
    if name.startswith("model.layers."):
        return 1 + int(name.split(".")[2])
    return 0 if name == EMBEDDING else blocks + 1
