"""Training LoRA, through PEFT, in the blocks of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadapter.adapters.lora import LoraBlock, LoraSettings
from cadapter.adapters.lora_directory import load_into, read_lora_adapter, write_lora_adapter
from cadapter.adapters.lora_targets import ModelTargets, Targets, count_parameters
from cadapter.adapters.trained_lora import TrainedLora
from cadapter.config import Config
from cadapter.errors import UsageError
from cadapter.models.layers import DecoderLayer
from cadapter.models.loading import DTYPES, CausalLM
from cadapter.planning.blocks import Change, components_read, width_read
from cadapter.training.modes.base import check_rank_and_alpha, trained_bytes


def lora_settings(config: Config) -> LoraSettings:
    """What a config says of its LoRA."""
    return LoraSettings(
        rank=config.lora_rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        dtype=DTYPES[config.lora_weight_dtype],
        targets=None if config.target_modules is None else tuple(config.target_modules),
    )


class LoraMode:
    """LoRA on some linear layers of a model.

    Args:
        model: the base.
        targets: what LoRA goes to.
        settings: of all pairs.
        seed: of their initial values.
        decay: λ of the composite decay.
        base_name: the base as the config names it.
    """

    name = "lora"
    applications = 1

    def __init__(
        self,
        model: CausalLM,
        targets: ModelTargets,
        settings: LoraSettings,
        seed: int = 0,
        decay: float = 0.0,
        base_name: str = "",
    ) -> None:
        self.model = model
        self.targets = targets
        self.layers = list(targets.by_layer)
        self.settings = settings
        self.seed = seed
        self.decay = decay
        self.base_name = base_name
        self.per_trained = trained_bytes(settings.dtype, torch.float32)
        # Counted now, while the blocks are as the model has them.
        self._numbers = [
            count_parameters(model.skeleton_block(index), targets.by_layer.get(index, Targets()), settings.rank)
            for index in range(model.layer_count)
        ]

    def wrap(self, block: nn.Module, index: int) -> nn.Module:
        """Put LoRA into a block that has targets."""
        targets = self.targets.by_layer.get(index)
        return block if targets is None else LoraBlock(block, index, targets, self.settings, self.seed)

    def trainable(self) -> list[int]:
        """r·(in + out) for each linear layer, and for each expert, of each block."""
        return [0, *self._numbers, 0]

    def change(self, index: int) -> Change:
        """A pair keeps what its layer reads and r numbers; with dropout each layer has a copy of its own."""
        targets, settings = self.targets.by_layer.get(index), self.settings
        if targets is None:
            return Change()
        block = self.model.skeleton_block(index)
        read = components_read(block, targets.linears, self.model.family.attention_writers)
        copied = sum(width_read(block, name) for name in targets.linears) if settings.dropout > 0 else 0
        return Change(
            numbers=self._numbers[index],
            inputs=copied or read,
            narrow=len(targets.names) * settings.rank,
            masked=copied,
        )

    def trained(self, layers: Sequence[nn.Module]) -> TrainedLora:
        """The pairs of this stage."""
        blocks, names = lora_blocks_of(layers), self.targets.pair_names()
        return TrainedLora(blocks, self.settings, names, self.decay, self.model.device)

    def parts(self, layers: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
        """All factors of this stage at once."""
        yield {name: parameter.detach() for name, parameter in self.trained(layers).parameters().items()}

    def writer(self, directory: Path) -> LoraWriter:
        """A writer of a LoRA directory."""
        return LoraWriter(directory, self)

    def look_up_base(self) -> None:
        """Nothing to do: a LoRA's directory says of the base only what it is called."""

    def check_start(self, directory: Path) -> None:
        """Make sure that ``directory`` holds a LoRA on this run's modules, at its rank and scale.

        Raises:
            UsageError: it does not.
        """
        files, settings = read_lora_adapter(directory), self.settings
        stored = files.settings
        check_rank_and_alpha(directory, (stored.rank, stored.alpha), (settings.rank, settings.alpha))
        ours, theirs = _places(self.targets.by_layer), _places(files.targets)
        missing, further = sorted(ours - theirs), sorted(theirs - ours)
        if missing or further:
            what = f"does not hold {missing[0]}, which" if missing else f"holds {further[0]}, which"
            does = "trains" if missing else "does not train"
            raise UsageError(f"{directory} {what} this run {does}.\nSee target_modules and layers_to_transform.")

    def load(self, layers: Sequence[nn.Module], directory: Path) -> None:
        """Take over the factors of this stage's pairs.

        Raises:
            UsageError: a pair is missing or has another shape, or there are pairs that this run does not train.
        """
        load_into(lora_blocks_of(layers), directory, self.layers)

    def facts(self) -> dict[str, Any]:
        """Shape and place of the pairs."""
        return {
            "layers": self.layers,
            "lora_rank": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_weight_dtype": str(self.settings.dtype).removeprefix("torch."),
            "target_modules": list(self.targets.target_modules),
            "target_parameters": list(self.targets.target_parameters),
        }

    def description(self) -> str:
        """Rank, scale, modules, layers, parameters."""
        settings, targets = self.settings, self.targets
        experts = sorted({name for each in targets.by_layer.values() for name in each.experts})
        names = ", ".join((*targets.target_modules, *experts))
        pairs = len(targets.pair_names())
        return (
            f"LoRA: rank {settings.rank}, scale {settings.scale:g}, on {names} in {len(self.layers)} of "
            f"{self.model.layer_count} layers ({pairs} pairs), {sum(self.trainable()):,} parameters."
        )


class LoraWriter:
    """Writes a LoRA directory once all stages' factors are there."""

    def __init__(self, directory: Path, mode: LoraMode) -> None:
        self._directory = directory
        self._mode = mode
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: dict[str, Tensor]) -> None:
        """Keep a stage's factors."""
        self._tensors.update(part)

    def finish(self) -> None:
        """Write the directory."""
        mode = self._mode
        kind = mode.model.config.model_type
        write_lora_adapter(self._directory, self._tensors, mode.settings, mode.targets, mode.base_name, kind)


def _places(by_layer: Mapping[int, Targets]) -> set[str]:
    return {f"layers.{layer}.{name}" for layer, targets in by_layer.items() for name in targets.names}


def lora_blocks_of(layers: Sequence[nn.Module]) -> list[LoraBlock]:
    """The blocks with LoRA among a stage's pipeline layers, in order."""
    blocks = [layer.block for layer in layers if isinstance(layer, DecoderLayer)]
    return [block for block in blocks if isinstance(block, LoraBlock)]
