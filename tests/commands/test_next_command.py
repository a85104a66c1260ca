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
    "to-add-lora": ("to-add-lora", "base", "adapter", "add-lora"),
}
LAST = {"inspect-norms": "train", "to-mult-lora": "train", "to-add-lora": "llama-cli"}
"""Where the way ends that begins so: with the next adapter, or in llama.cpp."""


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
        words = shlex.split(last.removeprefix("Next: "))
        words = words[1:] if words[0] == "cadapter" else words
        assert len(seen) < 8
    assert words[0] == LAST[start]
    assert len(seen) >= 2


def test_no_option_is_without_words() -> None:
    group = typer.main.get_command(app)
    silent = [
        f"{name} {parameter.name}"
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and not getattr(parameter, "help", None)
    ]
    assert silent == []
