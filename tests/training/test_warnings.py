"""What a run warns of: norms beyond their guideline, classes that pull apart; each once, and not without reason."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from cadapter.adapters.control import ControlSettings
from cadapter.adapters.guidelines import Guideline, frobenius_limit
from cadapter.adapters.trained_control import TrainedControlAdapters
from cadapter.training.warnings import BLOCK, ClassWatch, NormWatch
from tests.forked_commands import call, run_all
from tests.tiny_project import Project

RANK, HIDDEN = 3, 12


def guideline_of(W_of_layers: list[float], inverse: str = "exact", sign: float = 1.0) -> Guideline:
    """Of layers 4, 5, … with W = ±size·u·uᵀ and small noise, by the numbers that a training step leaves behind."""
    layers = list(range(4, 4 + len(W_of_layers)))
    trained = TrainedControlAdapters(
        [], ControlSettings(RANK, math.sqrt(RANK), inverse=inverse), layers, 0.0, torch.device("cpu")
    )
    scale, rows = trained.settings.scale, []
    for number, size in enumerate(W_of_layers):
        A, B = factors(number, size, sign, scale)
        rows.append(torch.cat([(A @ A.T).flatten(), (B.T @ B).flatten(), scale * (A @ B).flatten(), torch.zeros(2)]))
    found = trained.norms(torch.stack(rows)).guideline
    assert found is not None
    return found


def factors(seed: int, size: float, sign: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(HIDDEN, RANK, generator=generator, dtype=torch.float64)).Q
    return Q.T.contiguous(), Q @ torch.diag(torch.tensor([sign * size, 0.01, 0.02], dtype=torch.float64)) / scale


def sigma_min(seed: int, size: float, sign: float) -> float:
    """With the full matrix."""
    scale = 1 / math.sqrt(RANK)
    A, B = factors(seed, size, sign, scale)
    return torch.linalg.svdvals(torch.eye(HIDDEN, dtype=torch.float64) + scale * B @ A).min().item()


def test_the_exact_inverse_is_guarded_by_the_smallest_singular_value() -> None:
    small = guideline_of([0.2, 0.3])
    assert small.holds
    assert small.is_bound
    assert (small.layer, small.value) == (5, pytest.approx(0.7))
    # Large norms alone are no harm, I + W = 1.9 in that direction …
    large = guideline_of([0.9])
    assert (large.value, large.is_bound, large.holds) == (pytest.approx(sigma_min(0, 0.9, 1)), False, True)
    # … but 1 − 0.95 is.
    bad = guideline_of([0.2, 0.95], sign=-1)
    assert (bad.value, bad.layer, bad.holds) == (pytest.approx(sigma_min(1, 0.95, -1)), 5, False)
    assert bad.value == pytest.approx(0.05)
    assert "σ_min(I+W) of layer 5 is 0.05, below the guideline of 0.1: " in bad.exceeded()
    assert "lora_weight_decay" in bad.exceeded()


def test_the_series_is_guarded_by_the_frobenius_norm_and_the_radius() -> None:
    assert frobenius_limit(16) == 1.0
    limit = 0.25 * math.sqrt(RANK)
    assert guideline_of([0.4, 0.3], "neumann").holds
    beyond = guideline_of([0.4, 0.6], "neumann")
    assert (beyond.name, beyond.layer, beyond.limit, beyond.holds) == ("‖W‖_F", 5, pytest.approx(limit), False)
    diverging = guideline_of([1.5, 0.6], "neumann")
    assert (diverging.name, diverging.layer, diverging.holds) == ("ρ(W)", 4, False)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_what_is_not_finite_keeps_no_guideline(broken: float) -> None:
    for inverse in ("exact", "neumann"):
        assert not guideline_of([0.2, broken], inverse).holds


def test_a_passed_guideline_is_said_once_until_it_was_well_kept() -> None:
    watch, values = NormWatch(), [0.2, 0.09, 0.08, 0.105, 0.09, 0.2, 0.05]
    said = [bool(watch.look(Guideline("σ", value, 0.1, 0, is_floor=True))) for value in values]
    assert said == [False, True, False, False, False, False, True]
    assert watch.look(None) is None


def test_a_class_that_rises_for_long_while_the_other_falls() -> None:
    watch = ClassWatch(evaluated=True)
    losses = [(2.0, 2.0), (2.1, 1.9), (2.2, 1.8), (2.3, 1.7)]
    said = [watch.after_evaluation(*pair) for pair in losses]
    assert said[:3] == [None, None, None]
    assert said[3] is not None
    assert said[3].startswith(
        "the loss of class +1 has risen for 3 evaluations (2.0000 to 2.3000) while that of class −1 fell (2.0000 to "
    )
    assert watch.after_evaluation(2.4, 1.6) is None  # said again only after as long again
    # Training steps say nothing where there are evaluations.
    assert all(watch.after_step(2.0 + k, 2.0 - k) is None for k in range(1000))


@pytest.mark.parametrize(
    "losses",
    [
        [(2.0, 2.0), (1.9, 1.9), (1.8, 1.8), (1.7, 1.7), (1.6, 1.6)],
        [(2.0, 2.0), (2.1, 2.1), (2.2, 2.2), (2.3, 2.3), (2.4, 2.4)],
        [(2.0, 2.0), (2.1, 1.9), (2.0, 1.8), (2.1, 1.7), (2.2, 1.6)],
        [(2.0, None), (2.1, None), (2.2, None), (2.3, None), (2.4, None)],
    ],
    ids=["both fall", "both rise", "not for long", "one class"],
)
def test_other_losses_are_no_reason(losses: list[tuple[float, Any]]) -> None:
    watch = ClassWatch(evaluated=True)
    assert [watch.after_evaluation(*pair) for pair in losses] == [None] * len(losses)


def test_without_evaluations_means_over_many_steps_count() -> None:
    watch = ClassWatch(evaluated=False)
    noise = torch.randn(5 * BLOCK, 2, generator=torch.Generator().manual_seed(0)).tolist()
    said = [watch.after_step(2 - 0.01 * k + up, 2 + 0.01 * k + down) for k, (up, down) in enumerate(noise)]
    told = [k for k, text in enumerate(said) if text]
    assert told == [5 * BLOCK - 1]
    assert "the loss of class −1 has risen for 200 steps" in (said[-1] or "")


def test_a_run_says_it_with_the_step(project: Project) -> None:
    """Far too large an lr: the guideline is passed in the second step at the latest, which is said once."""
    keys = {"lr": 0.5, "lora_weight_decay": 0, "control_inverse": "neumann", "max_steps": 6}
    (done,) = run_all(call("train", project.write_config("warned", **keys, gradient_accumulation_steps=4)))
    assert done.returncode == 0, done.stderr
    found = re.findall(r"warning: step (\d): (‖W‖_F|ρ\(W\)) of layer \d is [\d.e+]+, above the guideline", done.stderr)
    assert found
    assert int(found[0][0]) <= 2
    assert len(found) == len({name for _, name in found})
