"""``cadapter to-gguf`` as a user runs it: what it prints, what it refuses, and what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cadapter.adapters.lora import LoraSettings
from cadapter.cli import app
from tests.adapters import lora_cases
from tests.convert.lora_models import save_lora


def run(*arguments):
    """Run ``cadapter`` in this process; returns click's result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def change_config(lora: Path, **keys) -> Path:
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return lora


@pytest.fixture
def base(model_directory):
    return model_directory("llama")


@pytest.fixture
def lora(base, tmp_path):
    return save_lora(base, tmp_path / "lora", lora_alpha=8, target_modules=["q_proj", "down_proj"])


def test_the_summary_says_what_was_written(lora, tmp_path):
    output = tmp_path / "deep" / "lora.gguf"
    result = run("to-gguf", lora, output)
    assert result.exit_code == 0, result.stderr
    assert "LoRA for architecture llama, alpha 8, 6 modules, 3 of them with rows in another order.\n" in result.stdout
    assert "12 tensors (12 f32), 0.007 MB.\n" in result.stdout
    assert f"Next: llama-cli -m base.gguf --lora {output}" in result.stdout
    assert result.stderr == ""
    assert [path.name for path in output.parent.iterdir()] == ["lora.gguf"]


@pytest.mark.parametrize("folder", ["two words", "it's $HOME; `echo`"])
def test_the_next_command_runs_in_a_shell_wherever_the_file_lies(lora, tmp_path, folder):
    output = tmp_path / folder / "a lora.gguf"
    result = run("to-gguf", lora, output)
    command = result.stdout.splitlines()[-1].removeprefix("Next: ")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "llama-cli").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "llama-cli").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={"PATH": path}, cwd=tmp_path)
    assert done.stdout.splitlines() == ["-m", "base.gguf", "--lora", str(output)], done.stderr
    assert gguf.GGUFReader(done.stdout.splitlines()[-1]).tensors


def test_tensors_of_another_type_are_named(lora, base, tmp_path):
    result = run("to-gguf", lora, tmp_path / "lora.gguf", "--outtype", "q8_0", "--base", base)
    assert result.exit_code == 0, result.stderr
    assert "12 tensors (9 f16, 3 q8_0)" in result.stdout
    assert "blk.*.attn_q.weight.lora_b stays f16 (3 tensors): rows of 4 numbers, no multiple of 32." in result.stderr
    assert "blk.*.ffn_down.weight.lora_a stays f16 (3 tensors): rows of 48 numbers, no multiple of 32." in result.stderr
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors]
    assert (kinds.count("Q8_0"), kinds.count("F16")) == (3, 9)


def test_the_base_must_be_known_and_only_its_config_is_read(lora, base, tmp_path):
    output, config = tmp_path / "lora.gguf", tmp_path / "config-only"
    config.mkdir()
    (config / "config.json").write_bytes((base / "config.json").read_bytes())
    for recorded in ("org/some-model", None):
        change_config(lora, base_model_name_or_path=recorded)
        result = run("to-gguf", lora, output)
        assert result.exit_code == 2
        assert "--base MODEL" in result.stderr
    assert run("to-gguf", lora, output, "--base", config).exit_code == 0


def test_an_existing_output_needs_force(lora, tmp_path):
    output = tmp_path / "lora.gguf"
    output.write_text("precious")
    result = run("to-gguf", lora, output)
    assert (result.exit_code, "already exists" in result.stderr) == (2, True)
    assert output.read_text() == "precious"
    change_config(lora, base_model_name_or_path="nowhere")
    assert run("to-gguf", lora, output, "--force").exit_code == 2
    assert output.read_text() == "precious"  # an error replaces nothing, --force or not
    result = run("to-gguf", lora, lora, "--force")
    assert (result.exit_code, "would remove" in result.stderr) == (2, True)
    assert run("to-gguf", lora, tmp_path, "--force").exit_code == 2


def test_other_kinds_of_adapters_are_sent_on(base, make_adapter, tmp_path):
    adapter = make_adapter(base)
    result = run("to-gguf", adapter, tmp_path / "out.gguf")
    assert result.exit_code == 2
    assert f"cadapter to-add-lora BASE {adapter} LORA" in result.stderr
    assert run("to-mult-lora", adapter, tmp_path / "mult").exit_code == 0
    result = run("to-gguf", tmp_path / "mult", tmp_path / "out.gguf")
    assert result.exit_code == 2
    assert f"cadapter merge BASE {tmp_path / 'mult'} OUTPUT" in result.stderr
    assert not list(tmp_path.glob("*.gguf"))


def test_biases_are_refused_and_merged(model_directory, make_adapter, tmp_path):
    base = model_directory("llama-biased")
    assert run("to-add-lora", base, make_adapter(base), tmp_path / "lora").exit_code == 0
    result = run("to-gguf", tmp_path / "lora", tmp_path / "out.gguf")
    assert result.exit_code == 2
    assert "biases" in result.stderr
    assert f"cadapter merge BASE {tmp_path / 'lora'} OUTPUT" in result.stderr


def refusal(lora: Path, tmp_path: Path, *options) -> str:
    """The message with which ``lora`` is refused; nothing is written."""
    result = run("to-gguf", lora, tmp_path / "out.gguf", *options)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*out.gguf*"))
    return result.stderr


def test_what_llama_cpp_does_not_know_is_refused(lora, base, model_directory, tmp_path):
    config = json.loads((base / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    message = refusal(lora, tmp_path, "--base", other)
    assert "'gpt_neox'" in message
    assert "llama, mistral, mixtral, qwen2" in message
    assert "is no module of the base model" in refusal(lora, tmp_path, "--base", model_directory("phi3"))
    assert "do not fit" in refusal(lora, tmp_path, "--base", model_directory("llama-narrow"))
    assert "nowhere is not a directory" in refusal(lora, tmp_path, "--base", "nowhere")
    tied = model_directory("llama-tied")
    message = refusal(save_lora(tied, tmp_path / "head", target_modules=["lm_head", "q_proj"]), tmp_path)
    assert "llama.cpp cannot adapt in a model of type 'llama': lm_head." in message


def test_a_dense_layer_among_experts_is_refused(tmp_path):
    """llama.cpp has experts in every layer of such a model."""
    model = lora_cases.base_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=4, alpha=2.0, targets=("mlp.up_proj", "mlp.down_proj"))
    blocks, targets = lora_cases.put_lora(model, settings, layers=(0,))
    lora_cases.randomise(blocks)
    lora = lora_cases.write(tmp_path / "lora", blocks, targets)
    message = refusal(lora, tmp_path, "--base", tmp_path / "base")
    assert "'qwen3_moe': model.layers.0.mlp.down_proj, model.layers.0.mlp.up_proj." in message


def test_what_is_no_plain_lora_is_refused(lora, base, tmp_path):
    for key, value in (("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all")):
        message = refusal(change_config(lora, **{key: value}), tmp_path)
        assert "not supported by to-gguf" in message
        change_config(lora, use_dora=False, modules_to_save=None, bias="none")
    embedding = save_lora(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    assert "lora_embedding_A is no lora_A or lora_B weight of a linear layer" in refusal(embedding, tmp_path)
    file = embedding / "adapter_model.safetensors"
    as_linear = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}
    places = {name: name.rpartition(".") for name in load_file(file)}
    renamed = {name: f"{module}.{as_linear[part]}" for name, (module, _, part) in places.items()}
    save_file({renamed[name]: tensor.mT.contiguous() for name, tensor in load_file(file).items()}, file)
    assert "llama.cpp cannot adapt in a model of type 'llama': model.embed_tokens" in refusal(embedding, tmp_path)
    file = lora / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    assert "changes nothing" in refusal(lora, tmp_path)


def test_experts_in_another_order_are_refused(model_directory, tmp_path):
    base = model_directory("mixtral")
    lora = save_lora(base, tmp_path / "lora", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert run("to-gguf", lora, tmp_path / "right.gguf").exit_code == 0
    change_config(lora, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    assert "target_parameters" in refusal(lora, tmp_path)
