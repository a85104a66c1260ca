"""Sizes from configs alone, against models that are really built: parameters, bytes of weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cadapter.config import Config
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.layers import CarrierFormat, EmbeddingLayer
from cadapter.models.loading import CausalLM
from cadapter.models.outline import Outline, open_weightless
from cadapter.planning.memory import stage_memory
from cadapter.training.forecast import outlook_of
from cadapter.training.modes import mode_of
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder, embedding_on_device
from tests.tiny_models import CONFIGS

MODES: dict[str, dict[str, Any]] = {
    "control": {"use_control_adapters": True},
    "lora": {},
    "full": {"full_fine_tune": True},
}


def config_of(directory: Path, **keys: Any) -> Config:
    datasets = [{"dataset_path": "texts.jsonl"}]
    settings = {"lr": 1e-3, "sequence_len": 64, "lora_rank": 4, "dtype": "float32", "datasets": datasets, **keys}
    return Config(model_dir=str(directory), output_dir="run", **settings)


@pytest.fixture
def weightless(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that makes a directory with nothing but a model's config.json."""

    def made(directory: Path) -> Path:
        shutil.copy(directory / "config.json", tmp_path / "config.json")
        return tmp_path

    return made


def storages(layers: list[nn.Module]) -> dict[int, int]:
    """The bytes of all parameters on the device, storages that are shared once."""
    found = {}
    for layer in layers:
        for parameter in layer.parameters():
            found[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    return found


@pytest.mark.parametrize("mode_name", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_bytes_are_those_of_the_model_that_is_built(
    tiny_model: Callable[..., Path], weightless: Callable[[Path], Path], name: str, mode_name: str
) -> None:
    directory = tiny_model(name)
    config = config_of(weightless(directory), **MODES[mode_name])
    outlook = outlook_of(config)

    model = CausalLM(directory, torch.float32)
    mode = mode_of(config.model_copy(update={"model_dir": str(directory)}), model)
    layers = [build() for build in StageBuilder(model, mode, CarrierFormat(), Recompute(0)).builders()]
    parameters = mode.trained(layers).parameters()
    numbers = sum(parameter.numel() for parameter in parameters.values())
    assert numbers == sum(outlook.sizes.trainable) > 0
    assert [block.change.numbers for block in outlook.sizes.blocks] == list(outlook.sizes.trainable[1:-1])

    memory = stage_memory(outlook.sizes, [0, len(layers)], 0, lambda _: "none")
    on_device = layers if mode_name == "full" or model.tied else layers[1:]
    assert isinstance(layers[0], EmbeddingLayer)
    assert memory.weights + memory.adapter == sum(storages(on_device).values())
    assert memory.gradients == 4 * numbers
    assert memory.optimiser == 2 * 4 * numbers


@pytest.mark.parametrize("mode_name", MODES)
def test_a_tied_model_on_two_stages_has_two_copies_a_frozen_one_on_the_host(
    tiny_model: Callable[..., Path], mode_name: str
) -> None:
    directory = tiny_model("llama-tied")
    config = config_of(directory, **MODES[mode_name])
    sizes = outlook_of(config).sizes
    bounds = [0, 3, len(sizes.layer_bytes)]
    predicted = [stage_memory(sizes, bounds, stage, lambda _: "none") for stage in (0, 1)]
    for stage, memory in enumerate(predicted):
        model = CausalLM(directory, torch.float32)
        mode = mode_of(config, model)
        builders = StageBuilder(model, mode, CarrierFormat(), Recompute(0), stages=2).builders()
        layers = [build() for build in builders[bounds[stage] : bounds[stage + 1]]]
        on_device = [layer for layer in layers if not isinstance(layer, EmbeddingLayer) or mode_name == "full"]
        assert memory.weights + memory.adapter == sum(storages(on_device).values())
    whole = stage_memory(sizes, [0, len(sizes.layer_bytes)], 0, lambda _: "none")
    copied = sizes.layer_bytes[0] if mode_name == "full" else 0
    assert sum(each.weights for each in predicted) == whole.weights + copied
    assert sum(each.gradients for each in predicted) == whole.gradients + copied


def test_a_frozen_tied_embedding_is_on_the_host_where_the_head_is_on_another_stage(
    tiny_model: Callable[..., Path],
) -> None:
    directory = tiny_model("llama-tied")
    elsewhere = CausalLM(directory, torch.float32, "meta")  # stands for a GPU, which the tests may not have
    mode = mode_of(config_of(directory, **MODES["control"]), elsewhere)
    first = StageBuilder(elsewhere, mode, CarrierFormat(), Recompute(0), stages=2).builders()[0]()
    assert isinstance(first, EmbeddingLayer)
    assert list(first.parameters()) == []
    assert {parameter.device.type for parameter in first.table.parameters()} == {"cpu"}
    assert embedding_on_device(elsewhere, mode, 1)  # there it is the head's weight as well
    full = mode_of(config_of(directory, **MODES["full"]), elsewhere)
    assert embedding_on_device(elsewhere, full, 2)


def test_four_bits_take_what_they_take_once_loaded(tmp_path: Path) -> None:
    from tests.tiny_project import make_model

    directory = make_model(tmp_path / "model", hidden=128)
    sizes = outlook_of(config_of(directory, use_control_adapters=True, load_in_4bit=True)).sizes
    model = CausalLM(directory, torch.float32, four_bit=True)
    for index in range(model.layer_count):
        model.block(index)
    assert sum(sizes.layer_bytes[1:-1]) == sum(model.stored.values())


def test_an_index_without_shards_says_whether_the_head_is_tied(
    tiny_model: Callable[..., Path], weightless: Callable[[Path], Path]
) -> None:
    directory = weightless(tiny_model("llama-tied"))
    assert CausalLM(Outline(directory), torch.float32, "meta").tied
    index = '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(index)
    assert not CausalLM(Outline(directory), torch.float32, "meta").tied


def test_weights_that_are_there_are_looked_at(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    assert type(open_weightless(tiny_model("llama"))) is Checkpoint
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UsageError, match=r"config\.json cannot be used"):
        open_weightless(tmp_path)
