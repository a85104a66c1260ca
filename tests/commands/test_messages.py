"""What users read when something is wrong, as part of the interface: every command's typical mistakes, one style.

A message says what is wrong, where (file, line, key, value) and what to do; it is plain text on standard error after
"error: ", without a traceback or a word of Python's or a library's own; the exit code is 2.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from cadapter.cli import COMMANDS, app
from tests.convert.lora_models import save_lora
from tests.steered_models import make_adapter, make_model
from tests.tiny_project import texts, write_jsonl

REMEDY = re.compile(
    r"\b(give|use|choose|set|leave|correct|remove|train|download|convert|make|put|write|merge|see|save|name|split|try|"
    r"copy|change|start|did you mean)\b",
    re.IGNORECASE,
)
"""Words that tell what to do."""
FOREIGN = re.compile(
    r"Traceback|Value error|\[Errno|Error\(|error_code|\bNone\b|<class|object at 0x|pydantic|type=\w+_"
)
"""Words of Python and of libraries."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], prog_name="cadapter")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with names, right and wrong ones."""
    root = tmp_path_factory.mktemp("messages")
    make_model(root / "base")
    make_adapter(root / "adapter", "writes")
    make_adapter(root / "narrow", hidden=16)
    save_lora(root / "base", root / "lora", target_modules=["down_proj"])
    write_jsonl(root / "good.jsonl", texts("positive", 20))
    write_jsonl(root / "bad.jsonl", texts("negative", 20))
    config = f"""model_dir = "{root}/base"
output_dir = "{root}/run"
use_control_adapters = true
lora_weight_decay = 10.0
lr = 1e-3
sequence_len = 64
dtype = "float32"
[[datasets]]
dataset_path = "{root}/good.jsonl"
control_class = 1
"""
    (root / "config.toml").write_text(config)
    (root / "broken.toml").write_text(config.replace("lr = 1e-3", "lr = = 1"))
    (root / "wrong.toml").write_text(config.replace("lr = 1e-3", 'lr = "fast"\nlora_rnk = 3\nepochs = 0'))
    (root / "unquoted.toml").write_text(config.replace(f'"{root}/run"', "run"))
    (root / "layers.toml").write_text(config.replace("lr = 1e-3", 'layers_to_transform = "1:9"\nlr = 1e-3'))
    (root / "few.toml").write_text('model_dir = "x"\n')
    (root / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (root / "line.jsonl").write_text('{"text": "a"}\n{"text"\n{"txt": "b"}\n')
    (root / "field.jsonl").write_text('{"content": "a"}\n')
    (root / "empty.jsonl").write_text("")
    (root / "data.csv").write_text("a,b\n")
    shutil.copytree(root / "adapter", root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    shutil.copytree(root / "adapter", root / "no-json")
    (root / "no-json" / "adapter_config.json").write_text("{oops")
    shutil.copytree(root / "adapter", root / "infinite")
    tensors = load_file(root / "infinite" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, root / "infinite" / "adapter_model.safetensors")
    shutil.copytree(root / "lora", root / "dora")
    settings = json.loads((root / "dora" / "adapter_config.json").read_text())
    (root / "dora" / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    shutil.copytree(root / "base", root / "tokenless")
    for file in (root / "tokenless").glob("token*"):
        file.unlink()
    (root / "not-a-model").mkdir()
    (root / "file.txt").write_text("text")
    run("merge", root / "base", root / "adapter", root / "exists")
    return root


DATA = "datasets.0.dataset_path"
PREPARING = {
    "no such config": (["nowhere.toml"], "nowhere.toml"),
    "a directory for a config": (["base"], "base"),
    "broken TOML": (["broken.toml"], "broken.toml:5"),
    "wrong values": (["wrong.toml"], "wrong.toml:5: lr = \"fast\""),
    "missing keys": (["few.toml"], "output_dir"),
    "not text": (["binary.toml"], "binary.toml:1"),
    "an override without a value": (["config.toml", "--set", "lr"], "--set lr"),
    "an override of nothing": (["config.toml", "--set", "lora_rnk=3"], "lora_rnk"),
    "no such data": (["config.toml", "--set", f'{DATA}="gone.jsonl"'], "gone.jsonl"),
    "a glob of nothing": (["config.toml", "--set", f'{DATA}="gone*.jsonl"'], "gone*.jsonl"),
    "a directory for data": (["config.toml", "--set", f'{DATA}="@base"'], "base"),
    "another format": (["config.toml", "--set", f'{DATA}="@data.csv"'], "data.csv"),
    "empty data": (["config.toml", "--set", f'{DATA}="@empty.jsonl"'], "empty.jsonl"),
    "bad lines": (["config.toml", "--set", f'{DATA}="@line.jsonl"'], "line.jsonl, line 2"),
    "another field": (
        ["config.toml", "--set", f'{DATA}="@field.jsonl"'],
        "field.jsonl: no record has 'text' (text_field = \"text\"); the last one looked at has: content.\n"
        "       Set text_field",
    ),
    "a string without quotes": (["unquoted.toml"], "unquoted.toml:2:14: not valid TOML: Invalid value (a string"),
    "no such choice": (["config.toml", "--set", "activation_checkpointing=fulll"], "no such choice; give \"auto\", "),
    "a model's name": (["config.toml", "--set", "model_dir=gpt2"], "HF_HUB_OFFLINE is set"),
    "a relative model": (["config.toml", "--set", "model_dir=./gone"], "It was looked up from "),
    "no such model": (["config.toml", "--set", 'model_dir="@nowhere"'], "nowhere"),
    "no tokenizer": (["config.toml", "--set", 'model_dir="@tokenless"'], "tokenless"),
    "no chat template": (
        ["config.toml", "--set", 'datasets.0.messages_field="text"', "--set", f'{DATA}="@chats.jsonl"'],
        "chat template",
    ),
}  # fmt: skip
MISTAKES: dict[str, dict[str, tuple[list[str], str]]] = {
    "prepare": {**PREPARING, "a negative number": (["config.toml", "--show", "-1"], "--show")},
    "train": {
        **PREPARING,
        "no such layers": (["layers.toml"], 'layers.toml:5: layers_to_transform = "1:9": "1:9" goes past the last'),
        "no template for samples": (
            ["config.toml", "--set", 'sample_prompts=["a"]', "--set", "sample_chat=true"], "sample_chat"
        ),
        "no config": ([], "config"),
        "no processes": (["config.toml", "--num-gpus", "0"], "--num-gpus"),
        "a node of none": (["config.toml", "--node-rank", "1"], "--node-rank"),
        "no hostfile": (["config.toml", "--hostfile", "gone"], "gone"),
        "not a model": (["config.toml", "--set", 'model_dir="@not-a-model"'], "not-a-model"),
        "output in a file": (["config.toml", "--set", 'output_dir="@file.txt"'], "file.txt"),
        "output of others": (["config.toml", "--set", 'output_dir="@not-ours"'], "config.toml"),
        "stages that do not divide": (["config.toml", "--set", "pipeline_stages=3"], "pipeline_stages"),
    },
    "eval": {
        "no such config": (["nowhere.toml"], "nowhere.toml"),
        "wrong values": (["wrong.toml"], "wrong.toml:5"),
        "not trained": (["config.toml"], "run"),
        "no such adapter": (["config.toml", "--adapter", "nowhere"], "nowhere"),
        "no number": (["config.toml", "--strength", "much"], "--strength"),
    },
    "generate": {
        "no model": (["nowhere", "Once"], "nowhere"),
        "not a model": (["not-a-model", "Once"], "not-a-model"),
        "strength of nothing": (["base", "Once", "--strength", "1"], "--adapter"),
        "two strengths": (["base", "Once", "--adapter", "adapter", "--strength", "1", "--compare"], "--compare"),
        "no such adapter": (["base", "Once", "--adapter", "nowhere"], "nowhere"),
        "another model's adapter": (["base", "Once", "--adapter", "narrow"], "hidden size: 16"),
        "a LoRA": (["base", "Once", "--adapter", "lora"], "lora"),
        "too cold": (["base", "Once", "--temperature", "-1"], "--temperature"),
        "no probability": (["base", "Once", "--top-p", "0"], "--top-p"),
        "no tokens": (["base", "Once", "--max-new-tokens", "0"], "--max-new-tokens"),
        "no number": (["base", "Once", "--seed", "x"], "--seed"),
        "no such device": (["base", "Once", "--device", "abacus"], "--device abacus"),
        "no such dtype": (["base", "Once", "--dtype", "int4"], "--dtype"),
        "no template": (["base", "Once", "--chat"], "chat template"),
        "no strength": (["base", "Once", "--adapter", "adapter", "--strength", "inf"], "strength inf"),
        "no prompt": (["base"], "prompt"),
    },
    "inspect-norms": {
        "no such adapter": (["nowhere"], "nowhere"),
        "not an adapter": (["base"], "adapter_config.json"),
        "a LoRA": (["lora"], "lora"),
        "damaged weights": (["damaged"], "adapter_model.safetensors"),
        "broken JSON": (["no-json"], "adapter_config.json, line 1"),
        "NaN": (["infinite"], "NaN"),
        "another picture": (["adapter", "--plot", "norms.jpg"], "norms.jpg"),
        "below zero": (["adapter", "--fail-above", "-1"], "--fail-above"),
    },
    "to-mult-lora": {
        "no such adapter": (["nowhere", "out"], "nowhere"),
        "a LoRA": (["lora", "out"], "lora"),
        "output is there": (["adapter", "exists"], "exists"),
        "output is the input": (["adapter", "adapter", "--force"], "adapter"),
        "two dials": (["adapter", "out", "--inverse", "--strength", "1"], "--inverse"),
        "no base": (["adapter", "out", "--base", "nowhere"], "nowhere"),
        "verified without a base": (["adapter", "out", "--verify"], "--base"),
        "text without verifying": (["adapter", "out", "--text", "file.txt"], "--text"),
    },
    "to-add-lora": {
        "no base": (["nowhere", "adapter", "out"], "nowhere"),
        "another model's adapter": (["base", "narrow", "out"], "hidden size: 16"),
        "no rank": (["base", "adapter", "out", "--rank", "0"], "rank"),
        "too great a rank": (["base", "adapter", "out", "--rank", "99"], "rank"),
        "changes nothing": (["base", "adapter", "out", "--strength", "0"], "changes nothing"),
        "output is there": (["base", "adapter", "exists"], "exists"),
    },
    "merge": {
        "no base": (["nowhere", "adapter", "out"], "nowhere"),
        "no such adapter": (["base", "nowhere", "out"], "nowhere"),
        "a model for an adapter": (["base", "base", "out"], "This is a model, complete as it is"),
        "DoRA": (["base", "dora", "out"], "DoRA"),
        "strength of a LoRA": (["base", "lora", "out", "--strength", "2"], "Use --scale X"),
        "no number": (["base", "adapter", "out", "--scale", "nan"], "--scale"),
        "two dials": (["base", "adapter", "out", "--scale", "2", "--inverse"], "--scale"),
        "another without a strength": (["base", "adapter", "out", "--also", "adapter"], "--also adapter"),
        "no such device": (["base", "adapter", "out", "--device", "abacus"], "--device abacus"),
        "output is there": (["base", "adapter", "exists"], "exists"),
        "output is others'": (["base", "adapter", "not-ours", "--force"], "not-ours"),
        "output is a file": (["base", "adapter", "file.txt", "--force"], "file.txt"),
        "no such text": (["base", "adapter", "out", "--verify", "--text", "gone.txt"], "gone.txt"),
    },
    "to-gguf": {
        "no such LoRA": (["nowhere", "out.gguf"], "nowhere"),
        "a control adapter": (["adapter", "out.gguf"], "to-add-lora"),
        "no base": (["lora", "out.gguf", "--base", "nowhere"], "nowhere"),
        "output is a directory": (["lora", "exists", "--force"], "exists"),
        "another type": (["lora", "out.gguf", "--outtype", "q2"], "--outtype"),
    },
    "schema": {"too much": (["extra"], "extra")},
    "doctor": {"too much": (["config.toml", "extra"], "extra")},
}  # fmt: skip


def cases() -> list[object]:
    return list(_cases())


def _cases() -> Iterator[object]:
    for command, mistakes in MISTAKES.items():
        for name, (arguments, names) in mistakes.items():
            yield pytest.param(command, arguments, names, id=f"{command}: {name}")
        yield pytest.param(command, ["--no-such-option"], "--no-such-option", id=f"{command}: no such option")
        if command not in ("schema", "doctor", "train"):
            yield pytest.param(command, [], "Missing argument", id=f"{command}: nothing given")


def assert_style(done: Result, names: str) -> None:
    said = done.stderr
    assert done.exit_code == 2, (done.exit_code, done.stdout, said, done.exception)
    assert not FOREIGN.search(said), said
    errors = said[said.index("error: ") :]
    before = said[: said.index("error: ")]
    assert all(line.startswith(("warning: ", "         ", "Token", "loading")) for line in before.splitlines()), said
    lines = errors.splitlines()
    assert all(line.startswith("       ") for line in lines[1:]), said
    assert names in said
    # What to do stands last: in the last line, or after the last sentence of a line of a config.
    assert REMEDY.search(lines[-1]), said
    assert lines[0][7].isupper() or lines[0][7] in "-/0123456789" or re.match(r"error: [\w./-]+", lines[0]), said


@pytest.mark.parametrize(("command", "arguments", "names"), cases())
def test_mistakes_are_told_in_one_style(
    command: str, arguments: list[str], names: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    (root / "not-ours").mkdir(exist_ok=True)
    for name in ("thesis.tex", "config.toml"):
        (root / "not-ours" / name).write_text("precious")
    (root / "chats.jsonl").write_text(
        '{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    given = [each.replace('"@', f'"{root}/') for each in arguments]
    monkeypatch.setattr("sys.argv", ["cadapter", command, *given])
    before = {path.name for path in root.iterdir()}
    assert_style(run(command, *given), names)
    assert {path.name for path in root.iterdir()} - before <= {".cadapter-cache"}


def test_every_command_has_its_mistakes() -> None:
    assert set(MISTAKES) | {"plan"} >= set(COMMANDS)


def test_the_style_is_one_that_can_be_missed() -> None:
    class Said:
        exit_code, stdout, exception = 2, "", None

        def __init__(self, stderr: str) -> None:
            self.stderr = stderr

    assert_style(Said("error: x is wrong.\n       Give y.\n"), "x")  # type: ignore[arg-type]
    for wrong in (
        "error: x is wrong.\n", "error: x: Value error, bad.\n       Give y.\n", "error: x\nGive y.\n",
        "error: z is wrong.\n       Give y.\n", "Traceback\nerror: x is wrong.\n       Give y.\n",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_style(Said(wrong), "x")  # type: ignore[arg-type]
