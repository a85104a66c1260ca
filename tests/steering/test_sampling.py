"""Prompts, repetition, and texts at each strength, against generation without any of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cadapter.config import load_config
from cadapter.data import HeldOutDocument
from cadapter.models.generation import Sampling
from cadapter.steering.sampling import PROMPT_TOKENS, prompts_of, reason_not_to_sample, repetition, sample
from tests.steered_models import make_adapter
from tests.tiny_project import HIDDEN, Project, make_project

GREEDY = Sampling(12, temperature=0)


def document(name: str, length: int, class_: int = 1) -> HeldOutDocument:
    ids = np.arange(length, dtype=np.int32) + 10 * (class_ + 1)
    return HeldOutDocument(name, class_, ids, np.ones(length, bool))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7] * 8, 4 / 5),  # one of five 4-grams is new
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3], math.nan),
        ([], math.nan),
    ],
)
def test_repetition(ids: list[int], expected: float) -> None:
    assert repetition(ids) == pytest.approx(expected, nan_ok=True)


def test_prompts_come_from_all_datasets_in_turn() -> None:
    documents = [*(document("a", 60) for _ in range(5)), document("b", 60, -1), document("c", 5, 0)]
    prompts = prompts_of(documents, 4)
    assert [prompt.dataset for prompt in prompts] == ["a", "b", "a", "a"]
    for prompt in prompts:
        assert len(prompt.ids) == PROMPT_TOKENS
        assert prompt.following[0] == prompt.ids[-1] + 1
    assert [len(each.ids) for each in prompts_of([document("a", 9), document("b", 6)], 8)] == [4, 4]
    assert prompts_of([document("a", 1)], 8) == []


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("sampling"), documents=4)


def merged(model: torch.nn.Module, adapter: Path, strength: int) -> torch.nn.Module:
    """The model with (I + W)^strength multiplied into its down projections, in float64 and without any of our code."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = make_scale(adapter)
    for name, A in tensors.items():
        if "control_A" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            B = tensors[name.replace("control_A", "control_B")]
            power = torch.linalg.matrix_power(torch.eye(HIDDEN).double() + scale * B.double() @ A.double(), strength)
            weight = model.model.layers[layer].mlp.down_proj.weight
            weight.data = (power @ weight.data.double()).to(weight.dtype)
    return model


def make_scale(adapter: Path) -> float:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    return settings["lora_alpha"] / settings["r"]


def plain(model: torch.nn.Module, ids: np.ndarray) -> list[int]:
    """The most probable continuation, token by token, without a cache."""
    row = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
    start = row.shape[1]
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            row = torch.cat([row, model(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return row[0, start:].tolist()


def test_texts_at_each_strength_are_those_of_merged_models(project: Project, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", hidden=HIDDEN, site="mlp").path
    config = load_config(project.write_config("run"))
    prompts = prompts_of([document("a", 60), document("b", 60, -1)], 2)
    found = sample(config, adapter, [-1.0, 0.0, 2.0], prompts, GREEDY)
    assert list(found.samples) == [-1.0, 0.0, 2.0]
    texts = set()
    for strength, samples in found.samples.items():
        model = AutoModelForCausalLM.from_pretrained(project.root / "model", dtype=torch.float32)
        model = merged(model, adapter, int(strength))
        for prompt, each in zip(prompts, samples, strict=True):
            ids = plain(model, prompt.ids)
            ended = 2 in ids  # EOS of the tiny tokenizer
            own = ids[: ids.index(2)] if ended else ids
            assert (each.tokens, each.ended) == (len(own), ended)
            assert each.repetition == pytest.approx(repetition(own), nan_ok=True)
            texts.add(each.text)
    assert len(texts) > 2  # the strengths are different models
    assert found.documents_repetition == 0


def test_loras_and_fine_tuned_models_are_sampled_beside_their_base(project: Project, tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = project.root / "model"
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    config = load_config(project.write_config("plain", ("positive",), use_control_adapters=False, lora_weight_decay=0))
    prompts = prompts_of([document("a", 60)], 1)
    of = {name: sample(config, tmp_path / name, [0.0, 1.0], prompts, GREEDY).samples for name in ("lora", "tuned")}
    for name in of:
        assert of[name][0.0] != of[name][1.0]
    assert of["lora"] == of["tuned"]


def test_every_strength_draws_from_the_same_numbers(project: Project, tmp_path: Path) -> None:
    """So that texts differ by the strength alone: where the adapter does nothing, they are those of the base."""
    adapter = make_adapter(tmp_path / "adapter", hidden=HIDDEN, spectral=0.0).path
    config = load_config(project.write_config("same"))
    found = sample(config, adapter, [0.0, 1.0], prompts_of([document("a", 60)], 1), Sampling(12, seed=3))
    assert found.samples[0.0] == found.samples[1.0]


def test_what_cannot_be_sampled_is_said(project: Project) -> None:
    config = load_config(project.write_config("reasons"))
    assert reason_not_to_sample(config, 1) is None
    assert "2 pipeline stages" in str(reason_not_to_sample(config, 2))
    assert "4 bits" in str(reason_not_to_sample(config.model_copy(update={"load_in_4bit": True}), 1))
