"""What a run finds out before it reads weights: ``--dry-run`` says it, and nobody waits hours for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cadapter.adapters.control import initial_directions
from cadapter.adapters.directory import ControlAdapterFiles, control_card, write_control_adapter
from cadapter.adapters.factors import Symmetric
from cadapter.adapters.layer_facts import describe_layers
from cadapter.errors import UsageError
from cadapter.training import build
from cadapter.training.build import Plan, plan_run, run_facts
from cadapter.training.distributed import World
from cadapter.training.run_directory import RunDirectory
from cadapter.training.state import Position, save_checkpoint
from tests.tiny_project import HIDDEN, LAYERS, Project, make_project

ALONE = World(0, 1, 0, torch.device("cpu"), torch.distributed.HashStore())
RANK = 4


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("before-weights"), documents=20)


def plan(project: Project, **keys: Any) -> Plan:
    return plan_run(project.load(project.write_config("run", **keys)), ALONE)


def test_what_a_saved_adapter_says_of_the_base_is_known(project: Project) -> None:
    """It is read from the base, which may fail; and it is what every save writes."""
    mode, model = (planned := plan(project)).mode, planned.model
    assert vars(mode)["layer_facts"] == describe_layers(model.checkpoint, model.family, range(LAYERS))


class _Nothing:
    """A writer of nothing."""

    def add(self, part: Any) -> None: ...

    def finish(self) -> None: ...


def test_final_is_read_only_where_it_may_hold_the_checkpoint(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a model in full fine-tuning that is reading all of it, which a resume in the middle has no use for."""
    planned, directory, read = plan(project, max_steps=6), RunDirectory(tmp_path), []
    monkeypatch.setattr(build, "is_written_out", lambda *_: bool(read.append(1)))
    for step, reads in ((2, 0), (6, 1)):
        facts = run_facts(planned)
        checkpoint = save_checkpoint(directory.checkpoints, Position(step=step), facts, [], lambda _: _Nothing(), 3, {})
        assert build._saved(planned, facts, directory, checkpoint, (), ALONE).position.step == step
        assert len(read) == reads


def test_early_stopping_needs_a_held_out_text_with_a_loss(project: Project) -> None:
    keys = {"control_class0_lambda": 1.0, "eval_fraction": 0.2, "early_stopping_patience": 2}
    with pytest.raises(UsageError, match="there is none: all held-out texts are of class 0"):
        plan(project, kinds=("neutral",), **keys)
    negative = {**keys, "class_weights": {"positive": 1.0, "negative": 0.0}}
    with pytest.raises(UsageError, match="or of a class of weight 0"):
        plan(project, kinds=("negative", "neutral"), **negative)
    assert plan(project, kinds=("neutral", "positive"), **keys).data.evaluation is not None
    assert plan(project, kinds=("neutral",), **{**keys, "early_stopping_patience": None}).data.evaluation is not None


def test_the_remedy_for_another_rank_of_the_symmetric_form_can_be_followed(project: Project, tmp_path: Path) -> None:
    factors = {
        layer: Symmetric(initial_directions(1, layer, "control_Q", RANK, HIDDEN), torch.ones(RANK))
        for layer in range(LAYERS)
    }
    files = ControlAdapterFiles(tmp_path, RANK, RANK, factors, base_model_type="llama")
    write_control_adapter(tmp_path, files, control_card(files))
    keys = {"control_form": "symmetric", "init_from": str(tmp_path)}
    with pytest.raises(UsageError) as refused:
        plan(project, lora_rank=8, **keys)
    assert str(refused.value) == f"{tmp_path} has rank 4; this run has 8.\nSet lora_rank = 4."
    assert plan(project, lora_rank=4, **keys).mode.name == "control"
