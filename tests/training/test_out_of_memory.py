"""What is advised where GPU memory runs out: what takes less by estimate, and nothing that the run has tried."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cadapter.planning.memory import heaviest
from cadapter.training.forecast import outlook_of
from cadapter.training.out_of_memory import LARGER, evaluation_advice, training_advice
from tests.joined_processes import run_program
from tests.tiny_project import Project

LORA: dict[str, Any] = {"use_control_adapters": False, "kinds": ("positive",)}
FULL = {**LORA, "full_fine_tune": True, "lora_rank": None, "lora_weight_decay": None}
SMALLER: dict[str, Any] = {
    "a smaller micro_batch_size": {"micro_batch_size": 1}, "a shorter sequence_len": {"sequence_len": 64},
    "load_in_4bit = true": {"load_in_4bit": True}, 'gradient_dtype = "bfloat16"': {"gradient_dtype": "bfloat16"},
    'dtype = "bfloat16"': {"dtype": "bfloat16"}, "a lower lora_rank": {"lora_rank": 1},
    "fewer layers in layers_to_transform": {"layers_to_transform": "2:3"},
}  # fmt: skip
"""Advice, and settings that follow it."""
LEVELS = ("none", "selective", "full", "offload")


def advised(text: str) -> list[str]:
    """The pieces of advice of a message."""
    (line,) = [line for line in text.splitlines() if "Less is taken with " in line]
    line = re.sub(r'("\w+"), (?=")', r"\1|", line).replace('" or "', '"|"')
    return re.split(r", | or ", line.strip().removeprefix("Less is taken with ").removesuffix("."))


def estimate(project: Project, keys: dict[str, Any], kept: str | int, stages: int = 1) -> float:
    """Bytes of the heaviest stage where blocks keep this."""
    found = outlook_of(project.load(project.write_config("estimated", **keys)))
    share = LEVELS[2] if isinstance(kept, int) else kept
    every = kept if isinstance(kept, int) else 1
    return heaviest(found.sizes, found.bounds(stages), lambda index: share if index % every == 0 else "none")


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        *(({}, kept) for kept in (*LEVELS, 1, 2, 3)),
        ({"micro_batch_size": 2, "sequence_len": 192, "lora_rank": 8, "layers_to_transform": "0:1,3"}, "none"),
        ({"dtype": "bfloat16", "load_in_4bit": True}, "offload"),
        (LORA, 3),
        (FULL, "selective"),
        ({**FULL, "dtype": "bfloat16"}, "full"),
    ],
)
def test_what_is_advised_takes_less(project: Project, keys: dict[str, Any], kept: str | int) -> None:
    config = project.load(project.write_config("advised", **keys))
    now = estimate(project, keys, kept)
    found = advised(training_advice(config, outlook_of(config).mode, 1, kept))
    levels = [each for each in found if each.startswith("activation_checkpointing")]
    named = re.findall(r'"(\w+)"', levels[0]) if levels else []
    less = [each for each in LEVELS[1:] if estimate(project, keys, each) < now]
    assert set(named) <= set(less), less
    assert bool(named) == bool(less)
    assert "pipeline_stages = 2 on 2 GPUs" in found
    assert estimate(project, keys, kept, stages=2) < now
    others = set(found) - {"pipeline_stages = 2 on 2 GPUs", *levels}
    assert others <= SMALLER.keys()
    for words in others:
        assert estimate(project, {**keys, **SMALLER[words]}, kept) < now, words
    for words in SMALLER.keys() - others:
        changed = {**keys, **SMALLER[words]}
        assert keys.get("full_fine_tune") or estimate(project, changed, kept) >= now, words


def test_where_nothing_takes_less_no_setting_is_named(project: Project) -> None:
    keys = {
        "dtype": "bfloat16",
        "load_in_4bit": True,
        "lora_rank": 1,
        "layers_to_transform": "2:2",
        "pipeline_stages": 4,
    }
    config = project.load(project.write_config("smallest", **keys))
    mode = outlook_of(config).mode
    assert training_advice(config, mode, 4, "offload") == LARGER
    assert evaluation_advice(config, mode, 4, strengths=2) == LARGER


def test_an_evaluation_is_not_told_to_hold_out_other_documents(project: Project) -> None:
    for overlength, may in (("split", True), ("drop", False)):
        config = project.load(project.write_config("evaluated", sequence_len=128, overlength=overlength))
        advice = evaluation_advice(config, outlook_of(config).mode, 1, strengths=3)
        assert ("a shorter sequence_len" in advice) == may


WORKER = """
import os, sys
import torch
from cadapter.cli import main
from cadapter.models.layers import DecoderLayer
from cadapter.training import build, evaluation, run  # what is forked below is imported once

forward, stored = DecoderLayer.forward, build.check_stored

def full():
    raise torch.OutOfMemoryError("CUDA. Tried to allocate 2 GiB.")

def limited(self, parts):
    if torch.is_grad_enabled() == (where == "step"):
        full()
    return forward(self, parts)

for call in sys.argv[1:]:
    where, *words = call.split("|")
    print(f"--- {where} {words[0]}", flush=True)
    if os.fork():
        os.wait()
        continue
    DecoderLayer.forward = limited if where in ("step", "evaluation") else forward
    build.check_stored = stored if where != "loading" else lambda *_: full()
    sys.argv = ["cadapter", *words]
    try:
        main()
    finally:
        sys.stdout.flush()
        os._exit(0)  # without the second that Python takes to put everything away
"""
"""Commands "WHERE|WORD|WORD…", of which each runs out of memory there, if it comes to it."""


@pytest.mark.processes
@pytest.mark.slow
def test_each_part_of_a_run_has_advice_of_its_own(project: Project) -> None:
    keys: dict[str, Any] = {"max_steps": 1, "sequence_len": 128}
    tried = project.write_config("tried", **keys)
    offload = project.write_config("offload", **keys, activation_checkpointing="offload")
    full = project.write_config("full", **keys, activation_checkpointing="full")
    held_out = project.write_config("held-out", **keys, eval_fraction=0.1)
    calls = [
        f"step|train|{tried}", f"step|train|{offload}", f"step|train|{full}", f"loading|train|{tried}|--force",
        f"evaluation|train|{held_out}", f"nowhere|train|{held_out}|--force", f"evaluation|eval|{held_out}",
    ]  # fmt: skip
    _, said, _ = run_program(WORKER, 1, *calls)
    _, *parts = said.split("--- ")
    assert said.count("error: GPU memory ran out") == 6, said
    left = [
        "load_in_4bit = true", "pipeline_stages = 2 on 2 GPUs", "fewer layers in layers_to_transform",
        "a shorter sequence_len", "a lower lora_rank", 'dtype = "bfloat16"',
    ]  # fmt: skip
    weights = [left[0], left[1], left[5]]
    assert parts[0].count("going on with activation_checkpointing") == 3
    assert [advised(part) for part in [*parts[:5], parts[6]]] == [
        left,
        left,
        ['activation_checkpointing = "offload"', *left],
        weights,
        left,
        ["fewer strengths (--strength)", "a shorter sequence_len", *weights],
    ]
    phases = ["step 1", "step 1", "step 1", "loading the model", "evaluation after step 0", "evaluation"]
    for part, phase in zip([*parts[:5], parts[6]], phases, strict=True):
        assert f"GPU memory ran out, {phase}: Tried to allocate 2 GiB.\n" in part
        assert "internal error" not in part
    assert ["cadapter plan CONFIG" in part for part in parts] == [True] * 5 + [False] * 2
