"""Samples at evaluations: the text that the adapter writes, in every layout, without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from cadapter.adapters.directory import (
    ControlAdapterFiles,
    control_card,
    read_control_adapter,
    write_control_adapter,
)
from cadapter.adapters.factors import LowRank
from tests.forked_commands import call, run_all, run_all_well
from tests.tiny_project import HIDDEN, LAYERS, Project, metrics

PROMPTS = ["The film", "A table and a river by the window on"]
TOKENS = 24
KEYS: dict[str, Any] = {
    "max_steps": 12, "gradient_accumulation_steps": 4, "eval_fraction": 0.1, "evals_per_run": 3, "lr": 0.05,
    "lora_weight_decay": 0.5, "control_site": "writes", "checkpoint_interval_steps": 6, "sample_prompts": PROMPTS,
    "sample_max_new_tokens": TOKENS,
}  # fmt: skip


def samples(directory: Path) -> dict[tuple[int, str, int], str]:
    """Texts by step, prompt and strength."""
    return {
        (line["step"], each["prompt"], each["strength"]): each["text"]
        for line in metrics(directory, "samples", "samples")
        for each in line["samples"]
    }


def adapter(directory: Path, part: str = "final") -> dict[str, torch.Tensor]:
    return load_file(directory / part / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def sampled(project: Project) -> Path:
    (said,) = run_all_well(call("train", project.write_config("sampled", **KEYS)))
    assert f"samples after step 6: {PROMPTS[0]}" in said
    assert "\n  −1  " in said
    return project.root / "sampled"


def merged(base: Path, directory: Path, strength: int) -> Any:
    """Hugging Face's model whose writers are multiplied by (I + W)^strength, with full matrices in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    files = read_control_adapter(directory)
    for layer, factors in files.layers.items():
        step = torch.eye(files.hidden_size, dtype=torch.float64) + files.scale * factors.B.double() @ factors.A.double()
        power = torch.linalg.matrix_power(step, strength)
        block = model.model.layers[layer]
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.data = (power @ writer.weight.double()).float()
    return model


def test_the_text_is_that_of_hugging_faces_model_with_merged_weights(project: Project, sampled: Path) -> None:
    base, found = project.root / "model", samples(sampled)
    assert {step for step, _, _ in found} == {0, 6, 12}
    tokenizer = AutoTokenizer.from_pretrained(base)
    written = {}
    for strength in (-1, 0, 1):
        model = merged(base, sampled / "final", strength)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            if ids[0, 0] != tokenizer.bos_token_id:
                ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
            output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            written[12, prompt, strength] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert {key: text for key, text in found.items() if key[0] == 12} == written
    for prompt in PROMPTS:
        assert len({written[12, prompt, strength] for strength in (-1, 0, 1)}) > 1, "the adapter changes no text"
        # Before the first step the adapter is nothing, and strength 0 never is anything else.
        assert len({found[0, prompt, strength] for strength in (-1, 0, 1)}) == 1
        assert len({found[step, prompt, 0] for step in (0, 6, 12)}) == 1


def test_generate_writes_the_same(project: Project, sampled: Path) -> None:
    base, found = project.root / "model", samples(sampled)
    words = ["--adapter", sampled / "final", "--max-new-tokens", TOKENS, "--temperature", 0, "--quiet"]
    calls = [call("generate", base, PROMPTS[0], *words, "--strength", t) for t in (-1, 1)]
    for strength, text in zip((-1, 1), run_all_well(*calls), strict=True):
        assert text == found[12, PROMPTS[0], strength] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"control_form": "symmetric"},
        {"control_inverse": "neumann", "control_neumann_order": 1},
        {"document_attention": "isolated", "control_site": "block"},
        {"control_class0_lambda": 1.0, "kinds": ("positive", "negative", "neutral"), "lora_dropout": 0.2},
    ],
    ids=["symmetric", "neumann", "isolated", "neutral and dropout"],
)
def test_generate_writes_the_same_of_every_kind_of_adapter(project: Project, keys: dict[str, Any]) -> None:
    """The Neumann series of order 1 is far from the exact inverse, which −1 always means outside training."""
    name = "-".join(keys)
    run_all_well(call("train", project.write_config(name, **{**KEYS, **keys, "evals_per_run": 1})))
    directory = project.root / name
    words = ["--adapter", directory / "final", "--max-new-tokens", TOKENS, "--temperature", 0, "--quiet"]
    calls = [call("generate", project.root / "model", PROMPTS[0], *words, "--strength", t) for t in (-1, 0, 1)]
    written = dict(zip((-1, 0, 1), run_all_well(*calls), strict=True))
    found = samples(directory)
    assert written == {strength: found[12, PROMPTS[0], strength] + "\n" for strength in (-1, 0, 1)}
    assert len(set(written.values())) > 1


def test_what_is_trained_knows_nothing_of_samples(project: Project, sampled: Path) -> None:
    run_all_well(call("train", project.write_config("unsampled", **{**KEYS, "sample_prompts": None})))
    plain = project.root / "unsampled"
    for part in ("final", "best", "checkpoints/step-000006"):
        assert same(adapter(sampled, part), adapter(plain, part))
    moments = [load_file(run / "checkpoints/step-000012/optimizer-00001.safetensors") for run in (sampled, plain)]
    assert same(*moments)
    clock = {"seconds", "train/tokens_per_second"}
    for kind in ("train", "eval"):
        lines = [[{k: v for k, v in line.items() if k not in clock} for line in metrics(run, kind)]
                 for run in (sampled, plain)]  # fmt: skip
        assert lines[0] == lines[1]
    assert samples(plain) == {}


@pytest.mark.parametrize("keys", [{}, {"sample_temperature": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_every_layout_writes_the_same(
    project: Project, sampled: Path, stages: int, replicas: int, keys: dict[str, Any]
) -> None:
    """Three rows on two replicas: one of them has a row less. Drawn texts are those of one process, too."""
    name = f"sampled-{stages}x{replicas}-{len(keys)}"
    layout = {"pipeline_stages": stages, "gradient_accumulation_steps": 4 // replicas}
    once = {**KEYS, **keys, "sample_prompts": PROMPTS[:1], "max_steps": 6, "evals_per_run": 1}
    calls = [call("train", project.write_config(name, **{**once, **layout}), processes=stages * replicas)]
    calls += [call("train", project.write_config(f"{name}-1x1", **once))] if keys else []
    run_all_well(*calls)
    alone = samples(project.root / f"{name}-1x1") if keys else samples(sampled)
    found = samples(project.root / name)
    assert len(found) == 3
    assert found == {key: alone[key] for key in found}
    if keys:
        assert found != {key: samples(sampled)[key] for key in found}


def test_a_resumed_run_writes_the_same_samples_once(project: Project, sampled: Path) -> None:
    config = project.write_config("halfway", **KEYS)
    directory = project.root / "halfway"
    run_all_well(call("train", config))
    # As a kill after step 6 would have left it, but for lines of metrics.jsonl that come twice then.
    for path in ("final", "best", "checkpoints/step-000012"):
        (directory / path).rename(directory / f"{path.rpartition('/')[2]}-put-away")
    run_all_well(call("train", config, "--resume-from-checkpoint"))
    assert samples(directory) == samples(sampled)
    assert [line["step"] for line in metrics(directory, "samples", "samples")] == [0, 6, 12]
    assert same(adapter(directory), adapter(sampled))


def test_tensorboard_has_the_texts(sampled: Path) -> None:
    events = EventAccumulator(str(sampled / "logs"), size_guidance={"tensors": 0})
    events.Reload()
    shown = events.Tensors("samples/prompt_1/text_summary")
    assert [each.step for each in shown] == [0, 6, 12]
    text = shown[-1].tensor_proto.string_val[0].decode()
    for words in (PROMPTS[1], samples(sampled)[12, PROMPTS[1], -1], samples(sampled)[12, PROMPTS[1], 1]):
        assert all(f"    {line}" in text for line in words.splitlines())


def test_lora_is_sampled_as_it_is(project: Project) -> None:
    keys = {"use_control_adapters": False, "control_site": None, "kinds": ("positive",), "max_steps": 2}
    run_all_well(call("train", project.write_config("sampled-lora", **{**KEYS, **keys, "evals_per_run": 2})))
    assert {key[2] for key in samples(project.root / "sampled-lora")} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_a_fine_tuned_model_is_sampled_as_it_is(project: Project, stages: int) -> None:
    keys = {"use_control_adapters": False, "full_fine_tune": True, "lora_rank": None, "lora_weight_decay": None}
    keys |= {"control_site": None, "kinds": ("positive",), "lr": 1e-3, "max_steps": 3, "evals_per_run": 1}
    config = project.write_config(f"sampled-full-{stages}", **{**KEYS, **keys, "pipeline_stages": stages})
    run_all_well(call("train", config, processes=stages))
    directory = project.root / f"sampled-full-{stages}"
    words = ["--max-new-tokens", TOKENS, "--temperature", 0, "--quiet"]
    (text,) = run_all_well(call("generate", directory / "final", PROMPTS[0], *words))
    assert samples(directory)[3, PROMPTS[0], 1] + "\n" == text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sample_max_new_tokens": 63}, ("sample_prompts.0: its ", "do not fit into sequence_len = 64")),
        ({"sample_chat": True}, ("has no chat template",)),
    ],
)
def test_a_prompt_that_cannot_be_used_ends_the_run_before_it_begins(
    project: Project, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    (done,) = run_all(call("train", project.write_config("unusable", **{**KEYS, **keys})))
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (project.root / "unusable").exists()


def test_a_strength_that_does_not_exist_is_said_and_left_out(project: Project) -> None:
    """I − u·uᵀ has no inverse: it is trained from with neumann, which needs none."""
    start = project.root / "projection"
    unit = torch.nn.functional.normalize(torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)))
    layers = {layer: LowRank(unit.clone(), -unit.T.clone().contiguous()) for layer in range(LAYERS)}
    files = ControlAdapterFiles(path=start, rank=1, alpha=1.0, layers=layers, site="block", base_model_type="llama")
    start.mkdir()
    write_control_adapter(start, files, control_card(files))
    keys = {"init_from": str(start), "control_inverse": "neumann", "control_site": "block", "lr": 1e-12}
    keys |= {"lora_rank": 1, "lora_weight_decay": 0, "max_steps": 1, "evals_per_run": 1}
    (done,) = run_all(call("train", project.write_config("projected", **{**KEYS, **keys})))
    assert done.returncode == 0, done.stderr
    assert "samples after step 1: none at strength −1: layer 0: " in done.stderr
    assert {key[2] for key in samples(project.root / "projected")} == {0, 1}
