"""llama.cpp runs a base model in GGUF with a LoRA that to-gguf wrote: it must be the merged model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from cadapter.cli import app
from cadapter.convert.gguf_layout import ARCHITECTURES
from tests.convert.gguf_models import PLAIN, run_llama_cpp, write_base
from tests.convert.lora_models import linear_layers, merged_model, save_lora, to_gguf
from tests.tiny_models import FAMILY_NAMES, save_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e '.[llama]'")

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")

ROUNDING = 2e-5
"""Of the largest logit. Weights, LoRA, activations, keys and values are float32 in both programs, which add up in
different orders: 3e-6 is found in three blocks."""

GELU = 5e-3
"""The same where the MLP's activation is GELU, which llama.cpp looks up in a table of float16: 1e-3 is found."""


def tolerance(name: str) -> float:
    return GELU if name.startswith("gemma") else ROUNDING


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(expected ‖ found) over positions, in nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def hugging_face(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    """A function that saves the tiny model ``name`` as llama.cpp can have it, and its GGUF file; both once."""
    root, saved = tmp_path_factory.mktemp("plain"), {}

    def make(name):
        if name not in saved:
            base = save_model(name, root / name, **PLAIN.get(name, {}))
            saved[name] = base, write_base(base, root / f"{name}.gguf")
        return saved[name]

    return make


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_lora_on_every_linear_layer_is_the_merged_model(name, plain_model, tokens, logits, tmp_path):
    base, file = plain_model(name)
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]}
    lora = save_lora(
        base, tmp_path / "lora", 0.2, target_modules=linear_layers(base),
        **(experts if name in EXPERTS else {}),
    )  # fmt: skip
    to_gguf(lora, tmp_path / "lora.gguf")
    without, found = run_llama_cpp(file, tokens), run_llama_cpp(file, tokens, tmp_path / "lora.gguf")
    expected = hugging_face(merged_model(base, lora), tokens)
    assert error(without, logits(base, tokens)) < tolerance(name)
    assert error(found, expected) < tolerance(name)
    assert error(without, expected) > 0.2
    assert divergence(expected, without) > 1e3 * divergence(expected, found)


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3"])
def test_rows_of_q_and_k_in_the_models_own_order_would_be_wrong(name, plain_model, tokens, tmp_path, monkeypatch):
    base, file = plain_model(name)
    lora = save_lora(base, tmp_path / "lora", target_modules=["q_proj", "k_proj"])
    expected = hugging_face(merged_model(base, lora), tokens)
    to_gguf(lora, tmp_path / "right.gguf")
    assert error(run_llama_cpp(file, tokens, tmp_path / "right.gguf"), expected) < ROUNDING
    monkeypatch.setitem(ARCHITECTURES, name, replace(ARCHITECTURES[name], permuted=False))
    to_gguf(lora, tmp_path / "wrong.gguf")
    assert error(run_llama_cpp(file, tokens, tmp_path / "wrong.gguf"), expected) > 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen2_moe"])
def test_from_a_control_adapter_to_llama_cpp(name, plain_model, make_adapter, native_logits, tokens, logits, tmp_path):
    """native = merged in Hugging Face's model = LoRA in llama.cpp = merged in llama.cpp."""
    base, file = plain_model(name)
    adapter = make_adapter(base, site="writes")

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output

    run("to-add-lora", base, adapter, tmp_path / "lora")
    run("to-gguf", tmp_path / "lora", tmp_path / "lora.gguf")
    run("merge", base, adapter, tmp_path / "merged")
    [native] = native_logits(base, adapter, tokens, [1.0])
    with_lora = run_llama_cpp(file, tokens, tmp_path / "lora.gguf")
    merged = run_llama_cpp(write_base(tmp_path / "merged", tmp_path / "merged.gguf"), tokens)
    for found in (logits(tmp_path / "merged", tokens), with_lora, merged):
        assert error(found, native) < ROUNDING
        assert divergence(native, found) < 1e-9  # of second order in a rounding of 1e-5
    without = run_llama_cpp(file, tokens)
    assert divergence(native, without) > 1e-2


@pytest.mark.parametrize(
    ("outtype", "least", "most"), [("f16", 3e-5, 5e-4), ("bf16", 1e-4, 3e-3), ("q8_0", 1e-4, 5e-3)]
)
def test_smaller_types_of_numbers(outtype, least, most, plain_model, tokens, tmp_path):
    """Factors of 11, 8 and 8 bits, and activations rounded alike before they meet them: an error, but a small one."""
    base, file = plain_model("llama")
    lora = save_lora(base, tmp_path / "lora", 0.05, r=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    expected = hugging_face(merged_model(base, lora), tokens)
    summary = to_gguf(lora, tmp_path / "lora.gguf", outtype)
    assert summary.tensors == {outtype: 24}
    found = run_llama_cpp(file, tokens, tmp_path / "lora.gguf")
    assert least < error(found, expected) < most
    assert error(run_llama_cpp(file, tokens), expected) > 10 * most
