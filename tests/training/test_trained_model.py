"""LoRA and full fine-tuning of a model that has really been trained, on real texts, as a plain loop trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.reference.plain_fine_tuning import PlainFineTuning, Settings, steps_of, with_lora
from tests.tiny_project import Project, metrics, run_well

SHARED = Path(__file__).parents[3] / "shared"
MODEL, TEXTS = SHARED / "models" / "tiny-english-14m", SHARED / "data" / "reviews_pos.jsonl"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and TEXTS.is_file()), reason=f"{MODEL} or {TEXTS} is not there"),
]

STEPS, PER_STEP, RANK, DECAY = 20, 4, 8, 10.0
CURVE = 1e-4
"""Of losses near 4; float32 against float64 over 20 steps that build on each other."""
COMMON: dict[str, Any] = {
    "kinds": ("positive",), "model_dir": str(MODEL), "use_control_adapters": False, "sequence_len": 128,
    "gradient_accumulation_steps": PER_STEP, "max_steps": STEPS, "lora_weight_decay": 0.0,
}  # fmt: skip


@pytest.fixture
def reviews(tmp_path: Path) -> Project:
    """The first 40 reviews."""
    lines = TEXTS.read_text("utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "positive.jsonl").write_text("".join(lines), "utf-8")
    return Project(tmp_path)


def assert_same_curve(project: Project, config: Path, plain: PlainFineTuning) -> None:
    found = metrics(project.root / config.stem)
    for line, step in zip(found, steps_of(project.load(config), STEPS, PER_STEP), strict=True):
        assert line["train/loss"] == pytest.approx(plain.step(*step)["loss"], abs=CURVE), line["step"]
    first, last = (sum(line["train/loss"] for line in part) / 5 for part in (found[:5], found[-5:]))
    assert first - last > 20 * CURVE


def test_lora(reviews: Project) -> None:
    config = reviews.write_config("lora", **{**COMMON, "lora_weight_decay": DECAY}, lora_rank=RANK, lr=5e-3)
    run_well("train", config)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model, pairs = with_lora(base, RANK, reviews.load(config).seed, modules)
    settings = Settings(lr=5e-3, decay=DECAY, scale=RANK**-0.5)
    factors = [factor for pair in pairs.values() for factor in pair]
    assert_same_curve(reviews, config, PlainFineTuning(model, factors, settings, pairs))


def test_full_fine_tuning_of_a_tied_model(reviews: Project) -> None:
    config = reviews.write_config("full", **COMMON, full_fine_tune=True, lr=5e-4)
    run_well("train", config)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_curve(reviews, config, PlainFineTuning(model, list(model.parameters()), Settings(lr=5e-4)))
