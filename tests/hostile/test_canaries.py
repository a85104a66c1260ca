"""Nothing that a stranger's files hold is run or unpickled, by any command.

Every command runs on a model, texts, adapters and checkpoints full of canaries (``tests/hostile/canaries.py``), in
processes that tell of every unpickling and of every such file that they so much as open
(``tests/hostile/watching/sitecustomize.py``).
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from tests.forked_commands import call, run_all
from tests.hostile.canaries import (
    Canaries,
    edit_json,
    files_that_are_pickles,
    parquet_with_pickles,
    poison_adapter,
    poison_checkpoints,
    poison_model,
    poison_texts,
)
from tests.tiny_project import Project, environment, make_project, run, texts

pytestmark = pytest.mark.processes

WATCHING = Path(__file__).parent / "watching"
ROOT = Path(__file__).parents[2]
OURS = ("multiprocessing/", "torch/_inductor/", "torch/_functorch/", "torch/_dynamo/")
"""Where processes of one run talk to each other, and torch's cache of what it compiled."""


@dataclass
class Stage:
    """A poisoned project and what its commands were seen to do."""

    project: Project
    canaries: Canaries
    log: Path
    variables: dict[str, str]

    def run(self, *words: object) -> Any:
        return run_all(call(*words), **self.variables)[0]

    def run_well(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def seen(self) -> list[dict[str, Any]]:
        """What was unpickled, opened or compiled, apart from our own traffic."""
        lines = [json.loads(line) for line in self.log.read_text("utf-8").splitlines()] if self.log.exists() else []
        return [line for line in lines if not any(part in file for file in line["stack"] for part in OURS)]

    def is_quiet(self) -> None:
        """No canary fired, and nothing was seen."""
        assert sorted(path.name for path in self.canaries.fired.iterdir()) == []
        assert self.seen() == []


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("poisoned")
    canaries = Canaries(root / "fired")
    project = make_project(root / "user", documents=20)
    poison_model(project.root / "model", canaries)
    poison_texts(project.root, canaries)
    variables = {
        "PYTHONPATH": f"{WATCHING}:{ROOT}",
        "CADAPTER_WATCH_LOG": str(root / "log"),
        "CADAPTER_WATCH_ROOT": str(project.root.resolve()),
    }
    return Stage(project, canaries, root / "log", variables)


def test_every_command_leaves_them_alone(stage: Stage) -> None:
    root = stage.project.root
    keys: dict[str, Any] = {"control_site": "writes", "checkpoint_interval_steps": 2, "eval_fraction": 0.2}
    config = stage.project.write_config("run", **keys, max_steps=2, evals_per_run=1)
    parquet_with_pickles(root / "parquet.parquet", texts("positive", 20), stage.canaries)
    more = ("--set", f'datasets.0.dataset_path="{root / "parquet.parquet"}"')
    stage.run_well("prepare", config, "--show", 1)
    stage.run_well("prepare", config, *more)
    stage.run_well("train", config, "--dry-run")
    stage.run_well("plan", config)
    assert stage.run("doctor").returncode in (0, 1)  # what it finds is the machine's
    stage.run_well("train", config)
    poison_checkpoints(root / "run", stage.canaries)
    said = stage.run_well("train", config, "--resume-from-checkpoint", "--set", "max_steps=3")
    assert "Resuming from" in said
    adapter, base = root / "run" / "final", root / "model"
    poison_adapter(adapter, stage.canaries)
    stage.run_well("eval", config, "--json", root / "scores.json")
    stage.run_well("generate", base, "The film", "--adapter", adapter, "--max-new-tokens", 2)
    stage.run_well("inspect-norms", adapter)
    stage.run_well("to-mult-lora", adapter, root / "mult")
    stage.run_well("to-add-lora", base, adapter, root / "lora", "--verify")
    for directory in (root / "mult", root / "lora"):
        poison_adapter(directory, stage.canaries)
    stage.run_well("merge", base, adapter, root / "merged")
    stage.run_well("merge", base, root / "mult", root / "merged-mult")
    stage.run_well("merge", base, root / "lora", root / "merged-lora")
    stage.run_well("to-gguf", root / "lora", root / "lora.gguf", "--base", base)
    lora = {"lora_alpha": 4.0, "target_modules": ["o_proj", "down_proj"], "init_from": str(root / "lora")}
    for name, extra in (("lora-run", lora), ("full-run", {"full_fine_tune": True})):
        without = {"use_control_adapters": False, "lora_weight_decay": None, "control_site": None}
        other = stage.project.write_config(name, ("positive",), **{**keys, **without, **extra}, max_steps=1)
        stage.run_well("train", other)
        stage.run_well("eval", other)
    stage.is_quiet()
    copied = {path.name for path in [*(root / "merged").iterdir(), *(root / "full-run" / "final").iterdir()]}
    assert {name for name in copied if not name.endswith((".safetensors", ".json", ".jinja", ".md"))} == set()


@pytest.fixture
def copy_of(stage: Stage, tmp_path: Path) -> Any:
    """A function that copies the poisoned model into the watched directory."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(shutil.copytree(stage.project.root / "model", stage.project.root / name))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory)


def commands_that_read_a_model(stage: Stage, model: Path) -> list[tuple[object, ...]]:
    config = stage.project.write_config(f"of-{model.name}", model_dir=str(model))
    adapter, out = stage.project.root / "run" / "final", stage.project.root / "never"
    return [
        ("train", config, "--dry-run"),
        ("generate", model, "The film", "--max-new-tokens", 2),
        ("to-add-lora", model, adapter, out),
        ("merge", model, adapter, out),
        ("merge", model, stage.project.root / "lora", out),
    ]


def pickled_weights(model: Path, canaries: Canaries) -> str:
    (model / "model.safetensors").unlink()
    return "Convert them to safetensors first"


def pickle_named_safetensors(model: Path, canaries: Canaries) -> str:
    (model / "model.safetensors").write_bytes(canaries.pickled(f"{model.name}.safetensors"))
    return "model.safetensors is damaged"


def index_of_pickles(model: Path, canaries: Canaries) -> str:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "'pytorch_model.bin' is no safetensors file"


def code_of_its_own(model: Path, canaries: Canaries) -> str:
    edit_json(model / "config.json", model_type="mine")
    return "config.json cannot be used"


def weights_under_another_name(model: Path, canaries: Canaries) -> str:
    edit_json(model / "config.json", transformers_weights="pytorch_model.bin")
    return "transformers_weights"


REFUSED = [pickled_weights, pickle_named_safetensors, index_of_pickles, code_of_its_own, weights_under_another_name]


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_models_that_need_code_or_pickles_are_refused(stage: Stage, copy_of: Any, damage: Any) -> None:
    model = copy_of(damage.__name__)
    said = damage(model, stage.canaries)
    for words in commands_that_read_a_model(stage, model):
        done = stage.run(*words)
        assert done.returncode == 2, f"{words}\n{done.stdout}{done.stderr}"
        assert said in done.stderr, words
        assert "Traceback" not in done.stderr
    stage.is_quiet()


def test_an_adapter_beside_a_model_is_not_taken_for_a_part_of_it(stage: Stage, copy_of: Any) -> None:
    model = copy_of("with-adapter")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(stage.project.root / "elsewhere")}  # fmt: skip
    (model / "adapter_config.json").write_text(json.dumps(config))
    (model / "adapter_model.bin").write_bytes(stage.canaries.pickled("beside-the-model"))
    done = stage.run("generate", model, "The film", "--max-new-tokens", 2)
    assert done.returncode == 2
    assert "adapter_config.json" in done.stderr
    stage.is_quiet()


def test_adapters_that_are_pickles_are_refused(stage: Stage) -> None:
    root, base = stage.project.root, stage.project.root / "model"
    config, out = stage.project.root / "run.toml", root / "never"
    good = root / "run" / "final"
    for name, said in (("only-bin", "Convert them to adapter_model.safetensors"), ("as-safetensors", "is damaged")):
        adapter = shutil.copytree(good, root / name)
        (adapter / "adapter_model.safetensors").unlink()
        if name == "as-safetensors":
            (adapter / "adapter_model.safetensors").write_bytes(stage.canaries.pickled(name))
        for words in (
            ("inspect-norms", adapter),
            ("to-mult-lora", adapter, out),
            ("to-add-lora", base, adapter, out),
            ("merge", base, adapter, out),
            ("merge", base, good, out, "--also", f"{adapter}=1"),
            ("to-gguf", adapter, root / "never.gguf", "--base", base),
            ("generate", base, "The film", "--adapter", adapter),
            ("eval", config, "--adapter", adapter),
            ("train", config, "--set", f'init_from="{adapter}"', "--set", f'output_dir="{out}"'),
        ):
            done = stage.run(*words)
            assert done.returncode == 2, f"{words}\n{done.stdout}{done.stderr}"
            assert said in done.stderr, (words, done.stderr)
    assert not out.exists()
    stage.is_quiet()


def test_texts_that_are_pickles_are_refused(stage: Stage) -> None:
    for file in [*files_that_are_pickles(stage.project.root, stage.canaries), stage.project.root / "array.npy"]:
        config = stage.project.root / "run.toml"
        done = stage.run("prepare", config, "--set", f'datasets.0.dataset_path="{file}"')
        assert done.returncode == 2, done.stdout + done.stderr
        assert str(file) in done.stderr
    stage.is_quiet()


def test_chat_templates_stay_in_their_sandbox(stage: Stage, copy_of: Any) -> None:
    model = copy_of("templated")
    (model / "chat_template.jinja").write_text(stage.canaries.template("template"))
    turns = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "Yes."}]
    file = stage.project.root / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(9)))
    config = stage.project.write_config("chats", ("positive",), model_dir=str(model))
    said = ("--set", f'datasets.0.dataset_path="{file}"', "--set", 'datasets.0.messages_field="messages"')
    for words in (("prepare", config, *said), ("generate", model, "Good?", "--chat")):
        done = stage.run(*words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "unsafe" in done.stderr
    stage.is_quiet()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -m imports from the working directory in any case")
def test_processes_of_their_own_leave_them_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes and the launcher, called from the directory of the user's files, with modules of theirs in it."""
    config = stage.project.write_config("two", pipeline_stages=2, max_steps=2)
    monkeypatch.chdir(stage.project.root)
    program = [sys.executable, "-P", "-m", "cadapter"]  # which imports from where the script cadapter does
    monkeypatch.setattr("tests.tiny_project.command", lambda *words: [*program, *map(str, words)])
    done = run("train", config, "--num-gpus", 2, **stage.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    stage.is_quiet()


# ---- that the canaries sing, and that the watch hears them ----------------------------------------------------------


def test_canaries_fire_where_nobody_takes_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries(tmp_path / "fired")
    pickle.loads(canaries.pickled("pickle")).close()
    canaries.torch_archive(tmp_path / "archive.pt", "archive")
    torch.load(tmp_path / "archive.pt", weights_only=False).close()
    exec(canaries.code("code"))
    messages = [{"content": "x"}]
    jinja2.Environment().from_string("{% set os = cycler %}" + canaries.template("template")).render(messages=messages)
    poison_texts(tmp_path, canaries)
    np.load(tmp_path / "array.npy", allow_pickle=True)
    assert {path.name for path in canaries.fired.iterdir()} == {"pickle", "archive", "code", "template", "array.npy"}


HEARD = """
import io, pickle, sys, torch, numpy
for load in (pickle.load, torch.load, lambda file: pickle.Unpickler(file).load()):
    with open(sys.argv[1], "rb") as file:
        try:
            load(file)
        except Exception:
            pass
pickle.loads(pickle.dumps(1))
torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
compile("1", sys.argv[1], "eval")
"""


def test_the_watch_hears_what_it_listens_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries(tmp_path / "fired")
    (tmp_path / "x.bin").write_bytes(canaries.pickled("heard"))
    saved = io.BytesIO()
    torch.save({"a": torch.ones(1)}, saved)
    variables = {"PYTHONPATH": str(WATCHING), "CADAPTER_WATCH_LOG": str(tmp_path / "log"),
                 "CADAPTER_WATCH_ROOT": str(tmp_path.resolve())}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", HEARD, str(tmp_path / "x.bin")], input=saved.getvalue(),
                          env=environment(**variables), capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    heard = {json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()}
    assert heard >= {"open", "pickle.find_class", "pickle.load", "pickle.loads", "pickle.Unpickler",
                     "torch.serialization.load", "torch._weights_only_unpickler.load", "compile"}  # fmt: skip
