"""What loading a stage takes of the host's memory and of the disk, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 12288, 20, 512
MIB = 2**20

# Measured in a process of its own: what this one has used before would hide a peak.
WORKER = """
import gc, json, re, sys
from pathlib import Path
import torch
from cadapter.models.layers import CarrierFormat, DecoderLayer
from cadapter.models.loading import CausalLM
from cadapter.training.modes.control import ControlMode, ControlSettings
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

model = CausalLM(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
builder = StageBuilder(model, ControlMode(model, [0], ControlSettings(4, 2.0)), CarrierFormat(), Recompute(0))
first, stop = int(sys.argv[3]), int(sys.argv[4])
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
layers = [build() for build in builder.builders()[first:stop]]
peak = memory("VmHWM")
stays = sum(each.nbytes for layer in layers for each in layer.parameters())
sizes = model.layer_bytes()
print(json.dumps({
    "excess": peak - before - stays, "stays": stays, "read": model.checkpoint.bytes_read,
    "largest": max(sizes), "stage": sum(sizes[first:stop]),
}))
"""


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1.6 GiB in bfloat16, a shard for each two layers; its numbers do not matter."""
    directory = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    config.save_pretrained(directory)
    shapes = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    ends = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    weight_map: dict[str, str] = {}
    for start in range(0, LAYERS, 2):
        names = {f"model.layers.{start + k}.{name}": shape for k in range(2) for name, shape in shapes.items()}
        if start == 0:
            names.update(ends)
        file = f"model-{start:05d}.safetensors"
        tensors = {f"{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in names.items()}
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def load(directory: Path, dtype: str, first: int, stop: int) -> dict[str, int]:
    command = [sys.executable, "-c", WORKER, str(directory), dtype, str(first), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux' /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_one_layer_beyond_what_stays(sharded_model: Path, dtype: str) -> None:
    whole = load(sharded_model, dtype, 0, LAYERS + 2)
    limit = whole["largest"] + 1000 * MIB
    assert whole["excess"] < limit
    # The limit can be missed: a loader that read everything before it built anything would take this much more.
    assert whole["read"] > limit - whole["largest"] + 500 * MIB
    half = load(sharded_model, dtype, 1 + LAYERS // 2, LAYERS + 2)
    assert half["excess"] < limit
    # A stage reads its own layers and nothing else.
    assert half["read"] * (2 if dtype == "float32" else 1) == half["stage"] + HIDDEN * (4 if dtype == "float32" else 2)
    assert 2 * half["read"] < 1.1 * whole["read"]
