"""A model taken apart: every part equals Hugging Face's own, and only what is needed is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cadapter.errors import UsageError
from cadapter.models.checkpoint import INDEX_NAME, Checkpoint
from cadapter.models.loading import CausalLM
from tests.tiny_models import CONFIGS, HIDDEN, LAYERS, SHAPE, SPECIAL, VOCAB, make_model, save_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

EXPERT_MODELS = {
    name: "block_sparse_moe.experts.{}.w2.weight" if name == "mixtral" else "mlp.experts.{}.down_proj.weight"
    for name, config in CONFIGS.items()
    if config.model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
}
"""By name: what an expert's last matrix is called on disk."""


@pytest.fixture
def copied(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies a model's directory, for the test to change."""
    return lambda name: shutil.copytree(tiny_model(name), tmp_path / name)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a model and save them in a single file."""
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*directory.glob("*.safetensors"), directory / INDEX_NAME]:
        path.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_equals_hugging_faces(tiny_model, name, dtype):
    directory = tiny_model(name)  # saved in float32: bfloat16 is rounded on the way
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    ours = CausalLM(directory, dtype)
    assert ours.tied == CONFIGS[name].tie_word_embeddings
    assert (ours.layer_count, ours.hidden_size) == (LAYERS, HIDDEN)
    pairs = [(ours.embedding(), theirs.model.embed_tokens), (ours.final_norm(), theirs.model.norm)]
    pairs += [(ours.block(index), theirs.model.layers[index]) for index in range(LAYERS)]
    for found, expected in pairs:
        assert type(found) is type(expected)
        state = expected.state_dict()
        assert found.state_dict().keys() == state.keys()
        for key, value in found.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, state[key])
        assert not any(parameter.requires_grad for parameter in found.parameters())
    assert torch.equal(ours.head_weight(), theirs.lm_head.weight)
    # Frequencies are computed, never rounded to the model's dtype.
    buffers = {key: value for key, value in theirs.model.named_buffers() if "inv_freq" in key}
    assert buffers
    for key, value in buffers.items():
        found = ours.skeleton.model.get_buffer(key)
        assert found.dtype == torch.float32
        assert torch.equal(found, value)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_by_pipeline_layer_are_what_is_read(tiny_model, name):
    directory = tiny_model(name)
    model = CausalLM(directory, torch.float32)
    expected = model.layer_bytes()
    parts: list[Callable[[], object]] = [model.embedding, *(lambda i=i: model.block(i) for i in range(LAYERS))]
    parts.append(model.head_weight)
    assert model.checkpoint.bytes_read == 0
    for size, part in zip(expected, parts, strict=True):
        before = model.checkpoint.bytes_read
        part()
        assert model.checkpoint.bytes_read - before == size
    assert expected[0] == expected[-1] == 4 * VOCAB * HIDDEN
    # In bfloat16 half as much is held.
    assert CausalLM(directory, torch.bfloat16).layer_bytes() == [size // 2 for size in expected]


# ---- experts ------------------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, object]] = {
    "each expert, several files": {"max_shard_size": "24KB"},
    "each expert, one file": {},
    "all in one, several files": {"save_original_format": False, "max_shard_size": "24KB"},
    "all in one, one file": {"save_original_format": False},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_experts_in_every_form(tmp_path, name, form):
    expected = make_model(name)
    expected.save_pretrained(tmp_path, **FORMATS[form])
    assert (tmp_path / INDEX_NAME).exists() == ("several" in form)
    ours = CausalLM(tmp_path, torch.float32)
    assert (f"model.layers.0.{EXPERT_MODELS[name].format(3)}" in ours.checkpoint) == ("each expert" in form)
    for index in range(LAYERS):
        state = expected.model.layers[index].state_dict()
        found = ours.block(index).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_tenth_expert_comes_after_the_ninth(tmp_path, name):
    changes = {"num_local_experts": 12, "num_experts": 12}
    directory = save_model(name, tmp_path, **changes)
    ours, expected = CausalLM(directory, torch.float32), make_model(name, **changes).model.layers[1].mlp.experts
    found = ours.block(1).get_submodule("mlp.experts")
    assert found.down_proj.shape[0] == 12
    assert torch.equal(found.down_proj, expected.down_proj)
    assert torch.equal(found.gate_up_proj, expected.gate_up_proj)


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_a_missing_expert_is_named_before_any_weight_is_read(copied, name, number):
    directory, missing = copied(name), f"model.layers.2.{EXPERT_MODELS[name].format(number)}"
    rewrite(directory, lambda tensors: tensors.pop(missing))
    with pytest.raises(UsageError) as error:
        CausalLM(directory, torch.float32)
    assert str(directory) in str(error.value)
    assert [line for line in str(error.value).splitlines() if ".layers." in line] == [f"Missing: {missing}"]


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_more_experts_than_the_config_says_are_refused(copied, name):
    directory, further = copied(name), f"model.layers.2.{EXPERT_MODELS[name].format(4)}"
    rewrite(directory, lambda tensors: tensors.update({further: tensors[further.replace(".4.", ".3.")].clone()}))
    with pytest.raises(UsageError, match=f"Unknown: {further}"):
        CausalLM(directory, torch.float32)


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_a_layer_without_experts_is_refused(copied, name):
    directory, pattern = copied(name), f"model.layers.2.{EXPERT_MODELS[name]}"
    rewrite(directory, lambda tensors: [tensors.pop(pattern.format(number)) for number in range(4)])
    with pytest.raises(UsageError, match=r"Missing: model\.layers\.2\.mlp\.experts\.down_proj"):
        CausalLM(directory, torch.float32).block(2)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-dense", "qwen3_moe"])
def test_experts_of_one_kind_that_are_missing_are_refused(copied, name):
    """Of "gate" and "up", which become one tensor, only one is there."""
    directory = copied(name)
    kind = ".w3." if name == "mixtral" else ".up_proj."
    chosen = re.compile(rf"model\.layers\.2\..*experts\.\d+{re.escape(kind)}weight")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if chosen.fullmatch(name)]:
            del tensors[name]

    rewrite(directory, drop)
    with pytest.raises(UsageError, match=r"model\.layers\.2\.mlp\.experts(.|\n)*do not fit the config"):
        CausalLM(directory, torch.float32).block(2)


def test_experts_of_another_shape_are_refused(copied):
    directory, name = copied("qwen3_moe"), "model.layers.2.mlp.experts.1.down_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(HIDDEN, 23)}))
    with pytest.raises(UsageError, match=r"mlp\.experts\.down_proj(.|\n)*do not fit the config"):
        CausalLM(directory, torch.float32).block(2)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_further_blocks_are_passed_over(copied, name):
    """Some files hold more blocks than the config says, for predicting several tokens at once."""
    directory = copied(name)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        last = f"model.layers.{LAYERS - 1}."
        more = {name.replace(last, f"model.layers.{LAYERS}."): each for name, each in tensors.items() if last in name}
        assert len(more) > 5
        tensors.update({name: each.clone() for name, each in more.items()})
        tensors[f"model.layers.{LAYERS}.enorm.weight"] = torch.ones(HIDDEN)

    rewrite(directory, add)
    ours, expected = CausalLM(directory, torch.float32), make_model(name).model.layers[-1].state_dict()
    assert ours.layer_count == LAYERS
    for key, value in ours.block(LAYERS - 1).state_dict().items():
        assert torch.equal(value, expected[key])
    assert ours.checkpoint.bytes_read == ours.layer_bytes()[LAYERS]


def test_what_a_model_insists_on_in_float32_stays_float32(tmp_path):
    settings = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    config = AutoConfig.for_model("glm4_moe", **{**SHAPE, **SPECIAL, **settings})
    model = AutoModelForCausalLM.from_config(config)
    kept = "model.layers.1.mlp.gate.e_score_correction_bias"
    torch.manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = CausalLM(tmp_path, torch.bfloat16)
    found = {
        f"model.layers.{index}.{key}": v for index in range(LAYERS) for key, v in ours.block(index).state_dict().items()
    }
    assert found[kept].dtype == torch.float32
    assert found[kept].norm() > 0
    assert not torch.equal(found[kept], found[kept].bfloat16().float())
    for key, value in found.items():
        expected = theirs.state_dict()[key]
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key


# ---- heads --------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embeddings_own_tensor(tiny_model):
    directory = tiny_model("llama-tied")
    assert HEAD not in Checkpoint(directory)
    model = CausalLM(directory, torch.float32)
    embedding = model.embedding()
    before = model.checkpoint.bytes_read
    assert model.head_weight(embedding) is embedding.weight
    assert model.checkpoint.bytes_read == before
    # On a stage of its own the head reads the embedding.
    assert torch.equal(model.head_weight(None), embedding.weight)


def test_an_untied_head_is_not_the_embedding(tiny_model):
    model = CausalLM(tiny_model("llama"), torch.float32)
    assert not torch.equal(model.head_weight(model.embedding()), model.embedding().weight)


def test_a_head_on_disk_counts_where_the_config_says_tied(copied):
    """As in transformers, which ties only where the files hold no other head."""
    directory = copied("llama")
    set_config(directory, tie_word_embeddings=True)
    model = CausalLM(directory, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(model.head_weight(model.embedding()), theirs.lm_head.weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)


def test_an_untied_model_without_a_head_is_refused(copied):
    directory = copied("llama-tied")
    set_config(directory, tie_word_embeddings=False)
    with pytest.raises(UsageError, match=r"Missing: lm_head\.weight"):
        CausalLM(directory, torch.float32).head_weight()


def test_computed_buffers_of_old_checkpoints_are_passed_over(copied):
    directory = copied("llama")
    rewrite(directory, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    CausalLM(directory, torch.float32).block(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
            "Missing: model.layers.1.mlp.down_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.down_proj.weight_scale": torch.ones(1)}),
            "Unknown: model.layers.1.mlp.down_proj.weight_scale",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
            "Unknown: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.ones(32, 47)}),
            "size mismatch for mlp.down_proj.weight",
        ),
    ],
    ids=["missing", "quantised", "bias", "shape"],
)
def test_weights_that_do_not_fit_the_config(copied, change, message):
    directory = copied("llama")
    rewrite(directory, change)
    with pytest.raises(UsageError) as error:
        CausalLM(directory, torch.float32).block(1)
    assert message in str(error.value)
    assert str(directory) in str(error.value)


def test_more_layers_in_the_config_than_on_disk(copied):
    directory = copied("llama")
    set_config(directory, num_hidden_layers=LAYERS + 1)
    with pytest.raises(UsageError, match=rf"Missing: model\.layers\.{LAYERS}\.self_attn\.q_proj\.weight"):
        CausalLM(directory, torch.float32).block(LAYERS)


def test_models_of_another_build_are_refused_with_the_reason(copied):
    directory = copied("llama")
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"a model of type 'gpt2' cannot be cut into pipeline layers: it has no model"):
        CausalLM(directory, torch.float32)


def test_a_config_that_no_model_can_be_built_from(copied):
    directory = copied("llama")
    set_config(directory, hidden_act="no-such-function")
    with pytest.raises(UsageError, match=r"config\.json: no causal LM can be built(.|\n)*no-such-function"):
        CausalLM(directory, torch.float32)


def test_an_attention_that_is_not_there(tiny_model):
    with pytest.raises(UsageError, match="no_such_attention"):
        CausalLM(tiny_model("llama"), torch.float32, attention="no_such_attention")
