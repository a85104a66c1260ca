"""Models that bring Python code of their own: used where it is asked for, refused in plain words where it is not.

The model is one of transformers' Llamas under a type that transformers does not know, and so is its tokenizer; each of
their files leaves a trace where it is run.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import cadapter
from cadapter.data import Tokenizer
from cadapter.doctor.places import check_config
from cadapter.errors import UsageError
from cadapter.models.attach import load_causal_lm
from cadapter.models.checkpoint import Checkpoint, load_model_config
from cadapter.models.loading import CausalLM
from cadapter.models.own_code import code_files
from cadapter.training.run_directory import RunDirectory
from tests.forked_commands import call, run_all, run_all_well
from tests.tiny_project import Project, make_project, metrics, run

pytestmark = pytest.mark.usefixtures("modules_here")

TRACE = "import os\nwith open(os.environ['OWN_CODE_RAN'], 'a') as trace:\n    trace.write({name!r})\n"
CODE = {
    "configuration_mine": """
from transformers import LlamaConfig


class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine": """
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from .configuration_mine import MineConfig
from .scaling_mine import FACTOR


class MineModel(LlamaModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm.variance_epsilon = config.rms_norm_eps * FACTOR


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MineModel(config)
        self.post_init()
""",
    "scaling_mine": "FACTOR = 1000.0\n",
    "tokenization_mine": """
from transformers import PreTrainedTokenizerFast


class MineTokenizerFast(PreTrainedTokenizerFast):
    def mine(self):
        return True
""",
}
CODE_FILES = {f"{name}.py" for name in CODE}


def give_code(model: Path) -> None:
    """Turn a saved Llama into a model of a type that its own code alone knows."""
    for name, text in CODE.items():
        (model / f"{name}.py").write_text(TRACE.format(name=name + "\n") + text)
    (model / "unrelated.py").write_text("raise SystemExit('nobody asked for this file')\n")
    added: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "mine",
            "architectures": ["MineForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_mine.MineConfig",
                "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "MineTokenizerFast",
            "auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizerFast"]},
        },
    }
    for file, keys in added.items():
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**content, **keys}))


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the environment: a cache of modules with nothing in it, and where the code leaves its trace."""
    root = tmp_path_factory.mktemp("modules")
    return {"HF_MODULES_CACHE": str(root / "cache"), "OWN_CODE_RAN": str(root / "ran")}


@pytest.fixture(scope="module")
def modules_here(variables: dict[str, str]) -> Any:
    """The same in this process, where transformers has read its variables already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_CODE_RAN", variables["OWN_CODE_RAN"])
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", variables["HF_MODULES_CACHE"])
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = make_project(tmp_path_factory.mktemp("own") / "user", documents=40)
    give_code(made.root / "model")
    return made


KEYS: dict[str, Any] = {"max_steps": 3, "eval_fraction": 0.2, "evals_per_run": 1}


@pytest.fixture(scope="module")
def trained(project: Project, variables: dict[str, str]) -> Project:
    """The project with a run in run/, trained by two processes as two stages, and the same by one in alone/."""
    two = project.write_config("run", **KEYS, trust_remote_code=True, pipeline_stages=2)
    one = project.write_config("alone", **KEYS, trust_remote_code=True)
    both, alone = run_all(call("train", two, processes=2), call("train", one), **variables)
    for done in (both, alone):
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line for line in done.stderr.splitlines() if "is run" in line]
        (line,) = said
        assert line.startswith(f"warning: Code of {project.root / 'model'} is run (configuration_mine.py, ")
        assert "Models of type 'mine' are in no table" in done.stdout + done.stderr
    return project


def theirs(directory: Path) -> Any:
    """The model as transformers gives it."""
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()


IDS = torch.arange(4, 60).view(2, 28)


@torch.no_grad()
def test_it_computes_what_transformers_computes(project: Project) -> None:
    model = project.root / "model"
    expected = theirs(model)(IDS).logits
    plain = shutil.copytree(model, project.root / "plain")
    content = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**content, "model_type": "llama", "auto_map": {}}))
    assert (theirs(plain)(IDS).logits - expected).abs().max() > 1e-3  # the code makes a difference
    checkpoint = Checkpoint(model, trust_remote_code=True)
    assert torch.equal(load_causal_lm(checkpoint, torch.float32, "cpu")(IDS).logits, expected)
    parts = CausalLM(checkpoint, torch.float32)
    embedding, norm = parts.embedding(), parts.final_norm()
    hidden = embedding(IDS) * parts.embedding_scale
    for index, arguments in enumerate(parts.block_arguments(IDS.shape[1])):
        hidden = parts.block(index)(hidden, **arguments)
    found = norm(hidden) @ parts.head_weight(embedding).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32, products in another order


def test_two_stages_train_what_one_process_trains(trained: Project) -> None:
    one, two = (metrics(trained.root / name) for name in ("alone", "run"))
    assert len(one) == len(two) == 3
    for ours, other in zip(one, two, strict=True):
        assert ours["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


def test_the_tokenizer_is_of_its_class(project: Project) -> None:
    tokenizer = Tokenizer(project.root / "model", trust_remote_code=True)
    assert tokenizer.fast.mine()
    text = "It was the best of films."
    expected = AutoTokenizer.from_pretrained(project.root / "model", trust_remote_code=True)
    assert tokenizer.encode([text])[0].tolist() == expected(text, add_special_tokens=False).input_ids


@torch.no_grad()
def test_commands_with_the_flag(trained: Project, variables: dict[str, str], tmp_path: Path) -> None:
    root, trust = trained.root, "--trust-remote-code"
    base, adapter, config = root / "model", root / "run" / "final", root / "run.toml"
    outputs = run_all_well(
        call("prepare", config),
        call("train", config, "--dry-run", "--force", "--set", "pipeline_stages=1"),
        call("plan", config),
        call("eval", config, "--set", "pipeline_stages=1", "--json", tmp_path / "scores.json"),
        call("generate", base, "The film", "--adapter", adapter, "--max-new-tokens", 4, trust),
        call("to-mult-lora", adapter, tmp_path / "mult", "--base", base, "--verify", trust),
        call("to-add-lora", base, adapter, tmp_path / "lora", "--verify", trust),
        call("merge", base, adapter, tmp_path / "merged", "--verify", "--writers", "all", trust),
        **variables,
    )
    assert trust in outputs[-1].splitlines()[-1]
    merged = tmp_path / "merged"
    assert {file.name for file in merged.glob("*.py")} == CODE_FILES
    given = theirs(merged)
    assert type(given).__name__ == "MineForCausalLM"
    with pytest.raises(UsageError, match="not run unasked"):
        cadapter.load(base, adapter)
    steered: Any = cadapter.load(base, adapter, dtype="float32", device="cpu", trust_remote_code=True)
    torch.testing.assert_close(given(IDS).logits, steered(IDS).logits, rtol=0, atol=1e-2)


def test_full_fine_tuning_writes_its_code_too(project: Project, variables: dict[str, str]) -> None:
    without = {"use_control_adapters": False, "lora_weight_decay": None, "full_fine_tune": True, "lora_rank": None,
               "checkpoint_interval_steps": 2}  # fmt: skip
    config = project.write_config("full", ("positive",), **{**KEYS, **without}, trust_remote_code=True)
    again = ("--resume-from-checkpoint", "--set", "max_steps=4")
    _, said, _ = run_all_well(call("train", config), call("train", config, *again), call("eval", config), **variables)
    assert "Resuming from" in said  # a checkpoint, which is a model with code of its own
    final = project.root / "full" / "final"
    assert {file.name for file in final.glob("*.py")} == CODE_FILES
    assert RunDirectory(project.root / "full").foreign() == []  # that code is no file of the user's
    assert type(theirs(final)).__name__ == "MineForCausalLM"


def test_without_it_every_command_refuses(trained: Project, variables: dict[str, str], tmp_path: Path) -> None:
    root = trained.root
    base, adapter, out = root / "model", root / "run" / "final", tmp_path / "out"
    config, two = root / "alone.toml", root / "run.toml"
    plain = ("--set", "trust_remote_code=false")
    run_all_well(call("to-add-lora", base, adapter, tmp_path / "lora", "--trust-remote-code"), **variables)
    refused = [
        call("prepare", config, *plain),
        call("train", config, "--dry-run", *plain, "--set", f'output_dir="{out}"'),
        call("train", two, *plain, "--set", f'output_dir="{out}"', processes=2),
        call("plan", config, *plain),
        call("eval", config, *plain),
        call("generate", base, "The film"),
        call("generate", base, "The film", "--adapter", adapter),
        call("to-mult-lora", adapter, out, "--base", base),
        call("to-add-lora", base, adapter, out),
        call("merge", base, adapter, out),
    ]
    trace = Path(variables["OWN_CODE_RAN"])
    before = trace.read_text()
    for words, done in zip(refused, run_all(*refused, **variables), strict=True):
        assert done.returncode == 2, f"{words}\n{done.stdout}{done.stderr}"
        said = done.stderr
        assert re.search(r"model/(tokenizer_)?config\.json cannot be used: it needs code of the model's own", said), (
            said
        )
        assert re.search(r"\((configuration_mine\.py, modeling_mine\.py|tokenization_mine\.py)\)", said)
        assert "set trust_remote_code = true" in said
        assert "--trust-remote-code" in said
        assert f"This runs code from {base}, which can do all that you can" in said
    (gguf,) = run_all(call("to-gguf", tmp_path / "lora", tmp_path / "lora.gguf", "--base", base), **variables)
    assert gguf.returncode == 2
    assert "llama.cpp has no architecture for such models" in gguf.stderr
    assert trace.read_text() == before
    assert not out.exists()


def edited(project: Project, directory: Path, **auto_map: Any) -> Path:
    model = shutil.copytree(project.root / "model", directory)
    content = json.loads((model / "config.json").read_text())
    content["auto_map"].update(auto_map)
    (model / "config.json").write_text(json.dumps(content))
    return model


@pytest.mark.parametrize(
    "reference", ["someone/else--modeling_mine.Mine", "../modeling_mine.Mine", "sub/x.Mine", "mine", 3, ["a.b"]]
)
def test_code_of_another_place_is_refused(project: Project, tmp_path: Path, reference: Any) -> None:
    model = edited(project, tmp_path / "model", AutoModelForCausalLM=reference)
    with pytest.raises(UsageError, match=r"only FILE\.CLASS of a file in the model's own directory is run"):
        load_model_config(model, trust_remote_code=True)


def test_code_that_is_not_all_there_or_elsewhere_is_refused(project: Project, tmp_path: Path) -> None:
    model = edited(project, tmp_path / "model")
    (model / "modeling_mine.py").unlink()
    with pytest.raises(UsageError, match=r"modeling_mine\.py is not there"):
        load_model_config(model, trust_remote_code=True)
    (model / "modeling_mine.py").symlink_to(project.root / "model" / "modeling_mine.py")
    with pytest.raises(UsageError, match="is a link that leads out of its directory"):
        load_model_config(model, trust_remote_code=True)
    (model / "modeling_mine.py").unlink()
    (model / "sub").mkdir()
    shutil.copy(project.root / "model" / "scaling_mine.py", model / "sub" / "x.py")
    (model / "modeling_mine.py").write_text("from .sub.x import FACTOR\n")
    with pytest.raises(UsageError, match=r"code of the model, cannot be read|only code directly beside the model"):
        load_model_config(model, trust_remote_code=True)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("configuration_mine", "from transformers import NothingOfTheKind", "NothingOfTheKind"),
        ("modeling_mine", "import no_such_package", "no_such_package"),
        ("modeling_mine", "raise RuntimeError('at import')", "RuntimeError: at import"),
        ("scaling_mine", "FACTOR = None", "TypeError"),
        ("modeling_mine", "MineForCausalLM.__init__ = lambda *_: [][0]", "IndexError"),
    ],
)
def test_code_that_fails_is_told(project: Project, tmp_path: Path, file: str, line: str, said: str) -> None:
    model = edited(project, tmp_path / "model")
    with open(model / f"{file}.py", "a") as code:
        code.write(f"\n\n{line}\n")
    with pytest.raises(UsageError, match=said) as refused:
        CausalLM(Checkpoint(model, trust_remote_code=True), torch.float32)
    assert str(model) in str(refused.value)
    with pytest.raises(UsageError, match=re.escape(str(model))):
        load_causal_lm(Checkpoint(model, trust_remote_code=True), torch.float32, "cpu")


def test_one_process_after_the_other_imports_it(project: Project, variables: dict[str, str], tmp_path: Path) -> None:
    """Another that holds the lock is waited for; what it is for is a file that is still being written."""
    done = threading.Event()

    def load() -> None:
        load_model_config(project.root / "model", trust_remote_code=True)
        done.set()

    with open(Path(variables["HF_MODULES_CACHE"]) / ".cadapter-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=load)
        thread.start()
        assert not done.wait(0.5)
    thread.join(60)
    assert done.is_set()


def test_a_cache_that_cannot_be_written_is_told(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    for load in (Checkpoint, lambda *arguments: Tokenizer(*arguments).fast):
        with pytest.raises(UsageError, match="Name another directory in the variable HF_MODULES_CACHE"):
            load(project.root / "model", True)


def test_doctor_tells_of_it(project: Project) -> None:
    (without,) = [each for each in check_config(project.write_config("checked")) if each.name == "model"]
    assert without.status == "broken"
    assert "it needs code of the model's own (configuration_mine.py, modeling_mine.py)" in without.text
    allowed = project.write_config("checked", trust_remote_code=True)
    (warned,) = [each for each in check_config(allowed) if each.status == "warning" and "ode of" in each.text]
    assert warned.name == "trust_remote_code"


@pytest.mark.slow
def test_the_launcher_starts_processes_that_run_it(project: Project, variables: dict[str, str], tmp_path: Path) -> None:
    """From an empty cache of modules, which all of them fill at once."""
    config = project.write_config("launched", **KEYS, trust_remote_code=True, pipeline_stages=2)
    done = run("train", config, "--num-gpus", 2, **{**variables, "HF_MODULES_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("is run") == 1


def test_a_type_that_transformers_knows_is_its_own(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = edited(project, tmp_path / "model", AutoModelForCausalLM="someone/else--modeling_mine.Mine")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "model_type": "llama"}))
    checkpoint = Checkpoint(model, trust_remote_code=True)
    assert type(load_causal_lm(checkpoint, None, "cpu")).__module__.startswith("transformers.models.llama")
    assert "is not run: transformers has its own for type 'llama'" in capsys.readouterr().err
    assert [file.name for file in code_files(model)] == ["tokenization_mine.py"]
