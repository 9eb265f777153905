"""What is proven holds of real numbers: adversarial rows, every dtype, against long double."""

import numpy as np
import pytest
import torch
from made_stores import drawn, made, real_scores

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search import contenders as contenders_module, scan as scan_module
from dmin.attribution.search.certified import Certified
from dmin.attribution.search.certified_bound import ProjectionIndex
from dmin.attribution.search.contenders import ErrorBound, best_of_all
from dmin.attribution.search.scan import row_factors, scan, scores_of_rows

N, WIDTH = 60, 12288


def constant(g):
    """Long sums of one sign: whatever adds them up in float32 is off by much."""
    return np.ones((N, 1, 1, 1, WIDTH), np.float32) * (1 + 0.3 * g(N, times=1))


def cancelling(g):
    rows = constant(g)
    rows[..., ::2] *= -1
    return rows + 1e-3 * g(N, times=1, dim=WIDTH)


def all_sizes(g):
    """Entries and rows of every size that float16 has, and more."""
    rows = g(N, times=3, dim=64) * 10.0 ** g(N, times=1, dim=64)
    return (rows * 10.0 ** (2 * g(N, times=1))).clip(-3e4, 3e4).astype(np.float32)


def copies(g):
    """A third are equal to the bit, a third nearly."""
    rows = np.repeat(g(1, times=2, dim=300), N, axis=0)
    rows[1::3] += 1e-6 * rows[1::3] * g(N, times=2, dim=300)[1::3]
    rows[2::3] = g(N, times=2, dim=300)[2::3]
    return rows


def tiny(g):
    return (1e-18 * g(N, times=2, dim=50) * 10.0 ** (8 * g(N, times=1))).astype(np.float32)


def one_by_one(g):
    """Row by row the sum lies a little above a place where float32 rounds."""
    rows = np.full((N, 1, 1, 1, 513), 2.0**-13, np.float32)
    rows[..., 0] = 1
    return rows * (1 + g(N, times=1) * 1e-4)


ROWS = {f.__name__: f for f in (constant, cancelling, all_sizes, copies, tiny, one_by_one)}


def stores(folder, kind, dtype):
    seeds = iter(range(10))
    rows = ROWS[kind](lambda n, times, dim=1: drawn(n, 1, times, 1, dim, seed=next(seeds)))
    asked = np.concatenate([rows[:1], rows[-1:], np.abs(rows[5:6])])
    return torch.from_numpy(asked), made(folder / "x", rows, dtype, segment_bytes=10**6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int8_parts"])
@pytest.mark.parametrize("kind", ROWS)
def test_proven_is_said_of_real_numbers(tmp_path, kind, dtype):
    asked, train = stores(tmp_path, kind, dtype)
    for scale in ("unit", "norm", "none"):
        linear = InnerProduct(asked, scale)
        real = real_scores(asked.numpy(), train, scale)
        # The bound on the error holds for every score.
        found = np.concatenate([scores.numpy() for _, scores in scan(linear, train)], axis=1)
        bound = ErrorBound(linear, train)
        errors = np.stack([bound.errors(query, slice(None)) for query in range(3)])
        assert (np.abs(found - real) <= errors + np.abs(real) * 1e-17).all()
        queries, factors = asked.flatten(1), row_factors(train, linear)
        read = scores_of_rows(train, linear, factors, queries, np.arange(N)).numpy()
        assert (np.abs(read - real) <= errors).all()
        # So does what an index says of rows that it does not read.
        for directions in (1, 9):
            index = ProjectionIndex.build(train, linear, directions)
            assert (real <= index.bounds(queries)).all()
            assert (-real <= index.bounds(-queries)).all()
        # The answers are one list, that of the real numbers as they are shown.
        for sign in (1, -1):
            signed = (sign * real).astype(np.float32)
            order = np.argsort(-signed, axis=1, kind="stable")[:, :10]
            scores, rows, tied = best_of_all(linear.times(sign), train, 10)
            assert np.array_equal(rows, order)
            assert np.array_equal(scores, np.take_along_axis(signed, order, 1))
            assert np.array_equal(
                tied,
                (signed == scores.numpy()[:, -1:]).sum(1)
                - ((scores == scores[:, -1:]).sum(1).numpy()),
            )
            certain = Certified(9).search(linear, train, 10, sign)
            assert np.array_equal(certain.rows, rows) and np.array_equal(certain.tied, tied)
            assert np.array_equal(sign * certain.scores, scores)


@pytest.mark.parametrize("most", [0, 3, 1000])
def test_many_contenders_change_nothing(tmp_path, monkeypatch, most):
    monkeypatch.setattr(contenders_module, "MOST", most)
    asked, train = stores(tmp_path, "copies", "float16")
    linear = InnerProduct(asked, "unit")
    shown = real_scores(asked.numpy(), train, "unit").astype(np.float32)
    best = contenders_module.BestRows(linear, train, 5)
    for first, scores in scan(linear, train, rows=4):
        best.update(scores, first)
    scores, rows, tied = best.finish()
    assert np.array_equal(rows, np.argsort(-shown, axis=1, kind="stable")[:, :5])
    last = scores.numpy()[:, -1:]
    assert np.array_equal(tied, (shown == last).sum(1) - (scores.numpy() == last).sum(1))


def test_sums_that_overflow_are_scored_in_double(tmp_path):
    rows = np.full((9, 1, 1, 1, 40), 3e38, np.float32)
    rows[..., 20:] *= -1
    rows[:, 0, 0, 0, 0] = np.arange(9) * 1e37
    rows[8] = 1e30
    train = made(tmp_path / "x", rows)
    linear = InnerProduct(torch.full((1, 1, 1, 1, 40), 0.5), "none")
    with np.errstate(over="ignore", invalid="ignore"):
        for found in (best_of_all(linear, train, 3), Certified(3).search(linear, train, 3)):
            assert found[1].tolist() == [[8, 7, 6]]


def test_equal_directions_tie_and_are_ordered_by_row(tmp_path):
    rows = constant(lambda n, times: drawn(n, 1, times, 1, 1))
    train = made(tmp_path / "x", rows)
    linear = InnerProduct(torch.from_numpy(rows[3:4]) / 100, "unit")
    for found in (best_of_all(linear, train, 9), Certified(2).search(linear, train, 9)):
        assert found[1].tolist() == [list(range(9))]


def test_the_loop_adds_up_no_more_in_float32_than_the_bound_allows():
    kernel = scan_module.kernel()
    assert max(kernel.COLUMNS // kernel.LANES, kernel.LINE) <= kernel.SHORT == 128
