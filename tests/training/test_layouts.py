"""The same global batches give the same losses and the same adapter in every layout, and as a plain loop gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cadapter.adapters.control import initial_directions, initial_factor
from cadapter.data import prepare_data
from cadapter.data.batches import BatchPlan
from tests.reference.plain_trainer import PlainTrainer, Settings, Step, SymmetricTrainer
from tests.tiny_project import HIDDEN, LAYERS, Project, metrics, run_well

ALL = ("positive", "negative", "neutral")
LOSS = 1e-5
"""Losses are sums of some 500 float32 terms around 6, added in different orders and on different processes."""
ADAPTER = 1e-4
"""Relative, per tensor: Adam divides by √v, which turns rounding of tiny gradients into rounding of whole steps."""
STEPS, RANK = 10, 4

COMMON: dict[str, Any] = {
    "kinds": ALL, "control_class0_lambda": 0.5, "max_steps": STEPS, "eval_fraction": 0.1, "evals_per_run": 2
}  # fmt: skip


def train_run(project: Project, name: str, processes: int, **keys: Any) -> Path:
    """Train on ``processes`` processes and return the run's directory."""
    config = project.write_config(name, **{**COMMON, **keys})
    run_well("train", config, "--num-gpus", processes)
    return project.root / name


def factors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "adapter_model.safetensors")


def names_in(lines: list[dict[str, Any]]) -> set[str]:
    return {name for line in lines for name in line}


def compared(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if "loss" in name or name in ("train/grad_norm", "tokens")}


def assert_same_run(one: Path, other: Path) -> None:
    """Same losses of every step and evaluation, same adapter."""
    for kind in ("train", "eval"):
        first, second = metrics(one, kind), metrics(other, kind)
        assert [line["step"] for line in first] == [line["step"] for line in second]
        assert {f"{kind}/loss", f"{kind}/loss_pos", f"{kind}/loss_neg", f"{kind}/loss_neutral"} <= names_in(first)
        for a, b in zip(first, second, strict=True):
            assert compared(a) == pytest.approx(compared(b), rel=LOSS, abs=LOSS), a["step"]
    assert_same_factors(factors(one), factors(other))


def assert_same_factors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(
        name.endswith(("control_B.weight", "control_S.weight")) and tensor.norm() > 0 for name, tensor in one.items()
    )
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= ADAPTER * tensor.norm(), name


@pytest.fixture(scope="session")
def one_process(project: Project) -> Path:
    return train_run(project, "layout-1x1x8", 1, gradient_accumulation_steps=8)


LAYOUTS = [
    pytest.param(2, {"pipeline_stages": 2, "gradient_accumulation_steps": 8}, id="2x1x8", marks=pytest.mark.slow),
    pytest.param(2, {"gradient_accumulation_steps": 4}, id="1x2x4", marks=pytest.mark.slow),
    pytest.param(4, {"pipeline_stages": 2, "gradient_accumulation_steps": 4}, id="2x2x4"),
    pytest.param(1, {"micro_batch_size": 2, "gradient_accumulation_steps": 4}, id="1x1x4-micro-batch-2"),
    pytest.param(4, {"pipeline_stages": 4, "gradient_accumulation_steps": 8}, id="4x1x8", marks=pytest.mark.slow),
    pytest.param(
        4,
        {"pipeline_stages": 2, "gradient_accumulation_steps": 4, "use_column_major_topology": True},
        id="2x2x4-column-major",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.processes
@pytest.mark.parametrize(("processes", "keys"), LAYOUTS)
def test_every_layout_trains_the_same(
    project: Project, one_process: Path, processes: int, keys: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    name = f"layout-{request.node.callspec.id}"
    assert_same_run(one_process, train_run(project, name, processes, **keys))


@pytest.mark.processes
@pytest.mark.slow
def test_dropout_drops_the_same_in_every_layout(project: Project, one_process: Path) -> None:
    keys = {"lora_dropout": 0.2, "activation_checkpointing": "full"}
    one = train_run(project, "dropout-1x1", 1, gradient_accumulation_steps=8, lora_dropout=0.2)
    many = train_run(project, "dropout-2x2", 4, pipeline_stages=2, gradient_accumulation_steps=4, **keys)
    assert_same_run(one, many)
    assert metrics(one)[-1]["train/loss"] != pytest.approx(metrics(one_process)[-1]["train/loss"], abs=10 * LOSS)


@pytest.mark.processes
def test_a_stage_may_train_nothing(project: Project) -> None:
    keys = {
        "layers_to_transform": "3:3",
        "gradient_accumulation_steps": 8,
        "max_steps": 3,
        "partition_method": "uniform",
    }
    one = train_run(project, "top-1x1", 1, **keys)
    two = train_run(project, "top-2x1", 2, pipeline_stages=2, **keys)
    assert_same_run(one, two)
    assert {name.split(".")[4] for name in factors(two)} == {"3"}


@pytest.mark.processes
@pytest.mark.slow
def test_the_symmetric_form_trains_the_same_on_two_stages_and_two_replicas(project: Project) -> None:
    keys = {"control_form": "symmetric", "lora_dropout": 0.1, "lora_weight_decay": 3.0, "max_steps": 5}
    one = train_run(project, "symmetric-1x1", 1, gradient_accumulation_steps=8, **keys)
    many = train_run(project, "symmetric-2x2", 4, pipeline_stages=2, gradient_accumulation_steps=4, **keys)
    assert_same_run(one, many)


PLAIN_FORMS: dict[str, tuple[type[PlainTrainer], str, float]] = {
    "general": (PlainTrainer, "AB", RANK**-0.5),
    "symmetric": (SymmetricTrainer, "QS", 1.0),
}
"""The reference of each form, the letters of its factors, and its scale."""


def first_factors(form: str, seed: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What a run starts from."""
    if form == "general":
        first, second = partial(initial_factor, name="control_A"), torch.zeros(HIDDEN, RANK)
    else:
        first, second = partial(initial_directions, name="control_Q"), torch.zeros(RANK)
    return {layer: (first(seed, layer, rank=RANK, hidden_size=HIDDEN), second.clone()) for layer in range(LAYERS)}


@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_a_plain_loop_over_the_same_sequences_gives_the_same(project: Project, form: str) -> None:
    steps, per_step = 8, 4
    keys = {
        "kinds": ALL, "control_class0_lambda": 0.5, "max_steps": steps, "lora_weight_decay": 20.0, "lr": 2e-2,
        "gradient_accumulation_steps": per_step, "class_weights": {"positive": 1.0, "negative": 0.5},
        "gradient_clipping": 0.05, "control_form": form,
    }  # fmt: skip
    file = project.write_config(f"plain-{form}", **keys)
    run_well("train", file)

    config = project.load(file)
    packed = prepare_data(config).train
    plan = BatchPlan(len(packed), per_step, 1, steps, config.seed)
    model = AutoModelForCausalLM.from_pretrained(project.root / "model", dtype=torch.float64)
    kind, letters, scale = PLAIN_FORMS[form]
    settings = Settings(scale, lr=2e-2, decay=20.0, clipping=0.05, neutral=0.5, weights={1: 1.0, -1: 0.5})
    trainer = kind(model, first_factors(form, config.seed), settings)
    clipped = 0
    for number, line in enumerate(metrics(project.root / f"plain-{form}"), 1):
        ids, classes, trained = (torch.from_numpy(each) for each in packed.rows(plan.indices(number)))
        expected = trainer.step(Step(ids.long(), classes.long(), trained))
        clipped += expected["grad_norm"] > settings.clipping
        for name, value in expected.items():
            assert line.get(f"train/{name}", 0.0) == pytest.approx(value, rel=LOSS, abs=1e-7), (number, name)
    assert number == steps
    assert clipped, "no step tests the clipping"
    expected_factors = {
        f"base_model.model.model.layers.{layer}.control_{letter}.weight": factor.detach().float()
        for layer, pair in trainer.factors.items()
        for letter, factor in zip(letters, pair, strict=True)
    }
    assert_same_factors(expected_factors, factors(project.root / f"plain-{form}"))
