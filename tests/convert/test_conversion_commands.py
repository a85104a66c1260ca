"""The converting commands as a user runs them: exit codes, what is printed where, and what is left on disk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cadapter.cli import app
from cadapter.models.checkpoint import Checkpoint


def run(*arguments):
    """Run ``cadapter`` in this process; returns click's result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(model_directory):
    return model_directory("llama")


@pytest.fixture
def adapter(base, make_adapter):
    return make_adapter(base)


def test_inspect_norms_prints_a_row_for_each_layer(adapter):
    result = run("inspect-norms", adapter)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines if line[0].isdigit()] == ["0", "1", "2"]
    assert all(line[2] == "0.5000" for line in lines if line[0].isdigit())  # ‖W‖₂ as the adapter was made
    assert "Healthy" in result.stdout


def test_inspect_norms_as_json(adapter, tmp_path):
    printed = run("inspect-norms", adapter, "--json", "-")
    assert printed.exit_code == 0
    content = json.loads(printed.stdout)
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2]
    assert content["max"]["spectral"] == pytest.approx(0.5, rel=1e-6)
    assert run("inspect-norms", adapter, "--json", tmp_path / "norms.json").exit_code == 0
    assert json.loads((tmp_path / "norms.json").read_text()) == content


def test_inspect_norms_of_a_symmetric_adapter_shows_how_orthonormal_it_is(base, make_adapter):
    adapter = make_adapter(base, form="symmetric")
    table = run("inspect-norms", adapter)
    assert "‖QᵀQ-I‖₂" in table.stdout
    assert "symmetric" in table.stdout
    content = json.loads(run("inspect-norms", adapter, "--json", "-").stdout)
    assert 0 < content["max"]["orthogonality_error"] < 1e-6  # Q is float32
    assert content["max"]["spectral"] == pytest.approx(0.5, rel=1e-6)


def test_inspect_norms_draws_a_picture(adapter, tmp_path):
    from PIL import Image

    picture = tmp_path / "norms.png"
    result = run("inspect-norms", adapter, "--plot", picture)
    assert result.exit_code == 0, result.stderr
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # lines in several colours, not an empty frame
    result = run("inspect-norms", adapter, "--plot", tmp_path / "norms.pdf")
    assert result.exit_code == 2
    assert "ends in .png" in result.stderr


def test_inspect_norms_fails_above(adapter):
    assert run("inspect-norms", adapter, "--fail-above", "0.51").exit_code == 0
    result = run("inspect-norms", adapter, "--fail-above", "0.49")
    assert result.exit_code == 1
    assert "‖W‖₂ exceeds 0.49 in 3 of 3 layers" in result.stderr


def test_the_commands_end_to_end(base, adapter, tmp_path):
    result = run("to-mult-lora", adapter, tmp_path / "mult", "--strength", "-0.5")
    assert result.exit_code == 0, result.stderr
    assert "6 modules of 3 layers, rank 4" in result.stdout
    assert "strength -0.5" in result.stdout
    result = run("to-add-lora", base, adapter, tmp_path / "add", "--rank", "2", "--inverse")
    assert result.exit_code == 0, result.stderr
    assert "what is kept of ‖ΔW‖²" in result.stdout
    assert "rank 2" in result.stdout
    further = ("--also", f"{adapter}=-1", "--dtype", "bfloat16")
    result = run("merge", base, adapter, tmp_path / "merged", "--strength", "2", *further)
    assert result.exit_code == 0, result.stderr
    assert "6 tensors changed" in result.stdout
    merged = Checkpoint(tmp_path / "merged")
    assert {merged.dtype(name) for name in merged.names()} == {"BF16"}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "strength 2" in card
    assert "strength -1" in card
    assert result.stderr == ""


def test_an_approximation_is_said_in_one_line(base, make_adapter, tmp_path):
    adapter = make_adapter(base, site="block")
    for number, command in enumerate((("merge", base), ("to-add-lora", base), ("to-mult-lora",))):
        result = run(*command, adapter, tmp_path / f"out{number}")
        assert result.exit_code == 0
        (line,) = result.stderr.splitlines()
        assert "approximation" in line


def test_an_existing_output_needs_force(base, adapter, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "precious").write_text("x")
    for command in (("merge", base), ("to-add-lora", base), ("to-mult-lora",)):
        result = run(*command, adapter, output)
        assert result.exit_code == 2
        assert "already exists" in result.stderr
        assert (output / "precious").exists()
    (output / "precious").unlink()  # what --force replaces: tests/commands/test_force.py
    assert run("merge", base, adapter, output, "--force").exit_code == 0
    assert (output / "config.json").exists()


def test_force_does_not_remove_an_input(base, adapter):
    for command in (("merge", base, adapter, base), ("to-add-lora", base, adapter, adapter.parent),
                    ("to-mult-lora", adapter, adapter)):  # fmt: skip
        result = run(*command, "--force")
        assert result.exit_code == 2
        assert "would remove" in result.stderr
    (adapter / "inside").mkdir()
    result = run("merge", base, adapter, adapter / "inside", "--force")
    assert result.exit_code == 2
    assert "is part of the input" in result.stderr
    assert Checkpoint(base).names()
    assert (adapter / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "BASE", "ADAPTER", "OUT", "--scale", "2", "--inverse"), "exclude one another"),
        (("merge", "BASE", "ADAPTER", "OUT", "--also", "ADAPTER"), "DIR=T"),
        (("merge", "BASE", "ADAPTER", "OUT", "--also", "ADAPTER=much"), "DIR=T"),
        (("merge", "BASE", "ADAPTER", "OUT", "--also", "nowhere=1"), "nowhere is not a directory"),
        (("merge", "BASE", "ADAPTER", "OUT", "--device", "tpu9"), "--device tpu9"),
        (("merge", "BASE", "ADAPTER", "OUT", "--multiplicative"), "leave --multiplicative out"),
        (("merge", "BASE", "BASE", "OUT"), "not an adapter directory"),
        (("merge", "ADAPTER", "ADAPTER", "OUT"), "not a model directory"),
        (("merge", "nowhere", "ADAPTER", "OUT"), "nowhere is not a directory"),
        (("to-add-lora", "NARROW", "ADAPTER", "OUT"), "another hidden size"),
        (("to-add-lora", "BASE", "ADAPTER", "OUT", "--rank", "9"), "has rank 4"),
        (("to-mult-lora", "ADAPTER", "OUT", "--strength", "nan"), "not a finite number"),
        (("inspect-norms", "nowhere"), "nowhere is not a directory"),
        (("inspect-norms", "ADAPTER", "--fail-above", "nan"), "a number of at least 0"),
        (("merge", "BASE", "ADAPTER", "OUT", "--scale", "nan"), "--scale nan: give a finite number"),
    ],
)
def test_mistakes_are_told_in_plain_lines(arguments, message, base, adapter, model_directory, tmp_path):
    names = {"BASE": base, "ADAPTER": adapter, "OUT": tmp_path / "out", "NARROW": model_directory("llama-narrow")}
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("command", ["inspect-norms", "to-mult-lora", "to-add-lora", "merge", "to-gguf"])
def test_help_has_examples_and_imports_no_torch(command):
    code = (
        "import sys; sys.argv = ['cadapter', sys.argv[1], '--help']\n"
        "from cadapter.cli import app\n"
        "try: app(prog_name='cadapter')\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"cadapter {command} ") >= 3  # usage and two examples
