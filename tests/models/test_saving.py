"""Model directories written part by part, against ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    Glm4Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from cadapter.errors import CadapterError
from cadapter.models.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from cadapter.models.saving import ModelWriter
from tests.tiny_tokenizer import make_tokenizer

LAYERS, VOCAB = 3, 64
SHARD = 12_000
"""Bytes: several tensors of the tiny models fit into a shard, no model does."""

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
# More than ten experts: their order by number is not that by name.
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=12),
    "mixtral-tied": MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, mlp_only_layers=[1]),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=24),
    "gemma3_text": Gemma3TextConfig(**SHAPE, sliding_window=8, tie_word_embeddings=True),
    "glm4": Glm4Config(**SHAPE),
}
# A family that keeps one tensor of each layer in float32 whatever the model's dtype.
PARTLY_FLOAT32 = Glm4MoeConfig(
    **SHAPE, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1
)
every_model = pytest.mark.parametrize("name", CONFIGS)


def make_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in memory, with biases and norms that are not their defaults."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def make_skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The same model without memory."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def parts_of(model: Any) -> list[dict[str, Tensor]]:
    """The state dict as the pipeline has it: embedding, each block, final norm with head."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(LAYERS + 2)]
    for name, tensor in model.state_dict().items():
        index = 0 if "embed_tokens" in name else LAYERS + 1
        parts[1 + int(name.split(".")[2]) if ".layers." in name else index][name] = tensor
    return parts


def headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and file of every tensor on disk, by name."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                part = shard.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()), file.name)
    return found


def load(directory: Path) -> Any:
    """The model as a user loads it; nothing is missing and nothing is left over."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits of one sequence that is longer than the sliding window."""
    return model(torch.arange(2, 26).unsqueeze(0) % VOCAB, use_cache=False).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Any:
    """A function that saves the random model of a config with a tokenizer, once, and returns its directory."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            make_model(CONFIGS[name]).save_pretrained(directory)
            make_tokenizer(directory)
        return directory

    return make


@pytest.fixture
def writer(base, tmp_path) -> Any:
    """A function that makes the writer of a model, into the directory ``new``."""

    def make(
        name: str = "llama", dtype: str = "float32", shard_bytes: int = SHARD, source: Path | None = None
    ) -> ModelWriter:
        config, target = CONFIGS[name], tmp_path / "new"
        target.mkdir()
        tied = config.tie_word_embeddings
        return ModelWriter(source or base(name), make_skeleton(config), target, dtype, tied, shard_bytes)

    return make


@every_model
@pytest.mark.parametrize("shard_bytes", [SHARD, 5 * 10**9], ids=["shards", "single"])
def test_a_model_in_parts_is_the_one_that_save_pretrained_writes(base, writer, tmp_path, name, shard_bytes):
    model = make_model(CONFIGS[name])
    written = writer(name, shard_bytes=shard_bytes)
    for part in parts_of(model):
        written.add(part)
    written.finish()
    expected, found = headers(base(name)), headers(tmp_path / "new")
    assert {key: value[:2] for key, value in found.items()} == {key: value[:2] for key, value in expected.items()}
    assert ("lm_head.weight" in found) != CONFIGS[name].tie_word_embeddings
    assert written.tensors == len(expected)
    assert torch.equal(logits_of(load(tmp_path / "new")), logits_of(model))
    for key in found:
        assert torch.equal(Checkpoint(tmp_path / "new").tensor(key), Checkpoint(base(name)).tensor(key))


def test_shards_and_their_index(writer, tmp_path):
    written = writer("mixtral")
    for part in parts_of(make_model(CONFIGS["mixtral"])):
        written.add(part)
    written.finish()
    found = headers(tmp_path / "new")
    index = json.loads((tmp_path / "new" / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: file for name, (_, _, file) in found.items()}
    sizes: dict[str, int] = {}
    for _, shape, file in found.values():
        sizes[file] = sizes.get(file, 0) + 4 * torch.Size(shape).numel()
    count = len(sizes)
    assert count > LAYERS
    assert sorted(sizes) == [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    assert max(sizes.values()) <= SHARD
    assert sum(sizes.values()) == index["metadata"]["total_size"] == written.bytes


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(writer, tmp_path):
    written = writer(shard_bytes=100)
    for part in parts_of(make_model(CONFIGS["llama"])):
        written.add(part)
    written.finish()
    found = headers(tmp_path / "new")
    assert len({file for _, _, file in found.values()}) == len(found)
    assert load(tmp_path / "new").config.model_type == "llama"


def test_what_fits_into_one_shard_has_no_index(writer, tmp_path):
    written = writer(shard_bytes=10**9)
    for part in parts_of(make_model(CONFIGS["llama"])):
        written.add(part)
    written.finish()
    assert [file.name for file in (tmp_path / "new").glob("*.safetensors*")] == [SINGLE_NAME]


def test_parts_may_come_in_any_order_from_any_skeleton_and_none_is_kept(base, writer, tmp_path):
    """The skeleton may hold real weights, other ones too: its values are not looked at."""
    model = make_model(CONFIGS["qwen2_moe"])
    forward = writer("qwen2_moe")
    (tmp_path / "other").mkdir()
    stranger = AutoModelForCausalLM.from_config(CONFIGS["qwen2_moe"])
    backward = ModelWriter(base("qwen2_moe"), stranger, tmp_path / "other", "float32", False, SHARD)
    for part in parts_of(model):
        forward.add(part)
    for part in reversed(parts_of(model)):
        copies = {name: tensor.clone() for name, tensor in part.items()}
        alive = [weakref.ref(tensor) for tensor in copies.values()]
        backward.add(copies)
        del copies
        assert not any(reference() is not None for reference in alive)
    forward.finish()
    backward.finish()
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "other").iterdir())
    for file in files:
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_head_of_its_own_is_written_although_the_config_says_tied(base, tmp_path):
    config, name = CONFIGS["llama-tied"], "lm_head.weight"
    model = make_model(CONFIGS["llama"])
    written = ModelWriter(base("llama-tied"), make_skeleton(config), tmp_path, "float32", tied=False)
    for part in parts_of(model):
        written.add(part)
    written.finish()
    assert name in headers(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_floating_point_tensors_take_the_dtype_that_the_config_then_names(base, writer, tmp_path, key):
    source = shutil.copytree(base("mixtral"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "dtype"} | {key: "float32"}
    (source / "config.json").write_text(json.dumps(config))
    written = writer("mixtral", "bfloat16", source=source)
    for part in parts_of(make_model(CONFIGS["mixtral"])):
        written.add(part)
    written.finish()
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {**config, key: "bfloat16"}
    assert {dtype for dtype, _, _ in headers(tmp_path / "new").values()} == {"BF16"}
    found, expected = load(tmp_path / "new"), AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits_of(found), logits_of(expected.eval()))


def test_what_a_family_insists_on_having_in_float32_stays_so(tmp_path):
    (tmp_path / "base").mkdir()
    make_model(PARTLY_FLOAT32, torch.bfloat16).save_pretrained(tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "new").mkdir()
    skeleton = make_skeleton(PARTLY_FLOAT32, torch.bfloat16)
    written = ModelWriter(tmp_path / "base", skeleton, tmp_path / "new", "bfloat16", tied=False)
    for part in parts_of(model):
        written.add(part)
    written.finish()
    expected = headers(tmp_path / "base")
    assert {dtype for dtype, _, _ in expected.values()} == {"BF16", "F32"}
    assert headers(tmp_path / "new") == expected
    assert torch.equal(logits_of(load(tmp_path / "new")), logits_of(model))


def test_tensors_of_any_dtype_and_layout_in_memory(base, tmp_path):
    """Every second number of a tensor is no run of bytes; three bytes of a bool tensor put the others at odd places."""
    config = CONFIGS["llama"]
    skeleton, model = make_skeleton(config), make_model(config)
    for each in (skeleton, model):
        each.register_buffer("flags", torch.tensor([True, False, True]))
        each.register_buffer("count", torch.tensor(7))
    parts = [{name: torch.stack([t, t], dim=-1)[..., 0] for name, t in part.items()} for part in parts_of(model)]
    assert not parts[0]["model.embed_tokens.weight"].is_contiguous()
    written = ModelWriter(base("llama"), skeleton, tmp_path, "float32", tied=False)
    for part in parts:
        written.add(part)
    written.finish()
    for name, tensor in load_file(tmp_path / SINGLE_NAME).items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.dtype == model.state_dict()[name].dtype


def test_companions_go_along(base, writer, tmp_path):
    source = shutil.copytree(base("llama"), tmp_path / "source")
    GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(source)
    unwanted = {"modeling_custom.py", "training_args.bin", "README.md"}
    for name in unwanted:
        (source / name).write_text("x")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    written = writer(source=source)
    for part in parts_of(make_model(CONFIGS["llama"])):
        written.add(part)
    written.finish()
    found = {file.name for file in (tmp_path / "new").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"} < found
    assert not found & unwanted
    assert GenerationConfig.from_pretrained(tmp_path / "new").temperature == 0.7
    text = "The quick brown fox"
    old, new = (AutoTokenizer.from_pretrained(directory)(text)["input_ids"] for directory in (source, tmp_path / "new"))
    assert old == new


def test_a_model_without_all_of_its_tensors_is_refused(writer, tmp_path):
    written = writer("mixtral")
    with pytest.raises(CadapterError, match=r"(\d+) of \1 tensors were not written"):
        written.finish()
    for index, part in enumerate(parts_of(make_model(CONFIGS["mixtral"]))):
        if index == 2:
            del part["model.layers.1.mlp.experts.down_proj"]
        written.add(part)
    with pytest.raises(CadapterError) as error:
        written.finish()
    count = len(headers(tmp_path / "new"))
    assert f"12 of {count} tensors were not written" in str(error.value)
    assert "model.layers.1.block_sparse_moe.experts.0.w2.weight" in str(error.value)
    assert not (tmp_path / "new" / INDEX_NAME).exists()
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused(writer, value):
    """1e39 is finite in float64, in which it is given, and not in float32, in which it would be written."""
    part = {name: tensor.double() for name, tensor in parts_of(make_model(CONFIGS["llama"]))[2].items()}
    part["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    with pytest.raises(CadapterError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
        writer().add(part)


def test_wrong_parts_are_refused(writer):
    parts = parts_of(make_model(CONFIGS["llama"]))
    written = writer()
    name = "model.embed_tokens.weight"
    with pytest.raises(CadapterError, match="without any tensor"):
        written.add({})
    with pytest.raises(CadapterError, match=r"model\.layers\.7\.mlp\.weight .* without such a tensor"):
        written.add({"model.layers.7.mlp.weight": torch.zeros(2)})
    with pytest.raises(CadapterError, match=r"embed_tokens\.weight .*\(3, 32\).* model's is \(64, 32\)"):
        written.add({name: torch.zeros(3, 32)})
    with pytest.raises(CadapterError, match=r"embed_tokens\.weight .* torch\.int64"):
        written.add({name: torch.zeros(VOCAB, 32, dtype=torch.int64)})
    written.add(parts[0])
    with pytest.raises(CadapterError, match=r"embed_tokens\.weight was to be written twice"):
        written.add(parts[0])
