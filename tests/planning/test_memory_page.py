"""The table of docs/memory.md: what its cells say is what a plan says, and it fits the card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cadapter.config import load_config
from cadapter.planning.machines import machine
from cadapter.training.forecast import forecast
from cadapter.training.forecast_report import as_json

PAGE = Path(__file__).parent.parent.parent / "docs" / "memory.md"
GIB = 2**30

SHAPES = {
    "3B": ("llama", 3072, 8192, 28, 24, 128256, True),
    "8B": ("llama", 4096, 14336, 32, 32, 128256, False),
    "14B": ("qwen2", 5120, 13824, 48, 40, 152064, False),
    "24B": ("mistral", 5120, 32768, 40, 32, 131072, False),
    "32B": ("qwen2", 5120, 27648, 64, 40, 152064, False),
    "70B": ("llama", 8192, 28672, 80, 64, 128256, False),
}
"""Family, hidden and intermediate size, layers, heads (8 of keys), vocabulary, tied head: from config.json."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}

CONFIG = """
model_dir = "{model}"
output_dir = "{model}/run"
use_control_adapters = true
control_site = "writes"
lora_weight_decay = 500.0
lr = 2e-5
sequence_len = 4096
gradient_accumulation_steps = 16
load_in_4bit = {four_bits}
[[datasets]]
dataset_path = "texts.jsonl"
"""


def cells() -> dict[str, list[tuple[int, bool, str, float]]]:
    """For each size of model: the card's GB, whether in 4 bits, what blocks keep, GiB."""
    table = PAGE.read_text("utf-8").split("| card |")[1].split("\n\n")[0].splitlines()
    sizes = [name.strip() for name in table[0].split("|")[:-1]]
    found: dict[str, list[tuple[int, bool, str, float]]] = {size: [] for size in sizes}
    for line in table[2:]:
        card, *row = [cell.strip() for cell in line.split("|")[1:-1]]
        for size, cell in zip(sizes, row, strict=True):
            for bits, keep, gib in re.findall(r"(bf16|4 bits), (\w+): ([\d.]+)", cell):
                found[size].append((int(card.split()[0]), bits == "4 bits", keep, float(gib)))
    return found


def write_model(directory: Path, size: str) -> Path:
    """A directory with the model's config.json and nothing else."""
    family, hidden, intermediate, layers, heads, vocabulary, tied = SHAPES[size]
    keys = {
        "architectures": [CLASSES[family]], "model_type": family, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 131072,
        "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


@pytest.mark.parametrize("size", SHAPES)
def test_a_column_says_what_a_plan_says(size: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / size, size)
    assert cells().keys() == SHAPES.keys()
    column = cells()[size]
    assert column
    for four_bits in {bits for _, bits, _, _ in column}:
        file = tmp_path / "config.toml"
        file.write_text(CONFIG.format(model=model, four_bits=str(four_bits).lower()))
        plans = {}
        for card in {card for card, bits, _, _ in column if bits == four_bits}:
            plans[card] = as_json(forecast(load_config(file), machine(1, 1, (), None, float(card)), 1000))
        for card, bits, keep, gib in column:
            if bits == four_bits:
                peak = plans[card]["peak_by_kept"][keep]
                assert round(peak / GIB, 1) == gib, (card, keep)
                assert peak <= plans[card]["usable"], (card, keep)
                assert plans[card]["kept"] == keep, "what auto chooses"
