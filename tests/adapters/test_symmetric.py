"""The symmetric form against its formulas in float64 with W as an [H, H] matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cadapter.adapters.control import ControlSettings, SymmetricAdapter, initial_directions
from cadapter.adapters.directory import ControlAdapterFiles, control_card, read_control_adapter, write_control_adapter
from cadapter.adapters.factors import LowRank, Symmetric
from cadapter.adapters.strengths import load_factors
from cadapter.adapters.trained_control import TrainedControlAdapters
from cadapter.algebra import orthogonality_error, orthonormalising
from cadapter.errors import UsageError
from tests.reference import naive

HIDDEN, RANK, LAYERS = 40, 6, (0, 2, 3)
SETTINGS = ControlSettings(RANK, RANK, form="symmetric")
CPU = torch.device("cpu")


def symmetric_matrix(Q: Tensor, S: Tensor) -> Tensor:
    """``W = Q·diag(e^S − 1)·Qᵀ`` [H, H]."""
    return Q.double() @ torch.diag(S.double().exp() - 1) @ Q.double().T


def random_factors(layer: int = 0, size: float = 0.4) -> Symmetric:
    """Orthonormal Q, and S of both signs."""
    S = size * torch.randn(RANK, generator=torch.Generator().manual_seed(layer))
    return Symmetric(initial_directions(1, layer, "control_Q", RANK, HIDDEN), S)


def adapter_with(factors: Symmetric, layer: int = 0) -> SymmetricAdapter:
    adapter = SymmetricAdapter(HIDDEN, layer, SETTINGS, seed=0)
    adapter.control_Q.data.copy_(factors.Q)
    adapter.control_S.data.copy_(factors.S)
    return adapter


def files_with(directory, factors: dict[int, Symmetric]) -> ControlAdapterFiles:
    files = ControlAdapterFiles(directory, RANK, RANK, factors, site="writes", base_model_type="llama")
    directory.mkdir(exist_ok=True)
    write_control_adapter(directory, files, control_card(files))
    return files


# ---- the operator ---------------------------------------------------------------------------------------------------


def test_training_starts_at_the_identity_with_orthonormal_directions():
    adapter = SymmetricAdapter(HIDDEN, 3, SETTINGS, seed=5)
    assert orthogonality_error(adapter.control_Q.detach()) < 1e-6
    assert not adapter.control_S.any()
    assert torch.equal(adapter.control_Q, SymmetricAdapter(HIDDEN, 3, SETTINGS, seed=5).control_Q)
    assert not torch.equal(adapter.control_Q, SymmetricAdapter(HIDDEN, 4, SETTINGS, seed=5).control_Q)


def test_output_and_gradients_are_those_of_full_matrices():
    factors, generator = random_factors(), torch.Generator().manual_seed(9)
    delta = torch.randn(30, HIDDEN, generator=generator)
    direction = torch.randn(30, HIDDEN, generator=generator)
    codes = torch.tensor([1, -1, 0, 2, 1, -1] * 5, dtype=torch.int8)
    adapter = adapter_with(factors)
    ours = adapter(delta, codes, adapter.class_transforms())
    penalty = adapter.neutral_penalty(delta, codes)
    found = torch.autograd.grad((direction * ours).sum() + penalty, [adapter.control_Q, adapter.control_S])

    Q, S = factors.Q.double().requires_grad_(), factors.S.double().requires_grad_()
    enhancing, suppressing = symmetric_matrix(Q, S), symmetric_matrix(Q, -S)
    rows = delta.double()
    expected = (codes == 1)[:, None] * (rows @ enhancing.T) + (codes == -1)[:, None] * (rows @ suppressing.T)
    neutral = rows[codes == 0]
    true_penalty = len(neutral) * naive.neutral_loss(neutral, enhancing)
    gradients = torch.autograd.grad((direction.double() * expected).sum() + true_penalty, [Q, S])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums over 40 products
    torch.testing.assert_close(penalty.double(), true_penalty, rtol=1e-5, atol=0)
    for one, other in zip(found, gradients, strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("t", [1.0, -1.0, 0.5, 2.0, -2.7])
def test_every_power_is_the_matrix_power(t):
    factors = random_factors()
    W = symmetric_matrix(factors.Q, factors.S)
    values, vectors = torch.linalg.eigh(naive.identity(W) + W)
    expected = vectors @ torch.diag(values**t) @ vectors.T - naive.identity(W)
    turned = factors.turned(t, 1.0, "here")
    torch.testing.assert_close(turned.B @ turned.A, expected, rtol=0, atol=1e-6)  # Q is orthonormal to float32
    general = LowRank(factors.A, factors.B).turned(t, 1.0, "here")  # the same W in the general form
    torch.testing.assert_close(general.B @ general.A, turned.B @ turned.A, rtol=0, atol=1e-6)


def test_a_power_beyond_float32_is_refused():
    with pytest.raises(UsageError, match="layer 7: strength 1000 leaves the range"):
        random_factors(size=0.9).turned(1000.0, 1.0, "layer 7")


# ---- after a step ---------------------------------------------------------------------------------------------------


def by_the_formula(Q: Tensor, gamma: float) -> Tensor:
    """``Q ← Q − γ·Q·(QᵀQ − I)`` until ‖QᵀQ − I‖₂ ≤ 1e-6, at most 4 times, then QR with the signs kept."""
    Q = Q.double()
    for _ in range(4):
        error = Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)
        if torch.linalg.matrix_norm(error, 2) <= 1e-6:
            break
        Q = Q - gamma * Q @ error
    if orthogonality_error(Q) > 1e-6:
        Q, R = torch.linalg.qr(Q)
        Q = Q * R.diagonal().sign()
    return Q


@pytest.mark.parametrize("gamma", [0.5, 0.25])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.03])
def test_orthonormalising_is_the_published_iteration(gamma, size):
    generator = torch.Generator().manual_seed(2)
    Q = initial_directions(0, 0, "control_Q", RANK, HIDDEN).double()
    Q = Q + size * torch.randn(HIDDEN, RANK, generator=generator, dtype=torch.float64)
    ours = Q @ orthonormalising(Q.T @ Q, gamma)
    assert orthogonality_error(ours) <= 1e-6
    # Where four steps do not suffice, the QR is of Q as it was before them in ours, and after them in the formula:
    # both span the same space, and the directions differ by what the steps had turned.
    turned = by_the_formula(Q, gamma)
    torch.testing.assert_close(ours @ ours.T, turned @ turned.T, rtol=0, atol=3e-6)
    if gamma == 0.5:
        torch.testing.assert_close(ours, turned, rtol=0, atol=3e-6)


def test_directions_that_are_far_from_orthonormal_go_through_qr():
    Q = torch.randn(HIDDEN, RANK, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected, R = torch.linalg.qr(Q)
    torch.testing.assert_close(Q @ orthonormalising(Q.T @ Q, 0.5), expected * R.diagonal().sign())


def test_a_batch_is_treated_layer_by_layer_and_orthonormal_ones_stay_bit_for_bit():
    Q = torch.stack([initial_directions(0, layer, "control_Q", RANK, HIDDEN) for layer in range(3)]).double()
    Q[1] *= 1.01
    C = orthonormalising(Q.mT @ Q, 0.5)
    assert torch.equal(C[0], torch.eye(RANK, dtype=torch.float64))
    assert torch.equal(C[2], torch.eye(RANK, dtype=torch.float64))
    torch.testing.assert_close(C[1], torch.eye(RANK, dtype=torch.float64) / 1.01, rtol=1e-6, atol=1e-6)


def trained(adapters: list[SymmetricAdapter], decay: float, gamma: float = 0.5) -> TrainedControlAdapters:
    return TrainedControlAdapters(adapters, SETTINGS, LAYERS, decay, CPU, gamma)


@pytest.mark.parametrize(("lr", "decay", "share"), [(1e-3, 60.0, 0.01), (1.0, 60.0, 0.5)])
def test_after_a_step_s_has_decayed_q_is_orthonormal_and_norms_are_true(lr, decay, share):
    adapters = [adapter_with(random_factors(layer), layer) for layer in LAYERS]
    for adapter in adapters:
        adapter.control_Q.data += 0.01  # as an optimiser's step would
    old = [adapter.control_S.detach().double() for adapter in adapters]
    stage = trained(adapters, decay)
    norms = stage.norms(stage.after_step(lr))
    for adapter, S in zip(adapters, old, strict=True):
        assert orthogonality_error(adapter.control_Q.detach()) <= 1e-6
        torch.testing.assert_close(adapter.control_S.detach().double(), (1 - share) * S, rtol=1e-6, atol=0)
    assert norms.bounded == (len(LAYERS) if share == 0.5 else 0)
    true = [naive.norms(symmetric_matrix(a.control_Q.detach(), a.control_S.detach())) for a in adapters]
    for name in ("frobenius", "spectral", "radius"):
        expected = torch.tensor([each[name] for each in true], dtype=torch.float64)
        torch.testing.assert_close(getattr(norms, name), expected, rtol=1e-5, atol=0)  # float32 Gram matrices
    assert list(stage.parameters()) == [f"layers.{n}.control_{factor}" for n in LAYERS for factor in "QS"]


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    expected = {layer: random_factors(layer) for layer in LAYERS}
    files_with(tmp_path / "adapter", expected)
    found = read_control_adapter(tmp_path / "adapter")
    assert (found.form, found.rank, found.scale, found.hidden_size) == ("symmetric", RANK, 1.0, HIDDEN)
    for layer, factors in expected.items():
        assert torch.equal(found.layers[layer].Q, factors.Q)
        assert torch.equal(found.layers[layer].S, factors.S)
    adapter = SymmetricAdapter(HIDDEN, 2, SETTINGS, seed=0)
    load_factors(adapter, found)
    assert torch.equal(adapter.control_Q, expected[2].Q)
    assert "diag(exp(S) − 1)" in control_card(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: Symmetric(f.Q * 1.01, f.S), "layer 2 are not orthonormal"),
        (lambda f: Symmetric(f.Q[:, :5], f.S), r"layers\.2\.control_Q.*shape \[40, 5\]; with r = 6"),
        (lambda f: Symmetric(f.Q, f.S[:5]), r"layers\.2\.control_S.*shape \[5\]; with r = 6 it must be \[6\]"),
        (lambda f: Symmetric(f.Q, torch.full((RANK,), math.nan)), "NaN"),
        (lambda f: LowRank(f.Q.T, f.Q), "unexpected tensor .*control_[AB]"),
    ],
)
def test_what_is_no_symmetric_adapter_is_refused_with_its_layer(change, message, tmp_path):
    factors = {layer: random_factors(layer) for layer in LAYERS}
    files = files_with(tmp_path / "adapter", factors)
    factors[2] = change(factors[2])
    write_control_adapter(tmp_path / "adapter", files, "card")
    with pytest.raises(UsageError, match=message):
        read_control_adapter(tmp_path / "adapter")
