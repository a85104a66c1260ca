"""The configs of examples/ are accepted, and the sizes in their comments are right."""

from __future__ import annotations

import ast
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cadapter.config import Config, check_layout, config_warnings, load_config
from cadapter.config.layers import parse_layers
from cadapter.models.families import FAMILIES
from cadapter.training.layout import stage_bounds

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = EXAMPLES / "configs"
FILES = {path.name: path for path in sorted(CONFIGS.glob("*.toml"))}
ALL_FILES = [
    name
    for name in sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.toml"))
    if not name.startswith("quickstart/work/")  # what a run of the quickstart made
]
README = CONFIGS / "README.md"
FRESH = "fresh-110m"

Shape = tuple[str, dict[str, Any]]


def shape(
    kind: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int, int], vocabulary: int, tied: bool
) -> Shape:
    """Of a published model: its ``model_type`` and config; ``heads`` are those of queries, of keys, and their size."""
    return kind, {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, Shape] = {
    "meta-llama/Llama-3.2-1B": shape("llama", 2048, 8192, 16, (32, 8, 64), 128256, True),
    "meta-llama/Llama-3.2-3B": shape("llama", 3072, 8192, 28, (24, 8, 128), 128256, True),
    "meta-llama/Llama-3.1-8B": shape("llama", 4096, 14336, 32, (32, 8, 128), 128256, False),
    "mistralai/Mistral-7B-v0.3": shape("mistral", 4096, 14336, 32, (32, 8, 128), 32768, False),
    "mistralai/Mistral-Small-24B-Base-2501": shape("mistral", 5120, 32768, 40, (32, 8, 128), 131072, False),
    "mistralai/Mixtral-8x7B-v0.1": shape("mixtral", 4096, 14336, 32, (32, 8, 128), 32000, False),
    "Qwen/Qwen2.5-14B": shape("qwen2", 5120, 13824, 48, (40, 8, 128), 152064, False),
    "Qwen/Qwen2.5-32B": shape("qwen2", 5120, 27648, 64, (40, 8, 128), 152064, False),
    "CohereLabs/c4ai-command-r-v01": shape("cohere", 8192, 22528, 40, (64, 64, 128), 256000, True),
    "CohereLabs/c4ai-command-a-03-2025": shape("cohere2", 12288, 36864, 64, (96, 8, 128), 256000, True),
    "google/gemma-2-9b": shape("gemma2", 3584, 14336, 42, (16, 8, 256), 256000, True),
}
"""The dimensions of the examples' models, as published."""


def fresh_shape() -> Shape:
    """The model that the README's lines make: the arguments of the ``LlamaConfig`` there."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "LlamaConfig"]
    assert f'"{FRESH}"' in block
    return "llama", {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def architecture(name: str) -> PretrainedConfig:
    kind, values = fresh_shape() if name == FRESH else PUBLISHED[name]
    return CONFIG_MAPPING[kind](**values)


class Model(NamedTuple):
    """What counts of a model: numbers in all, in a block, in a block's linear layers; all blocks are alike."""

    config: PretrainedConfig
    parameters: int
    vocabulary: int
    blocks: int
    block: int
    linears: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, name: str) -> Model:
        """Count on a skeleton without memory."""
        config = architecture(name)
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(config)
        skeleton.tie_weights()
        block = skeleton.model.layers[0]
        return cls(
            config,
            sum(parameter.numel() for parameter in skeleton.parameters()),
            skeleton.model.embed_tokens.weight.numel(),
            len(skeleton.model.layers),
            sum(parameter.numel() for parameter in block.parameters()),
            {n: (m.in_features, m.out_features) for n, m in block.named_modules() if isinstance(m, nn.Linear)},
        )


GIB = 2**30
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: half a byte, a byte for every 64, a float32 number for every 256 of these."""
REST = 1.5 * GIB
"""CUDA itself, work space of its libraries, a chunk of logits, and what the allocator cannot use."""


class Sizes:
    """What a config comes to, from the model's dimensions."""

    def __init__(self, config: Config, gpus: int) -> None:
        self.config, self.gpus, self.model = config, gpus, Model.of(config.model_dir)
        self.number = 4 if config.dtype == "float32" else 2
        self.replicas = gpus // config.pipeline_stages
        self.layers = parse_layers(config.layers_to_transform, self.model.blocks)

    def block_bytes(self) -> float:
        linear = sum(inputs * outputs for inputs, outputs in self.model.linears.values())
        in_4_bits = linear if self.config.load_in_4bit else 0
        return self.number * (self.model.block - in_4_bits) + NF4_BYTES * in_4_bits

    def layer_bytes(self) -> list[float]:
        """Of each pipeline layer: embedding, blocks, head; a tied head is a copy where the stages are several."""
        ends = self.number * self.model.vocabulary
        copied = not self.model.config.tie_word_embeddings or self.config.pipeline_stages > 1
        return [ends, *[self.block_bytes()] * self.model.blocks, ends * copied]

    def trained_of_block(self) -> int:
        rank = self.config.lora_rank
        if self.config.full_fine_tune:
            return self.model.block
        if self.config.use_control_adapters:
            return 2 * rank * self.model.config.hidden_size
        return sum(rank * (inputs + outputs) for inputs, outputs in self.model.linears.values())

    def trained(self) -> int:
        return self.model.parameters if self.config.full_fine_tune else len(self.layers) * self.trained_of_block()

    def bytes_per_trained(self) -> int:
        """With float32 gradient and Adam's two moments; bfloat16 weights, counted already, have Kahan's term too."""
        if not self.config.full_fine_tune:
            return 4 + 4 + 2 * 4
        return 4 + 2 * self.number + (2 if self.number == 2 else 0)

    def tokens_per_step(self) -> tuple[int, int]:
        sequences = self.config.micro_batch_size * self.config.gradient_accumulation_steps * self.replicas
        return sequences * self.config.sequence_len, sequences

    def activation_bytes(self, blocks: int) -> float:
        """With every block recomputed: a residual stream for each block and micro-batch on its way, and one block."""
        config, model = self.config, self.model.config
        tokens = config.micro_batch_size * config.sequence_len
        in_flight = min(config.pipeline_stages, config.gradient_accumulation_steps)
        experts = getattr(model, "num_experts_per_tok", 1)
        one_block = 9 * model.hidden_size + 3 * experts * model.intermediate_size
        scores = 0
        if model.model_type == "gemma2":  # eager attention: some eight arrays of scores
            scores = 8 * model.num_attention_heads * config.sequence_len
        return self.number * tokens * (blocks * in_flight * model.hidden_size + one_block + scores)

    def memory(self) -> int:
        """GiB on the GPU that holds most, rounded up."""
        sizes, per_block = self.layer_bytes(), self.trained_of_block()
        trained = [0, *(per_block if layer in self.layers else 0 for layer in range(self.model.blocks)), 0]
        if self.config.full_fine_tune:
            trained[0] = self.model.parameters - sum(trained)
        stages = self.config.pipeline_stages
        bounds = stage_bounds(self.config.partition_method, stages, [int(size) for size in sizes], trained)
        heaviest = 0.0
        for first, stop in itertools.pairwise(bounds):
            blocks = min(stop, len(sizes) - 1) - max(first, 1)
            held = sum(sizes[first:stop]) + self.bytes_per_trained() * sum(trained[first:stop])
            heaviest = max(heaviest, held + self.activation_bytes(blocks))
        return math.ceil((heaviest + REST) / GIB)

    def weights(self) -> str:
        saved = self.model.blocks * (self.number * self.model.block - self.block_bytes())
        held = (self.number * self.model.parameters - saved) / GIB
        return f"{held:.1f} GiB " + ("with blocks in 4 bits" if self.config.load_in_4bit else f"in {self.config.dtype}")

    def comments(self) -> list[str]:
        """The lines that the config opens with, after its title."""
        tokens, sequences = self.tokens_per_step()
        stages, replicas = self.config.pipeline_stages, self.replicas
        share = 100 * self.trained() / self.model.parameters
        return [
            f"# parameters: {self.model.parameters:,} ({self.weights()})",
            f"# trained: {self.trained():,} ({share:.3g} %)",
            f"# tokens per step: {tokens:,} ({sequences} sequences of {self.config.sequence_len:,})",
            f"# GPUs: {self.gpus} (pipeline stages × data-parallel replicas: {stages} × {replicas})",
            f"# memory: {self.memory()} GiB on each GPU (estimate)",
        ]


def gpus_of(path: Path) -> int:
    """The number of GPUs that a config says it is for."""
    (number,) = re.findall(r"^# GPUs: (\d+) ", path.read_text("utf-8"), re.MULTILINE)
    return int(number)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_config_is_accepted_without_a_warning(name):
    assert config_warnings(load_config(EXAMPLES / name)) == []


def test_all_examples_are_looked_at():
    assert {"quickstart/config.toml", "reviews/config.toml", "configs/lora.toml"} < set(ALL_FILES)
    assert len(ALL_FILES) == len(FILES) + 2


@pytest.mark.parametrize("name", FILES)
def test_the_sizes_in_the_comments_are_right(name):
    config, gpus = load_config(FILES[name]), gpus_of(FILES[name])
    check_layout(config.pipeline_stages, gpus)
    lines = FILES[name].read_text("utf-8").splitlines()
    comments = Sizes(config, gpus).comments()
    start = lines.index(next(line for line in lines if line.startswith("# parameters: ")))
    assert lines[start : start + len(comments)] == comments


def mode_of(config: Config) -> str:
    if config.full_fine_tune:
        return "full"
    return ("control" if config.use_control_adapters else "lora") + " 4-bit" * config.load_in_4bit


def test_every_mode_and_family_has_a_config():
    configs = [load_config(path) for path in FILES.values()]
    assert {mode_of(config) for config in configs} == {"control", "lora", "control 4-bit", "lora 4-bit", "full"}
    assert [config.model_dir for config in configs].count(FRESH) == 1
    families = {PUBLISHED[c.model_dir][0] for c in configs if mode_of(c) == "control"}
    assert families == {"llama", "mistral", "mixtral", "qwen2", "cohere", "cohere2", "gemma2"}
    assert families <= set(FAMILIES)
    assert {config.model_dir for config in configs} == {*PUBLISHED, FRESH}


def test_the_skeletons_are_what_is_trained_in_memory():
    """The counts above, on a small model that is really there."""
    kind, values = fresh_shape()
    small = CONFIG_MAPPING[kind](**{**values, "num_hidden_layers": 2, "vocab_size": 512})
    model = AutoModelForCausalLM.from_config(small)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == small.tie_word_embeddings
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(small)
    skeleton.tie_weights()
    assert sum(p.numel() for p in skeleton.parameters()) == sum(p.numel() for p in model.parameters())
    assert all(p.device == torch.device("meta") for p in skeleton.parameters())


def test_the_table_of_the_readme_is_right():
    rows = re.findall(r"^\| [^|]+ \| \[([^]]+)\]\(\1\) \|(.+)\|$", README.read_text("utf-8"), re.MULTILINE)
    found = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert found.keys() == FILES.keys()
    for name, cells in found.items():
        sizes = Sizes(load_config(FILES[name]), gpus_of(FILES[name]))
        expected = [f"{sizes.model.parameters / 1e9:.2f} B", f"{sizes.trained() / 1e6:,.1f} M"]
        expected += [f"{sizes.tokens_per_step()[0]:,}", f"{sizes.gpus} × {sizes.memory()} GiB"]
        assert cells[-len(expected) :] == expected, name
