"""Model directories: single tensors, the count of bytes read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadapter.errors import UsageError
from cadapter.models import reading
from cadapter.models.checkpoint import INDEX_NAME, Checkpoint, load_model_config, resolve_model


@pytest.fixture
def copied(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama's directory that the test may damage."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_tensors_names_shapes_and_dtypes_are_those_of_the_files(tiny_model):
    directory = tiny_model("qwen2", torch.bfloat16)
    expected = {name: (path.name, tensor) for path in shards(directory) for name, tensor in load_file(path).items()}
    assert len(shards(directory)) > 2
    checkpoint = Checkpoint(directory)
    assert sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.files() == [path.name for path in shards(directory)]
    for name, (file, tensor) in expected.items():
        assert name in checkpoint
        assert checkpoint.file_of(name) == file
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == "BF16"
        found = checkpoint.tensor(name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, tensor)
    together = checkpoint.tensors(list(expected))
    assert all(torch.equal(together[name], tensor) for name, (_, tensor) in expected.items())
    assert "model.layers.9.mlp.down_proj.weight" not in checkpoint


@pytest.mark.parametrize("piece", [7, 1000, 2**24])
def test_reading_in_threads_gives_the_same_tensors(tiny_model, piece, monkeypatch):
    """As a GPU's are read: piece by piece, where pieces end anywhere."""
    monkeypatch.setattr(reading, "PIECE", piece)
    directory = tiny_model("qwen2", torch.bfloat16)
    expected = {name: tensor for path in shards(directory) for name, tensor in load_file(path).items()}
    names = [name for name, tensor in expected.items() if tensor.numel() < 100 * piece]
    assert names
    checkpoint = Checkpoint(directory)
    found = checkpoint.tensors_at_once(names, torch.device("cpu"))
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert checkpoint.bytes_read == sum(expected[name].nbytes for name in names)


def test_a_shard_that_was_cut_off_is_named_when_read_in_threads(copied):
    checkpoint = Checkpoint(copied)
    file = copied / checkpoint.file_of("model.layers.1.mlp.down_proj.weight")
    file.write_bytes(file.read_bytes()[:-5])
    names = [name for name in checkpoint.names() if checkpoint.file_of(name) == file.name]
    with pytest.raises(UsageError, match=rf"{file.name} ends too early"):
        checkpoint.tensors_at_once(names, torch.device("cpu"))


def test_a_single_file_is_read_like_shards(tiny_model, tmp_path):
    source = tiny_model("llama")
    shutil.copy(source / "config.json", tmp_path)
    tensors = {name: tensor for path in shards(source) for name, tensor in load_file(path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.files() == ["model.safetensors"]
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_only_what_was_read_is_counted(tiny_model, dtype, size):
    checkpoint = Checkpoint(tiny_model("llama", dtype))
    assert checkpoint.bytes_read == 0
    wanted = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    read = checkpoint.tensors(wanted)
    assert list(read) == wanted
    assert checkpoint.bytes_read == size * sum(tensor.numel() for tensor in read.values()) == size * (32 * 48 + 32)
    checkpoint.tensor("model.norm.weight")
    assert checkpoint.bytes_read == size * (32 * 48 + 32 + 32)


def test_files_that_are_not_the_models_are_not_read(copied):
    """The index says which shards belong to the model; an unused file beside them is none."""
    save_file({"stray": torch.zeros(3)}, copied / "other.safetensors")
    assert "stray" not in Checkpoint(copied)


# ---- what is refused ----------------------------------------------------------------------------------------------


def no_config(directory: Path) -> str:
    (directory / "config.json").unlink()
    return "it has no config.json"


def broken_config(directory: Path) -> str:
    (directory / "config.json").write_text('{"model_type": ')
    return "config.json, line 1: broken JSON"


def config_that_is_a_list(directory: Path) -> str:
    (directory / "config.json").write_text("[1]")
    return "config.json cannot be used"


def config_without_a_type(directory: Path) -> str:
    (directory / "config.json").write_text('{"hidden_size": 32}')
    return "config.json cannot be used"


def config_of_an_unknown_type(directory: Path) -> str:
    (directory / "config.json").write_text('{"model_type": "no-such-model"}')
    return "config.json cannot be used"


def config_with_a_wrong_value(directory: Path) -> str:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "hidden_size": "wide"}))
    return "config.json cannot be used"


def config_whose_numbers_do_not_fit(directory: Path) -> str:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "num_attention_heads": 5}))
    return "config.json cannot be used"


def config_with_code_of_its_own(directory: Path) -> str:
    (directory / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Configuration"}}'
    )
    (directory / "configuration.py").write_text("raise SystemExit('the model ran its code')")
    return "config.json cannot be used"


def no_weights(directory: Path) -> str:
    for path in [*shards(directory), directory / INDEX_NAME]:
        path.unlink()
    return "it has no model.safetensors"


def pickled_weights(directory: Path) -> str:
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"anything")
    return "save_pretrained"


def missing_shard(directory: Path) -> str:
    path = shards(directory)[1]
    path.unlink()
    return f"{INDEX_NAME} names {path.name}, which is missing"


def truncated_shard(directory: Path) -> str:
    path = shards(directory)[1]
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path.name} is damaged"


def empty_shard(directory: Path) -> str:
    path = shards(directory)[0]
    path.write_bytes(b"")
    return f"{path.name} is damaged"


def broken_index(directory: Path) -> str:
    (directory / INDEX_NAME).write_text("{")
    return f"{INDEX_NAME}, line 1: broken JSON"


def index_that_is_a_list(directory: Path) -> str:
    (directory / INDEX_NAME).write_text("[]")
    return f"{INDEX_NAME} is damaged"


def index_without_a_map(directory: Path) -> str:
    (directory / INDEX_NAME).write_text('{"metadata": {}}')
    return f"{INDEX_NAME} is damaged"


def index_with_numbers(directory: Path) -> str:
    (directory / INDEX_NAME).write_text('{"weight_map": {"a": 1, "b": "x.safetensors"}}')
    return f"{INDEX_NAME} is damaged"


def index_that_leaves_the_directory(directory: Path) -> str:
    save_file({"model.norm.weight": torch.ones(32)}, directory.parent / "outside.safetensors")
    (directory / INDEX_NAME).write_text('{"weight_map": {"model.norm.weight": "../outside.safetensors"}}')
    return f"{INDEX_NAME}: the file name '../outside.safetensors' leaves the model's directory"


def index_of_nothing(directory: Path) -> str:
    (directory / INDEX_NAME).write_text('{"weight_map": {}}')
    return "hold no tensors"


DAMAGES = [
    no_config, broken_config, config_that_is_a_list, config_without_a_type, config_of_an_unknown_type,
    config_with_a_wrong_value, config_whose_numbers_do_not_fit, config_with_code_of_its_own, no_weights,
    pickled_weights, missing_shard, truncated_shard, empty_shard, broken_index, index_that_is_a_list,
    index_without_a_map, index_with_numbers, index_that_leaves_the_directory, index_of_nothing,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_directory_that_is_no_usable_model(copied, damage):
    message = damage(copied)
    with pytest.raises(UsageError) as error:
        Checkpoint(copied)
    assert message in str(error.value)
    assert str(copied) in str(error.value)
    assert error.value.exit_code == 2


def test_a_tensor_that_is_not_there(tiny_model):
    checkpoint = Checkpoint(tiny_model("llama"))
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype, checkpoint.file_of, checkpoint.info):
        with pytest.raises(UsageError, match=r"has no tensor model\.layers\.7\.mlp\.down_proj\.weight"):
            ask("model.layers.7.mlp.down_proj.weight")
    assert checkpoint.bytes_read == 0


def test_a_shard_that_is_damaged_after_its_header_was_read(copied):
    checkpoint = Checkpoint(copied)
    path = copied / checkpoint.file_of("model.norm.weight")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UsageError, match=f"{path.name} is damaged"):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.parametrize("name", ["no/such/directory", "./none", "~/none", "none", "a//b"])
def test_neither_a_directory_nor_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"is not a directory") as refused:
        resolve_model(name)
    assert f"It was looked up from {tmp_path}: " in str(refused.value) or name.startswith("~")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file, not a model directory"):
        resolve_model(tmp_path / "file")


def test_a_hub_id_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/nothing", "gpt2"):
        with pytest.raises(
            UsageError, match=f"{name} is not a directory, and the hub is not asked, since HF_HUB_OFFLINE"
        ):
            resolve_model(name)


def test_a_name_that_the_hub_does_not_know(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UsageError, match=r"the hub did not give a model of that name \(OSError\)(.|\n)*the connection"):
        resolve_model("gpt2")


def test_a_directory_resolves_to_itself_and_has_a_config(tiny_model):
    directory = tiny_model("qwen3")
    assert resolve_model(str(directory)) == directory
    assert load_model_config(directory).model_type == "qwen3"
