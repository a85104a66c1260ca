"""A model taken apart: every part equals Hugging Face's own, and only what is needed is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadapter.errors import UsageError
from cadapter.models.checkpoint import INDEX_NAME, Checkpoint
from cadapter.models.loading import CausalLM
from tests.tiny_models import CONFIGS, HIDDEN, LAYERS, VOCAB

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
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
