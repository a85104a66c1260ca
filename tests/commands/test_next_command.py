"""Every command ends with a summary and the next command to try, which works as it is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cadapter.adapters.layer_facts import describe_layers
from cadapter.cli import app
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from tests.steered_models import make_adapter, make_model
from tests.tiny_models import LAYERS

FIRST = {
    "inspect-norms": ("inspect-norms", "adapter"),
    "to-mult-lora": ("to-mult-lora", "adapter", "mult lora"),
    "to-add-lora": ("to-add-lora", "base", "adapter", "add lora"),
}
LAST = {
    "inspect-norms": "python convert_hf_to_gguf.py merged --outfile",
    "to-mult-lora": "python convert_hf_to_gguf.py 'mult lora-merged' --outfile",
    "to-add-lora": "llama-cli -m base.gguf --lora 'add lora.gguf'",
}
"""Where the way ends that begins so: in llama.cpp."""


@pytest.mark.parametrize("start", FIRST)
def test_the_next_command_can_be_given_as_it_is(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_model(Path("base"))
    facts = describe_layers(Checkpoint(base), FAMILIES["llama"], range(LAYERS))
    make_adapter(Path("adapter"), "writes", facts=facts, base_model_name_or_path="base")
    words, seen = list(FIRST[start]), []
    while words[0] in ("inspect-norms", "generate", "merge", "to-mult-lora", "to-add-lora", "to-gguf"):
        seen.append(words[0])
        short = ["--max-new-tokens", "2"] if words[0] == "generate" else []
        done = CliRunner().invoke(app, [*words, *short], prog_name="cadapter")
        assert done.exit_code == 0, (words, done.stderr)
        last = done.stdout.splitlines()[-1]
        if words[0] == "generate":
            assert done.stdout.splitlines()[-2] == "--- next ---"
        else:
            assert last.startswith("Next: "), done.stdout
        command = last.removeprefix("Next: ")
        words = shlex.split(command)
        words = words[1:] if words[0] == "cadapter" else words
        assert len(seen) < 8
    assert command.startswith(LAST[start])
    assert len(seen) >= 2


def next_after(model: Path) -> str:
    words = ["generate", str(model), "Once", "--max-new-tokens", "1"]
    done = CliRunner().invoke(app, words, prog_name="cadapter")
    assert done.exit_code == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_after_a_model_alone_comes_its_training_or_its_use(tmp_path: Path) -> None:
    """A base is trained from; what was merged or fine-tuned is used, as llama.cpp reads it."""
    base = make_model(tmp_path / "base")
    assert next_after(base) == "cadapter train config.toml"
    (base / "README.md").write_text("# A base\n")
    assert next_after(base) == "cadapter train config.toml"
    make_adapter(tmp_path / "adapter", "writes")
    merged = tmp_path / "my model"
    words = ["merge", str(base), str(tmp_path / "adapter"), str(merged)]
    assert CliRunner().invoke(app, words, prog_name="cadapter").exit_code == 0
    assert next_after(merged) == f"python convert_hf_to_gguf.py '{merged}' --outfile 'my model.gguf'"
    run = tmp_path / "run"
    base.rename(tmp_path / "run-final")
    run.mkdir()
    (run / "resolved.json").write_text("{}")
    final = (tmp_path / "run-final").rename(run / "final")
    assert next_after(final) == f"python convert_hf_to_gguf.py {final} --outfile final.gguf"


def test_no_option_is_without_words() -> None:
    group = typer.main.get_command(app)
    silent = [
        f"{name} {parameter.name}"
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and not getattr(parameter, "help", None)
    ]
    assert silent == []
