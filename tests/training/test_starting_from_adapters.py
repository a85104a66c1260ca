"""``init_from``: a run starts from an adapter's weights with a fresh optimiser, or says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadapter.errors import UsageError
from cadapter.training.build import plan_run
from cadapter.training.distributed import World
from tests.forked_commands import Call, call, run_all_well
from tests.tiny_project import LAYERS, Project, make_project, metrics

pytestmark = pytest.mark.processes

COMMON: dict[str, Any] = {
    "kinds": ("positive",), "lora_rank": 4, "lora_weight_decay": 10.0, "lr": 3e-2, "gradient_accumulation_steps": 16,
    "max_steps": 6, "epochs": 9,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {"control": {"use_control_adapters": True}, "lora": {"use_control_adapters": False}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """So few texts that every step sees all of them."""
    return make_project(tmp_path_factory.mktemp("starting"), documents=10)


def train(project: Project, name: str, **keys: Any) -> Call:
    return call("train", project.write_config(name, **{**COMMON, **keys}))


@pytest.fixture(scope="module")
def trained(project: Project) -> dict[str, Path]:
    """What was trained, by mode; ``MODE-again`` is a run that started from it, ``MODE-on`` one that just went on."""
    calls = {}
    for mode, keys in MODES.items():
        start = str(project.root / mode / "final")
        calls[mode] = train(project, mode, **keys)
        calls[f"{mode}-on"] = train(project, f"{mode}-on", **keys, max_steps=7)
        calls[f"{mode}-again"] = train(project, f"{mode}-again", **keys, init_from=start)
    run_all_well(*calls.values())
    return {mode: project.root / mode / "final" for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_the_first_loss_is_the_adapters_and_adam_starts_afresh(
    project: Project, trained: dict[str, Path], mode: str
) -> None:
    straight, on, again = (metrics(project.root / name) for name in (mode, f"{mode}-on", f"{mode}-again"))
    assert len({line["tokens"] / line["step"] for line in straight}) == 1, "every step has the same sequences"
    assert again[0]["train/loss"] == pytest.approx(on[6]["train/loss"], rel=1e-6)
    assert straight[0]["train/loss"] - again[0]["train/loss"] > 0.01
    assert again[0]["train/lr"] == straight[0]["train/lr"] < on[6]["train/lr"]
    # Adam has counted the second run's steps only.
    moments = load_file(project.root / f"{mode}-again" / "checkpoints" / "step-000006" / "optimizer-00001.safetensors")
    assert int(moments["steps"]) == 6


def plan(project: Project, name: str, **keys: Any) -> Any:
    """All that is checked before weights are read."""
    config = project.load(project.write_config(name, **{**COMMON, **keys}))
    return plan_run(config, World(0, 1, 0, torch.device("cpu"), torch.distributed.HashStore()))


def of_layers(source: Path, target: Path, layers: tuple[int, ...]) -> Path:
    """A copy of an adapter that has only some of its layers."""
    target.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if int(name.split("layers.")[1].split(".")[0]) in layers}
    save_file(kept, target / "adapter_model.safetensors")
    text = (source / "adapter_config.json").read_text()
    everything = ",\n".join(f"    {layer}" for layer in range(LAYERS))
    assert everything in text
    some = ",\n".join(f"    {layer}" for layer in layers)
    (target / "adapter_config.json").write_text(text.replace(everything, some))
    return target


def test_what_fits_passes(project: Project, trained: dict[str, Path]) -> None:
    for mode, keys in MODES.items():
        assert plan(project, "fits", **keys, init_from=str(trained[mode])).mode.name == mode


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_alpha": 4.0}, "lora_rank = 4 and lora_alpha = 2"),
        ({"lora_rank": 8, "lora_alpha": 4.0}, "rank"),
        ({"layers_to_transform": "0:2"}, "layers_to_transform"),
        ({"init_from": "nowhere"}, "nowhere is not a directory"),
        ({"init_from": "MODEL"}, "model is not an adapter directory"),
        ({"init_from": "OTHER"}, "is no LoRA|is not a control adapter"),
        ({"init_from": "SOME"}, "does not hold"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_fit_is_found_before_weights_are_read(
    project: Project, trained: dict[str, Path], tmp_path: Path, mode: str, keys: dict[str, Any], message: str
) -> None:
    (other,) = MODES.keys() - {mode}
    places = {
        None: trained[mode],
        "nowhere": project.root / "nowhere",
        "MODEL": project.root / "model",
        "OTHER": trained[other],
        "SOME": of_layers(trained[mode], tmp_path / "some", (0, 2)),
    }
    settings = {**MODES[mode], **keys, "init_from": str(places[keys.get("init_from")])}
    with pytest.raises(UsageError, match=message):
        plan(project, "does-not-fit", **settings)


def test_an_adapter_of_another_site_is_no_start(project: Project, trained: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match='control_site = "block"'):
        plan(project, "site", use_control_adapters=True, control_site="mlp", init_from=str(trained["control"]))


def test_other_modules_than_the_adapters_are_no_start(project: Project, trained: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="target_modules"):
        plan(project, "modules", use_control_adapters=False, target_modules=["q_proj"], init_from=str(trained["lora"]))
