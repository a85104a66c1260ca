"""``document_attention = "isolated"`` in whole runs: against each document alone, and in several layouts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from cadapter.classes import NEUTRAL
from cadapter.data import PackedSequences, prepare_data
from cadapter.data.batches import BatchPlan
from cadapter.data.packing import DOCUMENT_START, TRAINED
from tests.tiny_models import SHAPE
from tests.tiny_project import VOCABULARY, Project, metrics, run, run_well
from tests.tiny_tokenizer import make_tokenizer
from tests.training.test_layouts import ALL, LOSS, assert_same_run

COMMON: dict[str, Any] = {
    "kinds": ALL, "control_class0_lambda": 0.5, "max_steps": 4, "eval_fraction": 0.1, "evals_per_run": 2,
    "document_attention": "isolated", "mix_datasets": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(project: Project) -> Path:
    run_well("train", project.write_config("isolated-1x1x8", **COMMON, gradient_accumulation_steps=8))
    return project.root / "isolated-1x1x8"


def documents_of(packed: PackedSequences, row: int, prefix: int) -> list[tuple[list[int], list[int], list[bool]]]:
    """The documents of a sequence by themselves, as (ids, classes, trained); the first with the sequence's prefix."""
    ids, classes, flags = (part[0, : packed.tokens[row]] for part in packed.gather([row]))
    begins = np.flatnonzero(flags & DOCUMENT_START)
    cuts = [0, *(int(begin) for begin in begins if begin > prefix), len(ids)]
    return [
        (ids[a:b].tolist(), classes[a:b].tolist(), ((flags[a:b] & TRAINED) != 0).tolist()) for a, b in pairwise(cuts)
    ]


@pytest.mark.processes
def test_the_loss_is_that_of_each_document_alone(project: Project, one_process: Path) -> None:
    config = project.load(project.root / "isolated-1x1x8.toml")
    packed = prepare_data(config).train
    model = AutoModelForCausalLM.from_pretrained(project.root / "model", dtype=torch.float64)
    losses, mixed = [], 0
    for row in BatchPlan(len(packed), 8, 1, None, config.seed).indices(1):
        documents = documents_of(packed, int(row), prefix=1)
        mixed += len({class_ for _, classes, _ in documents for class_ in classes[1:]}) > 1
        for ids, classes, trained in documents:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
            counted = [bool(t) and c != NEUTRAL for t, c in zip(trained[1:], classes[1:], strict=True)]
            losses += nll[torch.tensor(counted, dtype=torch.bool)].tolist()
    assert mixed > 2  # sequences with documents of several classes
    assert metrics(one_process)[0]["train/loss"] == pytest.approx(np.mean(losses), rel=LOSS)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "keys"),
    [
        pytest.param(
            2,
            {"pipeline_stages": 2, "gradient_accumulation_steps": 8, "activation_checkpointing": "full"},
            marks=pytest.mark.slow,
        ),
        (1, {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "attn_implementation": "eager"}),
    ],
)
def test_layouts_train_the_same(project: Project, one_process: Path, processes: int, keys: dict[str, Any]) -> None:
    config = project.write_config(f"isolated-{processes}", **{**COMMON, **keys})
    run_well("train", config, "--num-gpus", processes)
    assert_same_run(one_process, project.root / f"isolated-{processes}")


@pytest.mark.processes
def test_it_is_another_run_than_a_packed_one(project: Project, one_process: Path) -> None:
    config = project.write_config("isolated-1x1x8", **{**COMMON, "document_attention": "packed"})
    refused = run("train", config, "--resume-from-checkpoint")
    assert refused.returncode == 2
    assert "document_attention: 'isolated' in the checkpoint, 'packed' now" in refused.stderr


@pytest.mark.processes
def test_a_model_that_leaks_is_refused_before_anything_is_read(own_project: Project) -> None:
    config = GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * SHAPE["num_hidden_layers"]
    )
    config.vocab_size = VOCABULARY
    (own_project.root / "model").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(own_project.root / "model")
    make_tokenizer(own_project.root / "model")
    refused = run("train", own_project.write_config("leaks", **COMMON), "--dry-run")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: document_attention = \"isolated\" is not possible with a model of type 'gpt_oss'" in refused.stderr
    packed = run("train", own_project.write_config("packed", **{**COMMON, "document_attention": "packed"}), "--dry-run")
    assert packed.returncode == 0, packed.stderr
