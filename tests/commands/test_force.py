"""``--force`` replaces what cadapter wrote, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cadapter.cli import app
from tests.convert.lora_models import save_lora
from tests.steered_models import make_adapter, make_model
from tests.tiny_project import listing


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("force") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", "writes").path


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path) -> Path:
    assert run("merge", base, adapter, base.parent / "merged").exit_code == 0
    return base.parent / "merged"


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")


FOREIGN = {
    "a home directory": ["Documents/letter.txt", ".bashrc", "config.json"],
    "a project": ["config.toml", "good.jsonl"],
    "a folder of runs": ["run/final/adapter_config.json"],
    "weights of something else": ["weights.safetensors"],
    "a lone config": ["config.json"],
}


@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_directory_that_cadapter_did_not_write_stays(base, adapter, tmp_path, names) -> None:
    output = tmp_path / "output"
    fill(output, names)
    before = listing(tmp_path)
    for command in (("merge", base), ("to-add-lora", base), ("to-mult-lora",)):
        done = run(*command, adapter, output, "--force")
        assert done.exit_code == 2
        assert f"error: {output} was not written by cadapter" in done.stderr
        assert "Choose another output" in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("extra", ["notes.txt", "thesis/chapter1.tex", "model.py"])
def test_what_was_put_into_a_model_later_is_not_lost(base, adapter, merged, tmp_path, extra) -> None:
    output = tmp_path / "output"
    shutil.copytree(merged, output)
    fill(output, [extra])
    done = run("merge", base, adapter, output, "--force")
    assert done.exit_code == 2
    assert f"holds {extra.split('/')[0]}" in done.stderr
    assert (output / extra).read_text() == "precious"


def test_what_was_put_into_a_run_later_is_not_lost(base, adapter, tmp_path) -> None:
    output = tmp_path / "output"
    fill(output, ["config.toml", "resolved.json", "best/notes.txt"])
    done = run("to-mult-lora", adapter, output, "--base", base, "--force")
    assert (done.exit_code, "holds best/notes.txt" in done.stderr) == (2, True)
    assert (output / "best" / "notes.txt").read_text() == "precious"


def test_a_file_in_the_place_of_a_directory_stays(base, adapter, tmp_path) -> None:
    output = tmp_path / "output"
    output.write_text("precious")
    done = run("merge", base, adapter, output, "--force")
    assert (done.exit_code, "is a file" in done.stderr) == (2, True)
    assert output.read_text() == "precious"


def test_only_a_gguf_file_is_replaced_by_one(base, tmp_path) -> None:
    lora, output = save_lora(base, tmp_path / "lora", target_modules=["down_proj"]), tmp_path / "lora.gguf"
    output.write_text("precious")
    done = run("to-gguf", lora, output, "--force")
    assert (done.exit_code, "is no GGUF file" in done.stderr) == (2, True)
    assert output.read_text() == "precious"
    output.unlink()
    assert run("to-gguf", lora, output).exit_code == 0
    assert run("to-gguf", lora, output, "--force").exit_code == 0


@pytest.mark.parametrize("kind", ["nothing in it", "a model", "an adapter", "a lora", "a run"])
def test_what_cadapter_wrote_is_replaced(base, adapter, merged, tmp_path, kind) -> None:
    output = tmp_path / "output"
    if kind == "a model":
        shutil.copytree(merged, output)
    elif kind == "an adapter":
        shutil.copytree(adapter, output)
    elif kind == "a lora":
        assert run("to-add-lora", base, adapter, output).exit_code == 0
    else:
        output.mkdir()
    if kind == "a run":
        fill(
            output,
            [
                "config.toml",
                "resolved.json",
                "metrics.jsonl",
                "final/README.md",
                ".best.removed-0123abcd/x",
                "logs/events.out.tfevents.1",
            ],
        )
        shutil.copytree(adapter, output / "epoch12")
    assert run("to-mult-lora", adapter, output, "--base", base, "--force").exit_code == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
