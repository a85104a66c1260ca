"""What inspect-norms says in words."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from cadapter.adapters.directory import ControlAdapterFiles, control_card, read_control_adapter, write_control_adapter
from cadapter.adapters.factors import LowRank
from cadapter.cli import app
from cadapter.convert.norms import measure, verdict
from tests.reference import naive


def words(adapter) -> str:
    return "\n".join(verdict(adapter, measure(adapter)))


def test_measured_norms_are_those_of_the_full_matrix(model_directory, make_adapter):
    adapter = read_control_adapter(make_adapter(model_directory("llama")))
    measured = measure(adapter)
    assert list(measured) == [0, 1, 2]
    for layer, factors in adapter.layers.items():
        expected = naive.norms(naive.full_matrix(factors.A, factors.B, adapter.scale))
        for name, value in expected.items():
            assert getattr(measured[layer], name) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize(
    ("spectral", "inverse", "message"),
    [
        (0.1, "exact", "Healthy: σ_min"),
        (0.1, "neumann", "Healthy: ‖W‖_F is within the guideline 0.25·√r = 0.5"),
        (0.5, "neumann", "Warning: ‖W‖_F exceeds the guideline"),
        (0.0, "exact", "does nothing"),
        (0.0, "neumann", "does nothing"),
    ],
)
def test_verdicts(spectral, inverse, message, model_directory, make_adapter):
    adapter = make_adapter(model_directory("llama"), spectral=spectral, inverse=inverse)
    assert message in words(read_control_adapter(adapter))


def rank_one(coefficient: float) -> LowRank:
    """Factors of ``coefficient·u·uᵀ``, embedded in rank 4 with scale ½."""
    A, B = torch.zeros(4, 32), torch.zeros(32, 4)
    A[0, 5], B[5, 0] = 1.0, 2 * coefficient
    return LowRank(A, B)


@pytest.mark.parametrize(
    ("coefficient", "inverse", "message"),
    [
        (-0.95, "exact", "Warning: σ_min(I + W) is at least 0.05 (layer 1), so the inverse magnifies up to 20×"),
        # 0.66665 and 1.50004: bounds are rounded to where they hold
        (-0.33335, "exact", "Healthy: σ_min(I + W) is at least 0.666 (layer 1), so the inverse magnifies up to 1.51×"),
        (-1.0, "exact", "I + W of layer 1 is singular"),
        (-1.0, "neumann", "diverges in layers 1 "),
        (-2.0, "neumann", "diverges in layers 1 "),
        (0.0, "exact", "W = 0 in layers 1"),
    ],
)
def test_verdicts_on_one_bad_layer(coefficient, inverse, message, model_directory, make_adapter):
    adapter = read_control_adapter(make_adapter(model_directory("llama"), spectral=0.05, inverse=inverse))
    adapter.layers[1] = rank_one(coefficient)
    assert message in words(adapter)


def test_a_table_tells_almost_one_from_one(tmp_path):
    place = tmp_path / "adapter"
    layers = {0: rank_one(1.0003), 1: rank_one(0.0)}
    files = ControlAdapterFiles(path=place, rank=4, alpha=2.0, layers=layers, site="block", base_model_type="llama")
    place.mkdir()
    write_control_adapter(place, files, control_card(files))
    done = CliRunner().invoke(app, ["inspect-norms", str(place), "--fail-above", "1"])
    assert done.exit_code == 1
    first, second = (line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["0"], ["1"]))
    assert first[:5] == ["0", "1.000", "1.000", "1.000", "1.000"]
    assert second == ["1", "0", "0", "0", "1.000", "0", "0", "0"]
    assert "‖W‖₂ exceeds 1 in 1 of 2 layers: 1.000 in layer 0." in done.stderr
