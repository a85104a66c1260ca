"""What an evaluation compares with the base: a control adapter at several strengths, a LoRA, a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cadapter.adapters.control import Transform
from cadapter.adapters.directory import (
    CONFIG_NAME,
    ControlAdapterFiles,
    kind_of,
    read_control_adapter,
    validate_against,
)
from cadapter.adapters.lora_directory import LoraAdapterFiles, load_into, read_lora_adapter
from cadapter.adapters.lora_targets import ModelTargets
from cadapter.adapters.strengths import existing_strengths, load_factors, native_settings, neumann_note, strength_tables
from cadapter.config import Config
from cadapter.errors import UsageError
from cadapter.models.checkpoint import resolve_model
from cadapter.models.layers import DecoderLayer
from cadapter.models.loading import CausalLM
from cadapter.training.build import load_base
from cadapter.training.distributed import World
from cadapter.training.modes.base import Mode
from cadapter.training.modes.control import ControlMode, adapters_of
from cadapter.training.modes.full import FullMode
from cadapter.training.modes.lora import LoraMode, lora_blocks_of
from cadapter.training.paired import PairedModel, with_and_without

DEFAULT = (1.0, -1.0)
SWEEP = (-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
"""Strengths at which a control adapter is evaluated where none are named."""


@dataclass(frozen=True)
class Subject:
    """Something to evaluate beside its base.

    Attributes:
        model, mode: what the pipeline is built of.
        strengths: of the rows of a micro-batch; the first is 0, the base.
        install: gives this stage's pipeline layers what they need once they are built.
        models: one, where a row's code tells its strength, wherever it stands; or the model of each strength, where
            layers divide the rows of a micro-batch into equal parts, one for each of them.
        notes: what the user must hear of it.
    """

    model: CausalLM
    mode: Mode
    strengths: list[float]
    install: Callable[[Sequence[nn.Module]], None]
    models: tuple[CausalLM, ...]
    notes: tuple[str, ...] = ()

    def model_at(self, code: int) -> CausalLM:
        """The model whose facts hold at strength number ``code``."""
        return self.models[code if len(self.models) > 1 else 0]


def subject_of(config: Config, path: Path, strengths: Sequence[float] | None, sweep: bool, world: World) -> Subject:
    """Read what is to be evaluated; no weight of the base is read yet.

    Args:
        strengths: of a control adapter; None: those of ``SWEEP`` that exist for it with ``sweep``, else 1 and −1.

    Raises:
        UsageError: it does not fit the base, or cannot be turned to these strengths.
    """
    if (path / "config.json").is_file() and not (path / CONFIG_NAME).is_file():
        _only_one(strengths, path, "a fine-tuned model")
        return _model(config, path, world)
    kind = kind_of(path)
    if kind == "control":
        return _control(config, read_control_adapter(path), strengths, sweep, world)
    if kind == "additive":
        _only_one(strengths, path, "a LoRA")
        return _lora(config, path, world)
    raise UsageError(f"{path} is a {kind} LoRA.\nMerge it into its base and evaluate the merged model.")


def _only_one(strengths: Sequence[float] | None, path: Path, what: str) -> None:
    if any(strength not in (0, 1) for strength in strengths or ()):
        raise UsageError(f"{path} is {what}, which has no strengths: leave --strength out.")


def _control(
    config: Config, files: ControlAdapterFiles, strengths: Sequence[float] | None, sweep: bool, world: World
) -> Subject:
    model = load_base(config, world)
    validate_against(files, model.hidden_size, model.layer_count)
    notes = []
    if strengths is None and sweep:
        strengths, wrong = existing_strengths(files, SWEEP)
        if wrong is not None:
            absent = ", ".join(f"{t:+g}" for t in SWEEP if t not in strengths)
            notes.append(f"Left out of the sweep, since they do not exist for this adapter: {absent}.\n{wrong}")
    rows = [0.0, *dict.fromkeys(t for t in strengths or DEFAULT if t != 0)]
    # Refuse an impossible strength before any weight is read.
    tables = strength_tables(files, rows)
    notes += [said for said in [neumann_note(files, rows)] if said]
    mode = ControlMode(model, list(files.layers), native_settings(files))
    return Subject(model, mode, rows, lambda layers: install(layers, files, tables), (model,), tuple(notes))


def install(layers: Sequence[nn.Module], files: ControlAdapterFiles, tables: dict[int, list[Transform]]) -> None:
    """Give this stage's adapters their factors and its blocks their transforms."""
    for adapter in adapters_of(layers):
        load_factors(adapter, files)
    for layer in layers:
        if isinstance(layer, DecoderLayer) and layer.index in tables:
            device = next(layer.parameters()).device
            moved = [(code, None if t is None else t.to(device)) for code, t in tables[layer.index]]
            layer.set_transforms(moved)


def _lora(config: Config, path: Path, world: World) -> Subject:
    files, model = read_lora_adapter(path), load_base(config, world)
    _check_targets(files, model)
    mode = LoraMode(model, ModelTargets(files.targets, (), ()), files.settings)

    def give(layers: Sequence[nn.Module]) -> None:
        load_into(lora_blocks_of(layers), path)
        for layer in layers:
            if isinstance(layer, DecoderLayer):
                layer.block = with_and_without(layer.block)

    return Subject(model, mode, [0.0, 1.0], give, (model, model))


def _check_targets(files: LoraAdapterFiles, model: CausalLM) -> None:
    """Make sure that the model has what a LoRA goes to."""
    for layer, targets in files.targets.items():
        if layer >= model.layer_count:
            raise UsageError(f"{files.path} adapts layer {layer}; the model has {model.layer_count} layers.")
        block = model.skeleton_block(layer)
        there = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        there |= {name for name, _ in block.named_parameters()}
        absent = [name for name in targets.names if name not in there]
        if absent:
            raise UsageError(
                f"{files.path} adapts {absent[0]} of layer {layer}, which this {model.config.model_type} model does "
                "not have.\nEvaluate it on the model it was trained on."
            )


def _model(config: Config, path: Path, world: World) -> Subject:
    if path.resolve() == resolve_model(config.model_dir).resolve():
        raise UsageError(f"{path} is the base itself.\nName an adapter, or a model that was trained from the base.")
    base, other = load_base(config, world), load_base(config, world, path)
    for name, ours in _shape(base).items():
        theirs = _shape(other)[name]
        if ours != theirs:
            raise UsageError(f"{path} has {name} = {theirs!r}, {config.model_dir} has {ours!r}: they do not compare.")
    model = PairedModel(base, other)
    mode = FullMode(model, None, None, path, config.dtype)
    return Subject(model, mode, [0.0, 1.0], lambda layers: None, (base, other))


def _shape(model: CausalLM) -> dict[str, Any]:
    """What two models have in common that go through one pipeline side by side."""
    names = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
    shared = {name: getattr(model.config, name, None) for name in names}
    return {**shared, "embedding scale": model.embedding_scale, "logits": model.logits}
