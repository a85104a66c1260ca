"""What blocks keep, by the planner's formulas, and what really lives in memory after a forward pass on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from cadapter.adapters.control import ControlSettings
from cadapter.adapters.lora import LoraSettings
from cadapter.adapters.lora_targets import match_model
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import CausalLM
from cadapter.planning.blocks import Block, block_shape
from cadapter.planning.memory import RunSizes, TrainedBytes, stage_memory
from cadapter.training.modes.control import ControlMode
from cadapter.training.modes.full import FullMode
from cadapter.training.modes.lora import LoraMode
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder
from tests.tiny_models import FAMILY_NAMES

HIDDEN, INNER, LAYERS, TOKENS, RANK = 64, 192, 4, 256, 4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("kept")
    LlamaForCausalLM(config).save_pretrained(root)
    return root


def mode_of(kind: str, model: CausalLM, directory: Path, layers: list[int]) -> Any:
    if kind in ("block", "mlp", "writes"):
        return ControlMode(model, layers, ControlSettings(RANK, 2.0, kind))
    if kind == "lora":
        blocks = [model.skeleton_block(index) for index in range(model.layer_count)]
        return LoraMode(model, match_model(blocks, layers, None), LoraSettings(RANK, 2.0))
    name = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    return FullMode(model, layers if len(layers) < model.layer_count else None, None, directory, name)


def sizes(model: CausalLM, mode: Any) -> RunSizes:
    blocks = tuple(
        Block(block_shape(model.skeleton_block(index), model.config), mode.change(index))
        for index in range(model.layer_count)
    )
    return RunSizes(
        mode.name, tuple(model.layer_bytes()), tuple(mode.trainable()), TrainedBytes(4, 4, 8), blocks,
        model.hidden_size, 96, model.dtype.itemsize, TOKENS,
    )  # fmt: skip


def living_bytes(layers: list[nn.Module], hidden: Any) -> int:
    """Bytes that live after a forward pass through ``layers`` and did not before, their last output not counted."""
    for _ in range(2):  # the first pass makes what is made once: masks, rotary embeddings
        parts = hidden
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for layer in layers:
                parts = layer(parts)
        living = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        last = parts[0].nbytes
        del parts
    return living - last


@pytest.mark.parametrize("every", [0, 1, 2], ids=["none", "full", "every 2nd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["block", "mlp", "writes", "lora", "full"])
def test_the_formulas_give_what_lives_after_a_forward_pass(directory: Path, kind: str, dtype: str, every: int) -> None:
    """Within 8 %: r × r matrices, a number for each row of a norm, and codes are left out of the formulas."""
    model = CausalLM(directory, DTYPES[dtype])
    adapted = list(range(LAYERS))
    mode, recompute = mode_of(kind, model, directory, adapted), Recompute(every)
    expected = stage_memory(sizes(model, mode), [0, LAYERS + 2], 0, recompute.block).activations
    layers = [build() for build in StageBuilder(model, mode, CarrierFormat(), recompute).builders()]
    mode.trained(layers)
    ids, codes = torch.randint(96, (1, TOKENS)), torch.ones(1, TOKENS, dtype=torch.int8)
    found = living_bytes(layers[:-1], (ids, codes, torch.zeros(1, dtype=torch.int64)))
    assert found == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family(tiny_model: Any, name: str) -> None:
    """Of a middle block as it is, within 15 %: tiny models make much of what the formulas leave out."""
    model = CausalLM(tiny_model(name, torch.bfloat16), torch.bfloat16)
    mode = ControlMode(model, [1], ControlSettings(RANK, 2.0))
    block = Block(block_shape(model.skeleton_block(1), model.config), mode.change(1))
    expected = TOKENS // 4 * block.kept("none", 2, TOKENS // 4, compiled=False)
    layers = [build() for build in StageBuilder(model, mode, CarrierFormat(), Recompute(0)).builders()]
    hidden = torch.randn(1, TOKENS // 4, model.hidden_size).bfloat16().requires_grad_()
    found = living_bytes([layers[2]], (hidden, torch.ones(1, TOKENS // 4, dtype=torch.int8)))
    assert found == pytest.approx(expected, rel=0.15)


def test_a_frozen_start_keeps_nothing_and_a_later_stage_keeps_all(directory: Path) -> None:
    model = CausalLM(directory, torch.float32)
    run = sizes(model, mode_of("block", model, directory, [2, 3]))
    whole = stage_memory(run, [0, LAYERS + 2], 0, lambda _: "none").activations
    cut = [stage_memory(run, [0, 2, LAYERS + 2], stage, lambda _: "none").activations for stage in (0, 1)]
    assert cut[0] == 0  # block 0 alone
    assert cut[1] > 2 * whole  # block 1 as well, and all of block 2
