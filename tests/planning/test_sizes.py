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
from cadapter.training.stages import StageBuilder
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


def test_a_tied_model_on_two_stages_has_two_copies(tiny_model: Callable[..., Path]) -> None:
    for name, keys in (("llama-tied", MODES["full"]), ("llama-tied", MODES["control"])):
        sizes = outlook_of(config_of(tiny_model(name), **keys)).sizes
        bounds = [0, 3, len(sizes.layer_bytes)]
        one, other = (stage_memory(sizes, bounds, stage, lambda _: "none") for stage in (0, 1))
        whole = stage_memory(sizes, [0, len(sizes.layer_bytes)], 0, lambda _: "none")
        assert one.weights + other.weights == whole.weights + sizes.layer_bytes[0]
        copied = sizes.layer_bytes[0] if keys == MODES["full"] else 0
        assert one.gradients + other.gradients == whole.gradients + copied


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
