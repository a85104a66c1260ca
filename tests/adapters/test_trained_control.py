"""What follows an optimiser step: decay, norms and the stages' reports, against full matrices in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cadapter.adapters.control import ControlSettings, GeneralAdapter
from cadapter.adapters.trained_control import TrainedControlAdapters
from tests.reference import naive

HIDDEN, RANK = 40, 4
LAYERS = (1, 2, 5, 6)
SETTINGS = ControlSettings(RANK, math.sqrt(RANK))
CPU = torch.device("cpu")


def random_adapters(layers: tuple[int, ...] = LAYERS, settings: ControlSettings = SETTINGS) -> list[GeneralAdapter]:
    """One adapter for each layer, the same for the same layer, with norms that differ from layer to layer."""
    adapters = []
    for layer in layers:
        adapter = GeneralAdapter(HIDDEN, layer, settings, seed=3)
        generator = torch.Generator().manual_seed(layer)
        adapter.control_B.data.normal_(std=0.1 * (layer + 1), generator=generator)
        adapters.append(adapter)
    return adapters


def full(adapter: GeneralAdapter) -> Tensor:
    """W [H, H] in float64."""
    return naive.full_matrix(adapter.control_A.detach(), adapter.control_B.detach(), SETTINGS.scale)


def trained(adapters: list[GeneralAdapter], decay: float) -> TrainedControlAdapters:
    return TrainedControlAdapters(adapters, SETTINGS, LAYERS, decay, CPU)


def test_parameters_have_the_names_of_their_layers():
    adapters = random_adapters()
    named = trained(adapters, 0.0).parameters()
    assert list(named) == [f"layers.{layer}.control_{factor}" for layer in LAYERS for factor in "AB"]
    assert named["layers.5.control_A"] is adapters[2].control_A
    assert named["layers.5.control_B"] is adapters[2].control_B


@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 10.0), (1e-2, 5.0)])
def test_decay_is_a_gradient_step_of_half_the_squared_frobenius_norm(lr, decay):
    adapters = random_adapters()
    before = [(a.control_A.detach().clone(), a.control_B.detach().clone()) for a in adapters]
    report = trained(adapters, decay).after_step(lr)
    assert report[:, -1].count_nonzero() == 0  # these steps are small enough for the bound
    for adapter, (A, B) in zip(adapters, before, strict=True):
        grad_A, grad_B = naive.decay_gradients(A, B, SETTINGS.scale, decay)
        for found, old, gradient in ((adapter.control_A, A, grad_A), (adapter.control_B, B, grad_B)):
            expected = old.double() - lr * gradient
            assert (lr * gradient).norm() > 1e-4 * old.norm()  # the step is far above float32's rounding (6e-8) …
            torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=1e-7)  # … which is allowed


def test_norms_and_decay_are_those_of_the_full_matrix():
    adapters = random_adapters()
    before = torch.stack([torch.linalg.matrix_norm(full(adapter)) for adapter in adapters])
    report = trained(adapters, 20.0).after_step(5e-3)
    summary = trained([], 0.0).norms(report)
    true = [naive.norms(full(adapter)) for adapter in adapters]
    # The products A·Aᵀ, Bᵀ·B and A·B are float32: 1e-7 of each entry; the radius of a matrix that is not normal
    # feels that more.
    for name, tolerance in (("frobenius", 1e-6), ("spectral", 1e-6), ("radius", 1e-5)):
        expected = torch.tensor([norms[name] for norms in true], dtype=torch.float64)
        torch.testing.assert_close(getattr(summary, name), expected, rtol=tolerance, atol=0)
    after = torch.tensor([norms["frobenius"] for norms in true], dtype=torch.float64)
    assert (before - after > 1e-4).all()
    torch.testing.assert_close(summary.decayed, before - after, rtol=0, atol=1e-6)  # a difference of such norms
    metrics = summary.metrics()
    expected_metrics = {
        "train/norm_avg": after.mean(),
        "train/norm_max": after.max(),
        "train/spectral_max": max(norms["spectral"] for norms in true),
        "train/radius_max": max(norms["radius"] for norms in true),
        "train/weight_decay_avg": (before - after).mean(),
        "train/weight_decay_max": (before - after).max(),
    }
    assert metrics == {
        name: pytest.approx(float(value), rel=1e-5, abs=1e-6) for name, value in expected_metrics.items()
    }


def test_without_decay_nothing_moves():
    adapters = random_adapters()
    before = [parameter.clone() for adapter in adapters for parameter in adapter.parameters()]
    summary = trained([], 0.0).norms(trained(adapters, 0.0).after_step(1.0))
    for parameter, old in zip((p for a in adapters for p in a.parameters()), before, strict=True):
        assert torch.equal(parameter, old)
    torch.testing.assert_close(summary.decayed, torch.zeros(len(LAYERS), dtype=torch.float64), rtol=0, atol=1e-12)
    assert summary.bounded == 0


def test_bfloat16_factors_do_not_decay_and_their_norms_are_reported():
    """A step of decay is less than bfloat16's spacing, so that it would be lost or too large."""
    settings = replace(SETTINGS, dtype=torch.bfloat16)
    adapters = random_adapters(settings=settings)
    before = [parameter.clone() for adapter in adapters for parameter in adapter.parameters()]
    stage = TrainedControlAdapters(adapters, settings, LAYERS, 20.0, CPU)
    report = stage.after_step(5e-3)
    assert report.dtype == torch.float64
    summary = stage.norms(report)
    for parameter, old in zip((p for a in adapters for p in a.parameters()), before, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, old)
    true = [naive.norms(full(adapter)) for adapter in adapters]
    for name, tolerance in (("frobenius", 1e-6), ("spectral", 1e-6), ("radius", 1e-5)):  # float32, as above
        expected = torch.tensor([norms[name] for norms in true], dtype=torch.float64)
        torch.testing.assert_close(getattr(summary, name), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(summary.decayed, torch.zeros(len(LAYERS), dtype=torch.float64), rtol=0, atol=1e-6)
    assert summary.bounded == 0


def test_a_step_without_a_learning_rate_does_not_decay():
    """A skipped step: its report is complete, its factors stay."""
    adapters = random_adapters()
    before = [parameter.clone() for adapter in adapters for parameter in adapter.parameters()]
    summary = trained([], 0.0).norms(trained(adapters, 100.0).after_step(0.0))
    for parameter, old in zip((p for a in adapters for p in a.parameters()), before, strict=True):
        assert torch.equal(parameter, old)
    assert summary.bounded == 0
    assert (summary.frobenius > 0).all()


def test_a_step_that_would_overshoot_is_bounded():
    adapters = random_adapters()
    before = [(a.control_A.detach().double(), a.control_B.detach().double()) for a in adapters]
    lr, decay = 1.0, 0.4
    limits = [
        0.5 / max(torch.linalg.matrix_norm(B.T @ B, 2).item(), torch.linalg.matrix_norm(A @ A.T, 2).item())
        for A, B in before
    ]
    wanted = lr * decay * SETTINGS.scale**2
    bounded = [limit < wanted for limit in limits]
    assert any(bounded)
    assert not all(bounded)
    report = trained(adapters, decay).after_step(lr)
    assert report[:, -1].tolist() == [float(each) for each in bounded]
    assert trained([], 0.0).norms(report).bounded == sum(bounded)
    for adapter, (A, B), limit in zip(adapters, before, limits, strict=True):
        c = min(wanted, limit)
        # The program takes the largest eigenvalue from above, by at most 0.2 %, so that c is at most that much smaller.
        for found, old, step in (
            (adapter.control_A, A, c * B.T @ B @ A),
            (adapter.control_B, B, c * B @ A @ A.T),
        ):
            assert (found.double() - (old - step)).norm() <= 2e-3 * step.norm() + 1e-6
            assert found.norm() < old.norm()  # it never overshoots


def test_the_reports_of_stages_add_up_to_that_of_the_whole_model():
    whole = trained(random_adapters(), 20.0).after_step(5e-3)
    parts = [trained(random_adapters(part), 20.0).after_step(5e-3) for part in ((1, 2), (), (5,), (6,))]
    for part in parts:
        assert part.shape == whole.shape
        assert part.dtype == torch.float64
    assert parts[1].count_nonzero() == 0
    # Layers are multiplied in batches of other sizes, which may round differently in the last place.
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-9)
    assert trained([], 0.0).norms(sum(parts)).metrics() == {
        name: pytest.approx(value, rel=1e-5, abs=1e-6)
        for name, value in trained([], 0.0).norms(whole).metrics().items()
    }
