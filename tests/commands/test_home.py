"""``~`` is the user's home directory wherever a path is given, also where no shell has seen to it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cadapter
from cadapter.cli import app
from cadapter.config import load_config
from tests.steered_models import make_adapter, make_model


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    house = tmp_path_factory.mktemp("house")
    make_adapter(house / "adapter", "writes")
    make_model(house / "base")
    return house


@pytest.fixture(autouse=True)
def at_home(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(house))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("to-mult-lora ~/adapter ~/mult --base ~/base", "mult/adapter_config.json"),
        ("to-add-lora ~/base ~/adapter ~/add", "add/adapter_config.json"),
        ("inspect-norms ~/adapter --json ~/norms.json", "norms.json"),
        ("merge ~/base ~/adapter ~/merged --also ~/adapter=0.5", "merged/config.json"),
    ],
)
def test_commands(house: Path, tmp_path: Path, line: str, written: str) -> None:
    done = CliRunner().invoke(app, shlex.split(line))
    assert done.exit_code == 0, done.output
    assert (house / written).is_file()
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_not_replaced(house: Path) -> None:
    done = CliRunner().invoke(app, ["merge", "~/base", "~/adapter", str(house / "base"), "--force"])
    assert done.exit_code == 2
    assert "is or holds the input" in done.stderr


def test_the_config(house: Path, tmp_path: Path) -> None:
    keys = ("model_dir", "output_dir", "init_from", "cache_dir")
    lines = [f'{key} = "~/{key}"' for key in keys] + ["lr = 1e-3", "sequence_len = 64"]
    file = tmp_path / "config.toml"
    file.write_text("\n".join([*lines, "[[datasets]]", 'dataset_path = "~/good/*.txt"']))
    config = load_config(file, ['output_dir="~/else"'])
    assert [getattr(config, key) for key in keys] == [
        str(house / name) for name in ("model_dir", "else", "init_from", "cache_dir")
    ]
    assert config.datasets[0].dataset_path == str(house / "good" / "*.txt")


def test_the_interface_of_python(house: Path, tmp_path: Path) -> None:
    cadapter.load("~/base", "~/adapter").save_adapter("~/saved")
    assert (house / "saved" / "adapter_config.json").is_file()
    assert list(tmp_path.iterdir()) == []
