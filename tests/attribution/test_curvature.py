"""Curvature against dense eigendecompositions and inverses in float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from dmin.attribution.curvature.curvature import fit_curvature
from dmin.runtime.errors import DminError


def rows_of(n, m, count=2, seed=0, decay=1.0):
    """Rows whose curvature has eigenvalues that fall like j^(−decay), each kind its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, m + 1).float() ** (-decay / 2)
    x = torch.randn(n, count, m, generator=generator) * scale
    turn = torch.linalg.qr(torch.randn(count, m, m, generator=generator))[0]
    return torch.einsum("nbm,bmk->nbk", x, turn)


def fitted(x, chunk=7, **settings):
    return fit_curvature(lambda: iter(x.split(chunk)), tuple(x.shape), **settings)


def dense(x, damping, p):
    """Return (C + λ)^−p [B, m, m] by numpy's eigendecomposition of the matrix itself."""
    out = []
    for b in range(x.shape[1]):
        phi = x[:, b].double().numpy()
        matrix = phi.T @ phi / len(phi) + float(damping[b]) * np.eye(x.shape[2])
        values, vectors = np.linalg.eigh(matrix)
        out.append(vectors * values**-p @ vectors.T)
    return np.stack(out)


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("p", [-1.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize(("n", "m"), [(60, 24), (24, 60), (40, 40)])
def test_every_power_is_that_of_the_dense_matrix(n, m, p):
    x = rows_of(n, m)
    found = fitted(x)
    damping = 0.1 * found.mean_eigenvalue
    v = torch.randn(5, 2, m, generator=torch.Generator().manual_seed(1))
    expected = np.einsum("bmk,nbk->nbm", dense(x, damping, p), v.double().numpy())
    assert error(found.power(v, damping, p).numpy(), expected) < 2e-6
    quadratic = np.einsum("nbm,nbm->nb", v.double().numpy(), expected)
    assert error(found.quadratic(v, damping, p).numpy(), quadratic) < 2e-6


def test_the_inverse_is_that_of_an_explicit_solve():
    x = rows_of(30, 50, count=1)
    found = fitted(x)
    damping = 0.01 * found.mean_eigenvalue
    phi = x[:, 0].double()
    matrix = phi.T @ phi / 30 + damping * torch.eye(50)
    solved = torch.linalg.solve(matrix, phi[:4].T).T
    assert error(found.power(x[:4], damping, 1.0)[:, 0].double(), solved) < 2e-6


def test_dual_equals_primal():
    """Rows padded by zeros leave n > m for n < m, and the matrix as it was."""
    x = rows_of(20, 32)
    padded = torch.cat([x, torch.zeros(30, 2, 32)]) * (50 / 20) ** 0.5
    one, other = fitted(x), fitted(padded)
    damping = torch.tensor([0.01, 0.02], dtype=torch.float64)
    assert one.support == 20 and other.support == 32
    assert torch.allclose(one.values, other.values[:, :20], rtol=1e-5)
    assert error(one.power(x, damping, 1.0), other.power(x, damping, 1.0)) < 2e-6
    assert torch.allclose(
        one.effective_dimension(damping), other.effective_dimension(damping), rtol=1e-5
    )


def test_products_with_the_matrix_itself():
    x = rows_of(30, 12)
    found = fitted(x).power(x[:3], torch.zeros(2), -1.0).double()
    phi = x.double()
    expected = torch.einsum("nbm,nbk,qbk->qbm", phi, phi, phi[:3]) / 30
    assert error(found, expected) < 2e-6


@pytest.mark.parametrize(("n", "m"), [(60, 24), (24, 60)])
def test_effective_dimension_trace_and_energy(n, m):
    x = rows_of(n, m)
    found = fitted(x, rank=8)
    damping = torch.tensor([0.02, 0.1], dtype=torch.float64)
    for b in range(2):
        values = torch.linalg.svdvals(x[:, b].double()).square() / n
        assert found.trace[b] == pytest.approx(values.sum().item())
        assert found.kept[b] == pytest.approx((values[:8].sum() / values.sum()).item())
        full = (values / (values + damping[b])).sum().item()
        assert fitted(x).effective_dimension(damping)[b] == pytest.approx(full, rel=1e-6)
        # The tail's mean stands for each of it: tr C (C+λ)⁻¹ is concave, so never too small.
        assert full - 1e-9 <= found.effective_dimension(damping)[b] < 1.3 * full


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_a_stream_that_does_not_fit_is_approximated(passes):
    x = rows_of(300, 200, decay=2.0)
    exact, memory = fitted(x, rank=20), 64 * 200 * 34
    found = fitted(x, rank=20, memory=memory, passes=passes)
    assert found.vectors.shape == (2, 20, 200)
    assert torch.allclose(found.trace, exact.trace)
    worst = ((found.values - exact.values) / exact.values).abs().max().item()
    assert worst < {1: 0.6, 2: 0.1, 4: 5e-3}[passes]
    assert (found.values <= exact.values * (1 + 1e-6)).all()  # Nyström never exceeds C


def test_the_error_falls_with_the_rank():
    """(C + λ)⁻¹ v against the dense solve, v of the rows, λ a tenth of the mean eigenvalue."""
    x = rows_of(300, 200, decay=2.0)
    damping = 0.1 * fitted(x).mean_eigenvalue
    expected = fitted(x).power(x[:20], damping, 1.0)
    errors = []
    for rank in (1, 5, 20, 80, 150):
        found = fitted(x, rank=rank, memory=64 * 200 * 198, passes=2)
        errors.append(float(error(found.power(x[:20], damping, 1.0), expected)))
    assert errors == pytest.approx([1.43, 1.33, 0.51, 0.027, 0.0013], rel=0.05)


def test_a_random_basis_as_large_as_the_support_is_exact():
    x = rows_of(24, 60)
    found = fitted(x, memory=64 * 60 * 30, passes=1)
    assert found.values.shape == (2, 24)
    damping = 0.1 * found.mean_eigenvalue
    assert error(found.power(x, damping, 1.0), fitted(x).power(x, damping, 1.0)) < 1e-5


@pytest.mark.parametrize("memory", [1 << 30, 64 * 40 * 20])
def test_chunks_do_not_matter(memory):
    x = rows_of(50, 40)
    damping = torch.tensor([0.1, 0.2])
    one, other = (fitted(x, chunk=c, memory=memory).power(x, damping, 0.5) for c in (1, 50))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_equal_rows_have_one_direction():
    x = rows_of(1, 30).expand(10, 2, 30)
    found = fitted(x)
    assert (found.values[:, 1:] == 0).all() and (found.rest == 0).all()
    damping = torch.ones(2, dtype=torch.float64)
    assert error(found.power(x, damping, 1.0), x / (1 + x.square().sum(2, keepdim=True))) < 1e-6


def test_what_cannot_be_done_is_refused():
    x = rows_of(20, 10)
    with pytest.raises(DminError, match="rank=0"):
        fitted(x, rank=0)
    with pytest.raises(DminError, match="at least 640"):
        fitted(x, memory=319)
    with pytest.raises(DminError, match="positive damping"):
        fitted(x).power(x, torch.zeros(2), 1.0)


WIDE = """
import resource, torch
from dmin.attribution.curvature.curvature import fit_curvature
torch.set_num_threads(1)
K, MEMORY = 65536, 100 << 20

def stream(k):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(10, 2, k, generator=generator) for _ in range(10))

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

fit_curvature(lambda: stream(4096), (100, 2, 4096), memory=4 << 20)  # libraries loaded
for memory in (MEMORY // 2, MEMORY):  # random basis, then the rows' inner products
    before = used()
    found = fit_curvature(lambda: stream(K), (100, 2, K), memory=memory)
    rows = torch.randn(3, 2, K)
    found.power(rows, 0.1 * found.mean_eigenvalue, 1.0)
    print(found.vectors.shape[1], used() - before)
"""


def test_memory_is_bounded_at_65536_numbers_a_row():
    """C itself would take 34 GB a timestep."""
    run = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True)
    (few, least), (all_of_them, more) = (map(int, x.split()) for x in run.stdout.splitlines())
    block = 4 * 10 * 2 * 65536
    assert few < 20 and all_of_them == 100
    assert least < (50 << 20) + 8 * block and more < (100 << 20) + 8 * block


@pytest.mark.parametrize("settings", [{}, {"rank": 5}], ids=["exact", "low rank"])
@pytest.mark.parametrize("decay", [0.2, 3.0])
def test_the_damping_leaves_the_effective_dimension_that_is_asked_for(settings, decay):
    x = rows_of(30, 50, decay=decay)
    x[:, 1] *= 1e-6  # units do not matter
    found = fitted(x, **settings)
    damping = found.damping_for(4.0)
    assert torch.allclose(found.effective_dimension(damping), torch.full((2,), 4.0).double())
    if not settings:
        for b in range(2):
            values = np.linalg.eigvalsh(x[:, b].double().numpy().T @ x[:, b].double().numpy() / 30)
            assert (values / (values + float(damping[b]))).sum() == pytest.approx(4, rel=1e-4)


def test_where_there_are_few_directions_half_of_them_are_left():
    x = torch.zeros(3, 3, 8)
    x[0, 0, 0], x[1, 0, 1], x[0, 1, 0] = 1, 2, 3  # two directions, one, and none
    found = fitted(x)
    damping = found.damping_for(6.0)
    assert found.effective_dimension(damping)[:2].tolist() == pytest.approx([1, 0.5])
    assert damping[2] == 1 and damping.isfinite().all()
