"""Rank-space mathematics against full [H, H] matrices in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cadapter import algebra
from cadapter.adapters.factors import LowRank
from cadapter.errors import UsageError
from tests.reference import naive

H, RANK = 48, 6


def random_factors(seed: int = 0, spectral: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple:
    """A [r, H], B [H, r] and a scale for which ‖s·B·A‖₂ = ``spectral``."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, H, generator=generator, dtype=torch.float64)
    B = torch.randn(H, RANK, generator=generator, dtype=torch.float64)
    scale = 1 / math.sqrt(RANK)
    B *= spectral / torch.linalg.matrix_norm(scale * B @ A, 2)
    return A.to(dtype), B.to(dtype), scale


def rank_one(coefficient: float, dtype: torch.dtype = torch.float64) -> tuple:
    """Factors of ``coefficient·u·uᵀ`` with a unit vector u: −1 is a projection, −2 a Householder reflection."""
    u = torch.randn(H, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u /= u.norm()
    return u.T.contiguous().to(dtype), (coefficient * u).to(dtype), 1.0


def with_core(M: torch.Tensor) -> tuple:
    """Factors whose core ``A·B`` is M exactly up to rounding: B has orthonormal columns, A = M·Bᵀ."""
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(H, M.shape[0], generator=generator, dtype=torch.float64)).Q
    return M @ Q.T, Q, 1.0


@pytest.mark.parametrize("factors", [random_factors(1, 0.5), random_factors(2, 2.0), rank_one(-2.0)])
def test_exact_inverse_inverts_in_float32(factors):
    A, B, scale = factors[0].float(), factors[1].float(), factors[2]
    T = algebra.exact_inverse(algebra.core(A, B, scale))
    x = torch.randn(H, 5, generator=torch.Generator().manual_seed(9))
    forward = x + scale * B @ (A @ x)
    back = forward + scale * B @ (T @ (A @ forward))
    assert (back - x).abs().max() < 1e-5  # the accuracy that the method promises in float32


def test_exact_inverse_equals_the_full_inverse():
    A, B, scale = random_factors(4, 0.9)
    W = naive.full_matrix(A, B, scale)
    T = algebra.exact_inverse(algebra.core(A, B, scale))
    torch.testing.assert_close(scale * B @ T @ A, naive.inverse_minus_identity(W), rtol=1e-12, atol=1e-12)


def test_exact_inverse_of_a_batch_of_layers():
    layers = [random_factors(seed, 0.7) for seed in range(3)]
    M = torch.stack([algebra.core(*factors) for factors in layers])
    batched = algebra.exact_inverse(M)
    for T, factors in zip(batched, layers, strict=True):
        torch.testing.assert_close(T, algebra.exact_inverse(algebra.core(*factors)), rtol=0, atol=1e-14)


def test_exact_inverse_of_a_singular_core_raises_nothing():
    assert not torch.isfinite(algebra.exact_inverse(-torch.eye(3))).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_neumann_orders_are_the_truncated_series(order):
    A, B, scale = random_factors(5, 0.8)
    T = algebra.neumann_inverse(algebra.core(A, B, scale), order)
    expected = naive.neumann_minus_identity(naive.full_matrix(A, B, scale), order)
    torch.testing.assert_close(scale * B @ T @ A, expected, rtol=1e-12, atol=1e-13)


def test_neumann_series_of_a_householder_reflection_diverges():
    M = algebra.core(*rank_one(-2.0))
    errors = [(algebra.neumann_inverse(M, k) - algebra.exact_inverse(M)).abs().item() for k in (1, 2, 3, 4)]
    assert errors[0] > 1
    assert all(later > 1.9 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("inverse", ["exact", "neumann"])
def test_gradients_through_the_inverse(inverse):
    A, B, scale = random_factors(6, 0.6, torch.float32)
    delta = torch.randn(7, H, generator=torch.Generator().manual_seed(2))
    A.requires_grad_()
    B.requires_grad_()
    M = algebra.core(A, B, scale)
    T = algebra.exact_inverse(M) if inverse == "exact" else algebra.neumann_inverse(M, 2)
    y = scale * (delta @ A.T) @ T.T @ B.T
    found = torch.autograd.grad(y.sin().sum(), [A, B])

    A64, B64 = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    classes = torch.full((7,), -1)
    y = naive.forward(delta.double(), classes, naive.full_matrix(A64, B64, scale), inverse, 2)
    for gradient, expected in zip(found, naive.gradients(y.sin().sum(), A64, B64), strict=True):
        # float32 rounding of sums over H and T terms
        assert (gradient.double() - expected).norm() < 1e-5 * expected.norm()


def test_decay_is_the_gradient_of_half_the_squared_frobenius_norm():
    A, B, scale = random_factors(7, 0.5)
    c_asked = 1e-3
    grad_A, grad_B = naive.decay_gradients(A, B, scale, c_asked)
    new_A, new_B = A.clone(), B.clone()
    c, gram_A, gram_B = algebra.decay_(new_A, new_B, scale, c_asked)
    torch.testing.assert_close(new_A, A - grad_A, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(new_B, B - grad_B, rtol=1e-12, atol=1e-14)
    assert c.item() == pytest.approx(c_asked * scale**2, rel=1e-12)
    torch.testing.assert_close(gram_A, A @ A.T)
    torch.testing.assert_close(gram_B, B.T @ B)


def test_decay_of_a_batch_equals_decay_one_by_one():
    layers = [random_factors(seed, 0.5 + seed) for seed in range(3)]
    scale = layers[0][2]
    A, B = torch.stack([f[0] for f in layers]), torch.stack([f[1] for f in layers])
    c, _, _ = algebra.decay_(A, B, scale, 5.0)
    for i, (one_A, one_B, _) in enumerate(layers):
        one_c, _, _ = algebra.decay_(one_A, one_B, scale, 5.0)
        torch.testing.assert_close(A[i], one_A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(B[i], one_B, rtol=1e-12, atol=1e-14)
        assert c[i].item() == pytest.approx(one_c.item(), rel=1e-12)


def test_decay_of_lora_pairs_with_other_sizes_in_and_out():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    B = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    grad_A, grad_B = naive.decay_gradients(A, B, 0.5, 1e-3)
    expected = A - grad_A, B - grad_B
    algebra.decay_(A, B, 0.5, 1e-3)
    torch.testing.assert_close(A, expected[0])
    torch.testing.assert_close(B, expected[1])


def test_decay_bound_acts_and_cannot_overshoot():
    A, B, scale = random_factors(8, 3.0)
    before_A, before_B = A.clone(), B.clone()
    c, gram_A, gram_B = algebra.decay_(A, B, scale, 1e6)
    largest = max(torch.linalg.eigvalsh(gram_A)[-1], torch.linalg.eigvalsh(gram_B)[-1]).item()
    assert c.item() < 1e6 * scale**2
    # the estimate of the eigenvalue is from above and at most 0.2 % too large
    assert 0.5 / largest * 0.998 <= c.item() <= 0.5 / largest * (1 + 1e-9)
    for before, after in ((before_A, A), (before_B, B)):
        old, new = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
        assert (new <= old).all()
        assert (new >= 0.5 * old * (1 - 1e-9)).all()
    assert torch.linalg.matrix_norm(B @ A) < torch.linalg.matrix_norm(before_B @ before_A)


def test_decay_of_factors_that_are_zero_changes_nothing():
    A, B, scale = random_factors(9)
    before = A.clone()
    c, _, _ = algebra.decay_(A, B.zero_(), scale, 0.1)
    assert torch.equal(A, before)
    assert not B.any()
    assert torch.isfinite(c)
    zero = torch.zeros(RANK, RANK)
    assert algebra.decay_coefficient(zero, zero, 0.5, 0.1).item() == pytest.approx(0.1 * 0.25)


@pytest.mark.parametrize("rank", [1, 16, 64, 256])
def test_largest_eigenvalue_is_a_close_upper_bound_in_float32(rank):
    generator = torch.Generator().manual_seed(rank)
    for spread in (torch.ones(rank), torch.rand(rank, generator=generator), torch.logspace(0, -6, rank)):
        Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        G = Q * spread @ Q.T * 1e3
        exact = 1e3 * spread.max().item()
        # 1e-5: float32 rounding of the matrix itself and of the estimate
        assert exact * (1 - 1e-5) <= algebra.largest_eigenvalue(G).item() <= exact * 1.002


@pytest.mark.parametrize("factors", [random_factors(10, 0.2), random_factors(11, 2.0), rank_one(-2.0), rank_one(0.3)])
def test_health_equals_torch_linalg_on_the_full_matrix(factors):
    expected = naive.norms(naive.full_matrix(*factors))
    found = algebra.health(*factors)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-10, abs=1e-10), name


@pytest.mark.parametrize("hidden", [4, 6, 12, 13])
def test_health_where_the_factors_span_the_whole_space(hidden):
    """H ≤ 2r: 1 is a singular value of I + W only if W says so."""
    generator = torch.Generator().manual_seed(hidden)
    A = torch.randn(6, hidden, generator=generator, dtype=torch.float64)
    B = A.T @ torch.diag(torch.linspace(1, 2, 6, dtype=torch.float64)) + 0.1  # I + W is far from the identity
    expected = naive.norms(naive.full_matrix(A, B, 1.0))
    found = algebra.health(A, B, 1.0)
    assert found.sigma_min == pytest.approx(expected["sigma_min"], rel=1e-9)
    assert found.sigma_max == pytest.approx(expected["sigma_max"], rel=1e-9)
    assert found.spectral == pytest.approx(expected["spectral"], rel=1e-9)


def test_health_of_an_adapter_that_does_nothing():
    A, B, scale = random_factors(12)
    found = algebra.health(A, torch.zeros_like(B), scale)
    assert (found.frobenius, found.spectral, found.radius, found.effective_rank) == (0, 0, 0, 0)
    assert (found.sigma_min, found.condition) == pytest.approx((1, 1))
    assert (found.neumann_remainder_1, found.neumann_remainder_2) == (0, 0)


def test_health_of_a_projection_is_singular_not_an_error():
    found = algebra.health(*rank_one(-1.0))
    assert found.sigma_min < 1e-12
    assert found.condition > 1e12
    assert found.neumann_remainder_2 > 1e12


def test_norms_from_gram_equal_the_full_matrix():
    layers = [random_factors(seed, 0.3 + seed) for seed in range(4)]
    scale = layers[0][2]
    gram_A = torch.stack([A @ A.T for A, _, _ in layers])
    gram_B = torch.stack([B.T @ B for _, B, _ in layers])
    M = torch.stack([algebra.core(*factors) for factors in layers])
    found = algebra.norms_from_gram(gram_A, gram_B, M, scale)
    for i, factors in enumerate(layers):
        expected = naive.norms(naive.full_matrix(*factors))
        for norm, name in zip(found, ("frobenius", "spectral", "radius"), strict=True):
            assert norm[i].item() == pytest.approx(expected[name], rel=1e-10)


def test_the_smallest_singular_value_equals_that_of_the_full_matrix():
    """Of random layers of any size, of W = 0, and of I − u·uᵀ, which is singular."""
    layers = [*(random_factors(seed, 0.3 + seed) for seed in range(4)), random_factors(7, 1e-9)]
    layers.append(rank_one(-1.0))
    for A, B, scale in layers:
        M = algebra.core(A, B, scale)
        found = algebra.smallest_singular_value((A @ A.T)[None], (B.T @ B)[None], M[None], scale)
        full = naive.full_matrix(A, B, scale)
        sigma = torch.linalg.svdvals(torch.eye(len(full), dtype=torch.float64) + full).min().item()
        # √G of a singular G is exact to the root of the precision (1.5e-8) times the size of its factors.
        assert found.item() == pytest.approx(sigma, abs=1e-6)
    nothing = torch.zeros(1, RANK, RANK, dtype=torch.float64)
    assert algebra.smallest_singular_value(nothing, nothing, nothing, 0.5).item() == 1
    assert algebra.smallest_singular_value(nothing, nothing / 0, nothing, 0.5).item() == 0


def test_norms_from_gram_of_zero_and_of_broken_layers():
    A, B, scale = random_factors(13)
    gram_A = torch.stack([A @ A.T, A @ A.T, torch.full((RANK, RANK), math.inf, dtype=torch.float64)])
    gram_B = torch.stack([torch.zeros(RANK, RANK, dtype=torch.float64), B.T @ B, B.T @ B])
    M = torch.stack([torch.zeros(RANK, RANK, dtype=torch.float64), scale * A @ B, scale * A @ B])
    for norm in algebra.norms_from_gram(gram_A, gram_B, M, scale):
        assert norm[0] == 0
        assert 0 < norm[1] < 10
        assert norm[2] == math.inf


def power(factors: tuple, t: float) -> torch.Tensor:
    """(I + W)^t [H, H] from the rank-space transform."""
    A, B, scale = factors
    return torch.eye(H, dtype=torch.float64) + scale * B @ algebra.strength_transform(A @ B * scale, t) @ A


JORDAN = torch.tensor([[0.3, 1.0, 0.0], [0.0, 0.3, 1.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
NILPOTENT = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
TINY = torch.diag(torch.tensor([1e-14, 1e-9, 0.4, 0.0], dtype=torch.float64))
ROTATION = torch.tensor([[-0.5, -0.9], [0.9, -0.5]], dtype=torch.float64)  # I + M turns by 61 degrees
CASES = {
    "random, small": random_factors(20, 0.3),
    "random, large": random_factors(21, 0.95),
    "defective": with_core(JORDAN),
    "nilpotent": with_core(NILPOTENT),
    "tiny eigenvalues": with_core(TINY),
    "complex eigenvalues": with_core(ROTATION),
    "zero": with_core(torch.zeros(2, 2, dtype=torch.float64)),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # the accuracy that a fractional power is checked for


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("s", "t"), [(0.5, 0.5), (0.3, 0.7), (-0.5, 1.5), (2.0, -1.0), (0.25, -2.25), (3.0, -0.5)])
def test_strength_is_a_group(name, s, t):
    factors = CASES[name]
    torch.testing.assert_close(power(factors, s) @ power(factors, t), power(factors, s + t), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_whole_strengths_are_products_and_inverses(name):
    factors = CASES[name]
    step = torch.eye(H, dtype=torch.float64) + naive.full_matrix(*factors)
    for t in (0, 1, 2, 3, 5):
        torch.testing.assert_close(power(factors, t), torch.linalg.matrix_power(step, t), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(power(factors, -t), torch.linalg.matrix_power(step, -t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(power(factors, 0.5) @ power(factors, 0.5), step, **CLOSE)


def test_strength_one_zero_and_minus_one():
    M = algebra.core(*CASES["random, large"])
    assert torch.equal(algebra.strength_transform(M, 1), torch.eye(RANK, dtype=torch.float64))
    assert torch.equal(algebra.strength_transform(M, 0.0), torch.zeros(RANK, RANK, dtype=torch.float64))
    torch.testing.assert_close(algebra.strength_transform(M, -1.0), algebra.exact_inverse(M), rtol=0, atol=1e-14)
    assert algebra.strength_transform(M.float(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("t", [0.5, -0.3, 1.7])
def test_strength_of_diagonal_cores_is_the_scalar_function(t):
    x = torch.tensor([-0.6, -1e-3, 1e-12, 0.2, 4.0], dtype=torch.float64)
    expected = [(t if abs(v) < 1e-10 else ((1 + v) ** t - 1) / v) for v in x.tolist()]
    found = algebra.strength_transform(torch.diag(x), t)
    torch.testing.assert_close(found.diagonal(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


BASIS = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)).Q
BASIS = BASIS @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64))  # M is not symmetric


@pytest.mark.parametrize("t", [0.5, -0.3, 1.7])
@pytest.mark.parametrize("eigenvalue", [1e-4, 1e-3, 0.02, 5.0, 41.0, 100.0, 1e3, 1e4])
def test_strength_of_eigenvalues_far_from_one(eigenvalue, t):
    """``I + M`` with this eigenvalue beside others; its powers are those of the eigenvalues."""
    x = torch.tensor([eigenvalue - 1, 0.1, -0.3, 1e-12], dtype=torch.float64)
    inverse = torch.linalg.inv(BASIS)
    found = algebra.strength_transform(BASIS @ torch.diag(x) @ inverse, t)
    expected = BASIS @ torch.diag(torch.expm1(t * torch.log1p(x)) / x) @ inverse
    assert torch.linalg.matrix_norm(found - expected) <= 1e-9 * torch.linalg.matrix_norm(expected)


def test_a_large_defective_core_has_a_root():
    M = 99 * torch.eye(3, dtype=torch.float64) + 100 * (JORDAN - 0.3 * torch.eye(3, dtype=torch.float64))
    root = torch.eye(3, dtype=torch.float64) + M @ algebra.strength_transform(M, 0.5)
    expected = torch.tensor([[10.0, 5.0, -1.25], [0.0, 10.0, 5.0], [0.0, 0.0, 10.0]], dtype=torch.float64)  # by hand
    torch.testing.assert_close(root, expected, **CLOSE)


def test_what_cannot_be_worked_out_is_said_truly():
    """All eigenvalues of I + M are 0.1, none is near the negative axis: but four of them share one eigenvector."""
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    M = Q @ (torch.diag(torch.full((3,), 3.0), 1).double() - 0.9 * torch.eye(4, dtype=torch.float64)) @ Q.T
    with pytest.raises(UsageError, match=r"layer 2: strength 0.5 cannot .* values from 3.7e-06 to 3.07, too far"):
        algebra.strength_transform(M, 0.5, "layer 2")


def test_the_scale_of_the_factors_against_each_other_says_nothing():
    """W and its powers are the same, so is what exists of them; the scales are no powers of two."""
    A, B, scale = random_factors(22, 0.5)
    R = torch.tensor([1e5, 1.0, 7.0, 1e-3, *[1.0] * (RANK - 4)], dtype=torch.float64)
    for t in (-1.0, 0.5, 3.0):
        plain, other = LowRank(A, B).turned(t, scale, "here"), LowRank(A * R[:, None], B / R).turned(t, scale, "here")
        torch.testing.assert_close(other.B @ other.A, plain.B @ plain.A, rtol=1e-9, atol=1e-12)
    nothing = LowRank(A * R[:, None], torch.zeros_like(B)).turned(-1.0, scale, "here")
    assert not nothing.B.any()
    half = B.clone()
    half[:, 1] = 0
    turned = LowRank(A, half).turned(-1.0, scale, "here")
    expected = naive.inverse_minus_identity(naive.full_matrix(A, half, scale))
    torch.testing.assert_close(turned.B @ turned.A, expected, rtol=1e-9, atol=1e-12)


def test_strength_of_a_known_logarithm():
    generator = torch.Generator().manual_seed(5)
    L = 0.4 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    M = torch.linalg.matrix_exp(L) - torch.eye(5, dtype=torch.float64)
    for t in (0.3, -1.6):
        expected = torch.linalg.matrix_exp(t * L) - torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(M @ algebra.strength_transform(M, t), expected, **CLOSE)


@pytest.mark.parametrize("t", [-1.0, -2.0, 0.5, -0.5])
def test_a_projection_has_no_inverse_and_the_layer_is_named(t):
    M = algebra.core(*rank_one(-1.0, torch.float32))
    with pytest.raises(UsageError, match=r"layer 7: .*singular"):
        algebra.strength_transform(M, t, "layer 7")
    with pytest.raises(UsageError, match=r"layer 7: .*singular"):
        algebra.check_invertible(M, "layer 7")
    assert algebra.strength_transform(M, 2.0).item() == pytest.approx(1.0, abs=1e-6)  # (I − uuᵀ)² = I − uuᵀ


def test_a_householder_reflection_has_whole_powers_but_no_root():
    M = algebra.core(*rank_one(-2.0))
    algebra.check_invertible(M)
    assert algebra.strength_transform(M, -1.0).item() == pytest.approx(1.0)  # its own inverse: −2uuᵀ again
    with pytest.raises(UsageError, match=r"layer 3: strength 0.5 .*-1"):
        algebra.strength_transform(M, 0.5, "layer 3")


@pytest.mark.parametrize("eigenvalue", [-1.5, -3.0])
def test_a_negative_eigenvalue_beside_others_is_refused(eigenvalue):
    M = torch.diag(torch.tensor([0.2, eigenvalue, -0.3], dtype=torch.float64))
    with pytest.raises(UsageError, match="eigenvalue"):
        algebra.strength_transform(M, 0.5)


@pytest.mark.parametrize("t", [math.nan, math.inf])
def test_a_strength_that_is_no_number_is_refused(t):
    with pytest.raises(UsageError, match="finite"):
        algebra.strength_transform(torch.zeros(2, 2), t)


def test_overflow_and_broken_factors_are_refused():
    with pytest.raises(UsageError, match="range"):
        algebra.strength_transform(torch.eye(2), 1e6)
    with pytest.raises(UsageError, match=r"layer 1: .*not finite"):
        algebra.strength_transform(torch.full((2, 2), math.nan), 1.0, "layer 1")


def test_gauss_legendre_is_exact_for_polynomials():
    nodes, weights = algebra.gauss_legendre(8)
    for degree in range(16):
        assert (weights * nodes**degree).sum().item() == pytest.approx(1 / (degree + 1), rel=1e-13)
