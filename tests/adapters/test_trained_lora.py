"""Decay and norms of LoRA pairs against full matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cadapter.adapters import trained_lora
from cadapter.adapters.lora import LoraBlock, LoraSettings
from cadapter.adapters.trained_lora import TrainedLora
from tests.adapters.lora_cases import base_model, factors_of, put_lora, randomise

RANK, LR = 4, 1e-2
CPU = torch.device("cpu")
CASES = [("llama", None), ("mixtral", ("q_proj", "gate_up_proj", "down_proj")), ("qwen2_moe", None)]


def settings_with(targets: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32) -> LoraSettings:
    return LoraSettings(RANK, 3.0, dtype=dtype, targets=targets)


def trained_model(name: str, targets: tuple[str, ...] | None, decay: float) -> tuple[list[LoraBlock], TrainedLora]:
    """All pairs of a model in one stage, with random factors of different sizes."""
    settings = settings_with(targets)
    blocks, found = put_lora(base_model(name), settings)
    randomise(blocks)
    for number, pair in enumerate(pair for block in blocks for pair in block.pairs().values()):
        pair.B.data.mul_(1 + number % 3)
    return blocks, TrainedLora(blocks, settings, found.pair_names(), decay, CPU)


def matrices(A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The factors of each expert in float64, one where there are none: PEFT's layout written out."""
    experts = A.shape[0] // RANK
    return [
        (A.double()[expert * RANK : (expert + 1) * RANK], B.double()[:, expert::experts]) for expert in range(experts)
    ]


def decayed(A: Tensor, B: Tensor, scale: float, lr_times_lambda: float) -> tuple[Tensor, Tensor, bool]:
    """A step down ½‖W‖_F² for W = s·B·A [out, in], with its bound."""
    W = scale * B @ A
    steps = scale * B.T @ W, scale * W @ A.T
    largest = max(torch.linalg.matrix_norm(factor, 2).item() ** 2 for factor in (A, B))
    share = min(1.0, 0.5 / largest / (lr_times_lambda * scale**2))
    return A - share * lr_times_lambda * steps[0], B - share * lr_times_lambda * steps[1], share < 1


@pytest.mark.parametrize("decay", [0.5, 2000.0])
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_decay_and_norms_are_those_of_the_full_matrices(name, targets, decay):
    blocks, trained = trained_model(name, targets, decay)
    scale = trained.settings.scale
    before = {key: factor.clone() for key, factor in factors_of(blocks).items()}
    norms = trained.norms(trained.after_step(LR))
    after = factors_of(blocks)
    bounds = []
    for row, pair in enumerate(trained.names):
        keys = f"{pair}.lora_A", f"{pair}.lora_B"
        expected = [decayed(A, B, scale, LR * decay) for A, B in matrices(*(before[key] for key in keys))]
        for (A, B), (true_A, true_B, _) in zip(matrices(*(after[key] for key in keys)), expected, strict=True):
            # float32; the bound's largest eigenvalue is exact to 0.2 %
            tolerance = 1e-6 if decay < 1 else 1e-3
            assert (A - true_A).norm() <= tolerance * true_A.norm(), pair
            assert (B - true_B).norm() <= tolerance * true_B.norm(), pair
        bounds.append(any(bounded for _, _, bounded in expected))
        now = [scale * B @ A for A, B in matrices(*(after[key] for key in keys))]
        then = [scale * B @ A for A, B in matrices(*(before[key] for key in keys))]
        frobenius = max(W.norm().item() for W in now)
        spectral = max(torch.linalg.matrix_norm(W, 2).item() for W in now)
        assert norms.frobenius[row].item() == pytest.approx(frobenius, rel=1e-5)
        assert spectral * (1 - 1e-6) <= norms.spectral[row].item() <= 1.003 * spectral
        assert norms.decayed[row].item() == pytest.approx(max(W.norm().item() for W in then) - frobenius, rel=1e-4)
    assert norms.bounded == sum(bounds)
    assert (norms.bounded > 0) == (decay > 1)
    assert len(norms.radius) == 0
    assert norms.metrics()["train/norm_max"] == norms.frobenius.max().item()


def test_the_decay_shrinks_w_as_much_as_weight_decay_of_w_would():
    """To first order in lr: d‖W‖²/dlr = −2λ·(‖s·Bᵀ·W‖² + ‖s·W·Aᵀ‖²)."""
    blocks, trained = trained_model("llama", ("q_proj",), decay=1.0)
    scale = trained.settings.scale
    (A, B), *_ = matrices(*list(factors_of(blocks).values())[:2])
    W = scale * B @ A
    slope = -2 * ((scale * B.T @ W).square().sum() + (scale * W @ A.T).square().sum())
    lr = 1e-4
    norms = trained.norms(trained.after_step(lr))
    assert norms.frobenius[0].item() ** 2 - W.norm().item() ** 2 == pytest.approx(lr * slope.item(), rel=0.02)


def test_parameters_have_the_names_of_the_model_not_of_peft():
    blocks, trained = trained_model("mixtral", CASES[1][1], 0.0)
    parameters = trained.parameters()
    assert list(parameters)[:6] == [
        "layers.0.self_attn.q_proj.lora_A",
        "layers.0.self_attn.q_proj.lora_B",
        "layers.0.mlp.experts.gate_up_proj.lora_A",
        "layers.0.mlp.experts.gate_up_proj.lora_B",
        "layers.0.mlp.experts.down_proj.lora_A",
        "layers.0.mlp.experts.down_proj.lora_B",
    ]
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert parameters["layers.2.mlp.experts.down_proj.lora_A"].shape == (4 * RANK, 48)
    assert {id(parameter) for parameter in parameters.values()} == {
        id(parameter) for block in blocks for parameter in block.parameters() if parameter.requires_grad
    }


def stages(blocks: Sequence[LoraBlock], whole: TrainedLora, cut: int) -> list[TrainedLora]:
    return [
        TrainedLora(part, whole.settings, whole.names, whole.decay, CPU) for part in (blocks[:cut], blocks[cut:], [])
    ]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_reports_of_stages_add_up_to_the_whole(name, targets):
    blocks, whole = trained_model(name, targets, 0.5)
    kept = {key: factor.clone() for key, factor in factors_of(blocks).items()}
    expected = whole.after_step(LR)
    after = {key: factor.clone() for key, factor in factors_of(blocks).items()}
    for key, factor in factors_of(blocks).items():
        factor.copy_(kept[key])
    parts = [stage.after_step(LR) for stage in stages(blocks, whole, 1)]
    assert parts[2].count_nonzero() == 0
    assert not torch.equal(parts[0], expected)
    # Batches of other sizes may round differently in the last place.
    torch.testing.assert_close(sum(parts), expected, rtol=1e-6, atol=1e-9)
    for key, factor in factors_of(blocks).items():
        torch.testing.assert_close(factor, after[key], rtol=1e-5, atol=1e-7)
        assert not torch.equal(factor, kept[key])
    assert {name for stage in stages(blocks, whole, 1) for name in stage.parameters()} == set(whole.parameters())


def test_small_batches_give_what_one_batch_gives(monkeypatch):
    reports = []
    for at_once in (trained_lora.NUMBERS_AT_ONCE, 1):
        monkeypatch.setattr(trained_lora, "NUMBERS_AT_ONCE", at_once)
        reports.append(trained_model("llama", None, 0.5)[1].after_step(LR))
    torch.testing.assert_close(*reports, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["no decay", "bfloat16"])
def test_without_decay_factors_stay_and_norms_are_reported(case):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    settings = settings_with(dtype=dtype)
    blocks, found = put_lora(base_model("llama"), settings)
    randomise(blocks)
    before = {key: factor.clone() for key, factor in factors_of(blocks).items()}
    trained = TrainedLora(blocks, settings, found.pair_names(), 100.0 if case == "bfloat16" else 0.0, CPU)
    norms = trained.norms(trained.after_step(LR))
    assert all(torch.equal(factor, before[key]) for key, factor in factors_of(blocks).items())
    assert norms.decayed.count_nonzero() == 0
    assert norms.bounded == 0
    A, B = (before[f"{trained.names[0]}.lora_{factor}"].double() for factor in "AB")
    assert norms.frobenius[0].item() == pytest.approx((settings.scale * B @ A).norm().item(), rel=1e-5)


def test_at_the_start_norms_are_zero():
    settings = settings_with(("q_proj", "down_proj"))
    blocks, found = put_lora(base_model("mixtral"), settings)
    norms = TrainedLora(blocks, settings, found.pair_names(), 1.0, CPU)
    report = norms.after_step(LR)
    assert report.shape == (6, 4)
    assert report.count_nonzero() == 0


def test_a_step_that_diverged_is_seen():
    blocks, trained = trained_model("llama", ("q_proj",), 0.0)
    blocks[1].pairs()["self_attn.q_proj"].A.data[0, 0] = math.nan
    norms = trained.norms(trained.after_step(LR))
    assert torch.isfinite(norms.frobenius).tolist() == [True, False, True]
