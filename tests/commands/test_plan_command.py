"""``cadapter plan`` as a user meets it: from a config and a config.json alone, on no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cadapter.cli import app
from tests.tiny_project import Project, listing, make_project

GIB = 2**30


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose model has lost its weights."""
    project = make_project(tmp_path_factory.mktemp("plan"))
    (project.root / "model" / "model.safetensors").unlink()
    return project


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A model of the shape of Llama 3.1 8B, of which there is a config.json and nothing else; no texts either."""
    root = tmp_path_factory.mktemp("large")
    (root / "model").mkdir()
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (root / "model" / "config.json").write_text(json.dumps(config))
    return Project(root)


LARGE: dict[str, Any] = {
    "dtype": "bfloat16", "sequence_len": 4096, "lora_rank": 16, "gradient_accumulation_steps": 16,
}  # fmt: skip


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def planned_well(*arguments: object) -> str:
    result = plan(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def numbers(project: Project, *arguments: object) -> dict[str, Any]:
    file = project.root / "plan.json"
    planned_well(*arguments, "--json", file)
    return json.loads(file.read_text())


def test_a_plan_of_a_model_without_weights_writes_nothing(planned: Project) -> None:
    config = planned.write_config("first", gradient_accumulation_steps=4)
    before = listing(planned.root)
    said = planned_well(config)
    assert listing(planned.root) == before
    for words in (
        "Control Adapters: rank 4", "1 × 1", "embedding … head", "256 tokens (1 × 4 accumulated × 1 replicas)",
        "the data is not prepared yet", "No evaluation", "--gpu-memory", "Next: cadapter train",
    ):  # fmt: skip
        assert words in said


def test_steps_are_known_once_the_data_is_prepared_or_said(planned: Project) -> None:
    config = planned.write_config("prepared", eval_fraction=0.1, gradient_accumulation_steps=4, epochs=2, seed=7)
    assert numbers(planned, config)["steps"] is None
    said = numbers(planned, config, "--sequences", 42)
    assert (said["sequences"], said["steps_per_epoch"], said["steps"]) == (42, 11, 22)
    prepared = CliRunner().invoke(app, ["prepare", str(config)])
    assert prepared.exit_code == 0, prepared.output
    known = numbers(planned, config)
    assert known["sequences"] > 0
    assert known["eval_sequences"] > 0
    assert known["steps"] == 2 * -(-known["sequences"] // 4)
    said = planned_well(config)
    assert f"{known['steps']:,} steps in all" in said
    assert f"{known['eval_sequences']:,} sequences, 11 times" in said


def test_what_fits_and_what_would_make_it_fit(large: Project) -> None:
    config = large.write_config("fits", **LARGE)
    said = numbers(large, config, "--gpu-memory", 24)
    assert said["fits"] is True
    assert said["kept"] == "selective"
    assert said["memory"][0]["peak"] / GIB == pytest.approx(21.4, rel=0.03)  # as a GPU showed
    assert said["remedies"] == []
    small = numbers(large, config, "--gpu-memory", 12)
    assert small["fits"] is False
    assert {next(iter(each["settings"])) for each in small["remedies"]} >= {
        "load_in_4bit", "pipeline_stages", "layers_to_transform", "sequence_len",
    }  # fmt: skip
    assert small["fits_with"]["settings"] == {"load_in_4bit": True}
    result = plan(config, "--gpu-memory", 12)
    assert "does not fit a GPU of 12 GiB" in result.output
    assert "It fits with load_in_4bit = true" in result.output
    assert "--set load_in_4bit=true" in result.output


def test_what_is_proposed_fits(large: Project) -> None:
    """Several changes together, and taken up as settings they are a plan that fits."""
    config = large.write_config("tight", **{**LARGE, "micro_batch_size": 4, "activation_checkpointing": "none"})
    said = numbers(large, config, "--gpu-memory", 10)
    settings = said["fits_with"]["settings"]
    assert len(settings) > 2
    assert said["sequences_per_step"] == settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    again = numbers(large, config, "--gpu-memory", 10, *sets)
    assert again["fits"] is True
    assert again["memory"][0]["peak"] == said["fits_with"]["peak"]


def test_numbers_alone_on_standard_output(planned: Project) -> None:
    config = planned.write_config("printed")
    result = plan(config, "--json", "-")
    assert json.loads(result.stdout)["stages"] == 1
    refused = plan(config, "--json", planned.root)
    assert refused.exit_code == 2
    assert "is a directory" in refused.output


def test_layouts_are_compared(large: Project) -> None:
    config = large.write_config("layouts", **LARGE, pipeline_stages=2)
    said = numbers(large, config, "--gpu", "rtx3090", "--gpus", 16, "--nodes", 2, "--link", "10gbe")
    own, best = said["layouts"][0], said["best_layout"]
    assert (own["pipeline_stages"], own["use_column_major_topology"]) == (2, False)
    assert {each["pipeline_stages"] for each in said["layouts"]} == {1, 2, 4, 8, 16}
    for each in said["layouts"]:
        stages, accumulation = each["pipeline_stages"], each["gradient_accumulation_steps"]
        assert accumulation * each["replicas"] == 16 * 8  # the same batch
        assert each["bubble"] == (stages - 1) / (accumulation + stages - 1)
    assert best["use_column_major_topology"]  # hidden states stay within a node
    assert best["tokens_per_second"] == max(each["tokens_per_second"] for each in said["layouts"] if each["fits"])
    output = planned_well(config, "--gpus", 16, "--nodes", 2, "--set", "pipeline_stages=4")
    assert output.count("--set pipeline_stages=") == 1
    assert "Best of these" in output


def test_batches_that_cannot_be_shared_are_said(large: Project) -> None:
    config = large.write_config("uneven", **{**LARGE, "gradient_accumulation_steps": 1}, pipeline_stages=4)
    output = planned_well(config, "--gpus", 4)
    assert "Not with this batch: 1, 2 stages" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "usb"], "error: --link usb: not known."),
        (["--gpus", "3"], "error: pipeline_stages = 2 does not divide the 3 processes"),
        (["--gpus", "6", "--nodes", "4"], "--gpus 6 does not divide over --nodes 4"),
        (["--gpu", "voodoo"], "Known are h100"),
        (["--set", "pipeline_stages=9", "--gpus", "9"], "the model has only 6 pipeline layers"),
        (["--set", 'layers_to_transform="0:99"'], "goes past the last layer"),
        (["--set", "no_such_key=1"], "unknown key"),
    ],
)
def test_mistakes_are_plain_errors(planned: Project, arguments: list[str], words: str) -> None:
    config = planned.write_config("mistakes", pipeline_stages=2)
    result = plan(config, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_model_that_is_not_there(planned: Project) -> None:
    config = planned.write_config("lost", model_dir=str(planned.root / "nothing"))
    result = plan(config)
    assert result.exit_code == 2
    assert "is not a directory" in result.output


@pytest.mark.parametrize(
    "keys",
    [
        {"full_fine_tune": True, "use_control_adapters": False, "lora_weight_decay": 0.0, "kinds": ("positive",)},
        {"use_control_adapters": False, "kinds": ("positive",)},
        {"document_attention": "isolated"},
        {"attn_implementation": "eager"},
        {"control_class0_lambda": 0.5, "kinds": ("positive", "neutral"), "lora_dropout": 0.1},
    ],
)
def test_every_way_to_train_has_a_plan(planned: Project, keys: dict[str, Any]) -> None:
    said = numbers(planned, planned.write_config("ways", **keys), "--gpu-memory", 1)
    parts = said["memory"][0]
    always = sum(parts[name] for name in ("weights", "adapter", "gradients", "optimiser", "buffers", "activations"))
    assert parts["peak"] == always + max(parts["backward"], parts["logits"])
    assert min(parts.values()) >= 0
    assert said["trained_parameters"] > 0


@pytest.mark.slow
def test_a_rehearsal_shows_the_parts_and_is_refused_where_the_run_would_be(tmp_path: Path) -> None:
    from tests.tiny_project import run, run_well

    project = make_project(tmp_path)
    config = project.write_config("run", max_steps=1)
    said = run_well("train", config, "--dry-run").stdout
    for words in ("activations", "logits", "buffers", "activation_checkpointing: none", "attention: sdpa", "compile: "):
        assert words in said
    run_well("train", config)
    before = listing(project.root)
    refused = run("train", config, "--dry-run")
    assert refused.returncode == 2
    assert "holds a run already" in refused.stderr
    assert "--force" in refused.stderr
    assert run_well("train", config, "--dry-run", "--force").returncode == 0
    assert listing(project.root) == before
