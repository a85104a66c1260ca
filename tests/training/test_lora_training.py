"""LoRA trains as Hugging Face's model with PEFT's LoRA does in a plain loop, in every layout, and PEFT loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadapter.data import prepare_data
from tests.forked_commands import Call, call, run_all, run_all_well
from tests.reference.plain_fine_tuning import PlainFineTuning, Settings, mean_loss, steps_of, with_lora
from tests.steered_models import make_model as make_family
from tests.tiny_project import HIDDEN, LAYERS, Project, listing, make_model, make_project, metrics

pytestmark = pytest.mark.processes

STEPS, RANK, PER_STEP, LR, DECAY = 20, 8, 4, 3e-2, 10.0
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSS = 1e-5
"""Losses are means of float32 terms around 6; measured are differences of 1e-6 in 20 steps."""
FACTORS = 1e-4
"""Relative, per tensor: Adam divides by √v, which turns rounding of tiny gradients into rounding of whole steps."""
LOGITS = 1e-5

COMMON: dict[str, Any] = {
    "kinds": ("positive",), "use_control_adapters": False, "lora_rank": RANK, "lora_weight_decay": DECAY, "lr": LR,
    "gradient_accumulation_steps": PER_STEP, "max_steps": STEPS, "eval_fraction": 0.1, "evals_per_run": 2,
    "checkpoint_interval_steps": 10, "gradient_clipping": 0.3,
}  # fmt: skip
SHORT: dict[str, Any] = {"max_steps": 4, "checkpoint_interval_steps": None}
DROPOUT: dict[str, Any] = {**SHORT, "lora_dropout": 0.3}
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "lora_weight_dtype": "bfloat16"}
EXPERTS = ["q_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("lora"), documents=130)
    make_family(project.root / "mixtral", "mixtral")
    return project


def train(project: Project, name: str, *options: str, processes: int = 1, **keys: Any) -> Call:
    return call("train", project.write_config(name, **{**COMMON, **keys}), *options, processes=processes)


@pytest.fixture(scope="module")
def printed(project: Project) -> dict[str, str]:
    """All runs of this module, each in the directory of its name; what each printed."""
    calls = {
        "straight": train(project, "straight"),
        "stages": train(project, "stages", processes=2, pipeline_stages=2),
        "replicas": train(project, "replicas", processes=2, gradient_accumulation_steps=PER_STEP // 2),
        "half": train(project, "half", max_steps=10),
        "resumed": train(project, "resumed", "--resume-from-checkpoint", output_dir=str(project.root / "half")),
        "bfloat16": train(project, "bfloat16", **BFLOAT16),
        "bfloat16-half": train(project, "bfloat16-half", **BFLOAT16, max_steps=10),
        "bfloat16-resumed": train(
            project, "bfloat16-resumed", "--resume-from-checkpoint", **BFLOAT16,
            output_dir=str(project.root / "bfloat16-half"),
        ),
        "dropout": train(project, "dropout", **DROPOUT),
        "dropout-recomputed": train(project, "dropout-recomputed", **DROPOUT, activation_checkpointing="full"),
        "dropout-stages": train(project, "dropout-stages", processes=2, **DROPOUT, pipeline_stages=2),
        "some": train(
            project, "some", **SHORT, target_modules=["v_proj", "mlp.down_proj"], layers_to_transform="1:2"
        ),
        "experts": train(
            project, "experts", **SHORT, model_dir=str(project.root / "mixtral"), target_modules=EXPERTS
        ),
    }  # fmt: skip
    return dict(zip(calls, run_all_well(*calls.values()), strict=True))


def final(project: Project, name: str) -> dict[str, torch.Tensor]:
    return load_file(project.root / name / "final" / "adapter_model.safetensors")


def losses(project: Project, name: str, kind: str = "train") -> list[float]:
    return [line[f"{kind}/loss"] for line in metrics(project.root / name, kind)]


def assert_same_run(project: Project, one: str, other: str) -> None:
    """Same losses of every step and evaluation, same factors."""
    for kind in ("train", "eval"):
        assert losses(project, other, kind) == pytest.approx(losses(project, one, kind), abs=LOSS)
    first, second = final(project, one), final(project, other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.norm() > 0
        assert (tensor - second[name]).norm() <= FACTORS * tensor.norm(), name


def base_model(project: Project, name: str = "model", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(project.root / name, dtype=dtype)


def some_ids() -> torch.Tensor:
    return torch.arange(3, 3 + 48).unsqueeze(0)


# ---- the curve ------------------------------------------------------------------------------------------------------


def test_a_plain_loop_with_peft_gives_the_same_curve(project: Project, printed: dict[str, str]) -> None:
    config = project.load(project.root / "straight.toml")
    model, pairs = with_lora(base_model(project, dtype=torch.float64), RANK, config.seed, MODULES)
    settings = Settings(lr=LR, clipping=config.gradient_clipping, decay=DECAY, scale=RANK**-0.5)
    plain = PlainFineTuning(model, [factor for pair in pairs.values() for factor in pair], settings, pairs)
    found = metrics(project.root / "straight")
    clipped = 0
    for line, step in zip(found, steps_of(config, STEPS, PER_STEP), strict=True):
        expected = plain.step(*step)
        clipped += expected["grad_norm"] > settings.clipping
        for name, value in expected.items():
            assert line[f"train/{name}"] == pytest.approx(value, rel=LOSS), (line["step"], name)
    assert 0 < clipped < STEPS, "clipping has to act in some steps"
    assert found[0]["train/loss"] - found[-1]["train/loss"] > 1e4 * LOSS

    trained = final(project, "straight")
    assert len(trained) == 2 * len(pairs) == 2 * LAYERS * len(MODULES)
    undecayed = sum(line["train/weight_decay_avg"] for line in found)
    assert undecayed > 0.01, "the decay has to matter"
    for name, pair in pairs.items():
        for letter, factor in zip("AB", pair, strict=True):
            difference = trained[f"base_model.model.model.{name}.lora_{letter}.weight"] - factor.detach()
            assert difference.norm() <= FACTORS * factor.norm(), name


def test_the_norms_that_are_reported_are_those_of_the_last_adapter(project: Project, printed: dict[str, str]) -> None:
    factors = final(project, "straight")
    updates = [
        RANK**-0.5 * factors[name.replace("lora_A", "lora_B")].double() @ A.double()
        for name, A in factors.items()
        if "lora_A" in name
    ]
    frobenius = [torch.linalg.matrix_norm(W).item() for W in updates]
    last = metrics(project.root / "straight")[-1]
    # Gram matrices are made in float32.
    assert last["train/norm_avg"] == pytest.approx(sum(frobenius) / len(frobenius), rel=1e-5)
    assert last["train/norm_max"] == pytest.approx(max(frobenius), rel=1e-5)
    spectral = max(torch.linalg.matrix_norm(W, 2).item() for W in updates)
    assert last["train/spectral_max"] == pytest.approx(spectral, rel=1e-2)


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "base"), [("straight", "model"), ("some", "model"), ("experts", "mixtral")])
def test_peft_loads_the_result_and_computes_what_the_pipeline_did(
    project: Project, printed: dict[str, str], name: str, base: str
) -> None:
    """The evaluation after the last step was the trained pipeline's; PEFT's model has to give its loss."""
    model = PeftModel.from_pretrained(base_model(project, base), project.root / name / "final")
    held_out = held_out_sequences(project, name)
    found = metrics(project.root / name, "eval")
    assert mean_loss(model, *held_out) == pytest.approx(found[-1]["eval/loss"], abs=LOSS)
    with model.disable_adapter():
        assert mean_loss(model, *held_out) == pytest.approx(found[0]["eval/loss"], abs=LOSS)
    assert found[0]["eval/loss"] - found[-1]["eval/loss"] > 100 * LOSS


def held_out_sequences(project: Project, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    packed = prepare_data(project.load(project.root / f"{name}.toml")).evaluation
    ids, _, trained = (torch.from_numpy(each) for each in packed.rows(range(len(packed))))
    return ids.long(), trained


def test_checkpoints_are_adapter_directories_too(project: Project, printed: dict[str, str]) -> None:
    run = project.root / "straight"
    checkpoint = run / "checkpoints" / "step-000020"
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (checkpoint / file).read_bytes() == (run / "final" / file).read_bytes()
    first, last = (
        PeftModel.from_pretrained(base_model(project), run / part)(input_ids=some_ids()).logits
        for part in ("checkpoints/step-000010", "final")
    )
    assert (first - last).abs().max() > 100 * LOGITS


def test_only_the_named_modules_of_the_named_layers_are_trained(project: Project, printed: dict[str, str]) -> None:
    places = {name.split("layers.")[1].rsplit(".lora_", 1)[0] for name in final(project, "some")}
    assert places == {f"{layer}.{module}" for layer in (1, 2) for module in ("self_attn.v_proj", "mlp.down_proj")}
    config = json.loads((project.root / "some" / "final" / "adapter_config.json").read_text())
    assert (sorted(config["target_modules"]), config["layers_to_transform"]) == (["down_proj", "v_proj"], [1, 2])
    numbers = 2 * RANK * (HIDDEN + HIDDEN // 2 + 2 * HIDDEN + HIDDEN)
    assert f"on v_proj, down_proj in 2 of {LAYERS} layers (4 pairs), {numbers:,} parameters" in printed["some"]


# ---- layouts, dropout, going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["stages", "replicas"])
def test_every_layout_trains_the_same(project: Project, printed: dict[str, str], other: str) -> None:
    assert_same_run(project, "straight", other)


@pytest.mark.parametrize("other", ["dropout-recomputed", "dropout-stages"])
def test_dropout_drops_the_same_everywhere(project: Project, printed: dict[str, str], other: str) -> None:
    assert_same_run(project, "dropout", other)
    without = losses(project, "straight")[: len(losses(project, "dropout"))]
    assert losses(project, "dropout")[0] == without[0], "B is zero, so that the first step cannot tell"
    assert abs(losses(project, "dropout")[-1] - without[-1]) > 100 * LOSS


@pytest.mark.parametrize(("one", "other"), [("straight", "half"), ("bfloat16", "bfloat16-half")])
def test_a_resumed_run_is_the_one_that_was_not_stopped_bit_for_bit(
    project: Project, printed: dict[str, str], one: str, other: str
) -> None:
    assert "step-000010" in printed["resumed"]
    for name in ("train/loss", "train/grad_norm", "train/norm_avg"):
        first, second = ([line[name] for line in metrics(project.root / run)] for run in (one, other))
        assert first == second
    for part in ("final/adapter_model.safetensors", "checkpoints/step-000020/optimizer-00001.safetensors"):
        tensors, others = (load_file(project.root / run / part) for run in (one, other))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_everything_in_bfloat16_learns_the_same(project: Project, printed: dict[str, str]) -> None:
    assert all(tensor.dtype == torch.bfloat16 for tensor in final(project, "bfloat16").values())
    # Rounding to 8 bits, and no decay: neither is much in 20 steps.
    assert losses(project, "bfloat16") == pytest.approx(losses(project, "straight"), abs=0.05)
    assert losses(project, "bfloat16")[0] - losses(project, "bfloat16")[-1] > 0.2
    model = PeftModel.from_pretrained(base_model(project, dtype=torch.bfloat16), project.root / "bfloat16" / "final")
    evaluations = losses(project, "bfloat16", "eval")
    assert mean_loss(model, *held_out_sequences(project, "bfloat16")) == pytest.approx(evaluations[-1], abs=1e-2)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def incomplete(project: Project) -> Path:
    """A model that lacks a tensor: whoever begins to read weights finds that out."""
    directory = make_model(project.root / "incomplete")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_targets_that_match_nothing_are_repeated_before_weights_are_read(project: Project, incomplete: Path) -> None:
    base = {"model_dir": str(incomplete)}
    calls = [
        train(project, "reads", **base),
        train(project, "unmatched", **base, target_modules=["query", "v_proj"]),
        train(project, "unmatched-twice", processes=2, **base, pipeline_stages=2, target_modules=["query"]),
    ]
    before = listing(project.root)
    reads, *unmatched = run_all(*calls)
    assert (reads.returncode, "Missing: model.layers.0.mlp.up_proj.weight" in reads.stderr) == (2, True)
    for done, targets in zip(unmatched, ('["query", "v_proj"]', '["query"]'), strict=True):
        assert done.returncode == 2
        assert f'target_modules = {targets}: "query" is in no layer that is trained.' in done.stderr
        assert "self_attn.q_proj" in done.stderr, "what there is instead"
        assert "Missing: " not in done.stderr
        assert done.stderr.count("error: ") == 1
    assert listing(project.root) == before
