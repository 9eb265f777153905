"""Certified search against exact search, where it is easy, hard and hopeless."""

import shutil

import numpy as np
import pytest
import torch
from fuzz import FUZZ, note
from made_stores import drawn, made

from dmin.attribution import DMin, FeatureSet, GradCos, GradDot, retrieve, score_matrix
from dmin.attribution.search import certified as search_module
from dmin.attribution.search.certified import Certified, certified_search
from dmin.attribution.search.certified_bound import ProjectionIndex
from dmin.attribution.search.selection import Selection
from dmin.runtime.array_files import read_arrays, write_arrays
from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Store

N, DIM = 400, 32


def clustered(n, seed, clusters=8, spread=0.1):
    centres = drawn(clusters, dim=DIM, seed=99)
    which = np.random.default_rng(seed).integers(0, clusters, n)
    return centres[which] + spread * drawn(n, dim=DIM, seed=seed)


def two_levels(n, seed):
    """Half the rows lie within the leading directions, half without: bounds are far too wide."""
    rows = drawn(n, dim=DIM, seed=seed)
    rows[::2, ..., 4:] *= 1e-3
    return rows


DATA = {
    "random": lambda n, seed: drawn(n, dim=DIM, seed=seed),
    "clustered": clustered,
    "all the same": lambda n, seed: np.repeat(drawn(1, dim=DIM), n, axis=0),
    "nearly the same": lambda n, seed: drawn(1, dim=DIM) + 1e-6 * drawn(n, dim=DIM, seed=seed),
    "two levels": two_levels,
    "one direction": lambda n, seed: drawn(1, dim=DIM) * drawn(n, dim=1, seed=seed),
    "zeros": lambda n, seed: (
        drawn(n, dim=DIM, seed=seed) * (np.arange(n) % 3 > 0)[:, None, None, None, None]
    ),
}


def pair(folder, kind, dtype="float32"):
    rows = DATA[kind](N + 6, 0)
    return (
        made(folder / "q", rows[N:], dtype),
        made(folder / "x", rows[:N], dtype, block_size=16, segment_bytes=100_000),
    )


def test_many_queries_are_scanned_together_where_proofs_would_read_more(tmp_path, monkeypatch):
    rows = clustered(N + 40, 0)
    asked, train = made(tmp_path / "q", rows[N:]), made(tmp_path / "x", rows[:N])
    exact = retrieve(asked, train, k=3)
    monkeypatch.setattr(search_module, "WORTH", np.inf)
    assert "reading all" not in retrieve(asked, train, k=3, index=Certified(9)).notes["search"]
    monkeypatch.setattr(search_module, "WORTH", 0.5)
    found = retrieve(asked, train, k=3, index=Certified(9))
    assert found.notes["search"].endswith("32 of 40 queries by reading all")
    assert np.array_equal(found.train_rows, exact.train_rows)
    assert np.array_equal(found.scores, exact.scores)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("method", [DMin(), DMin([1, 2, 0.5]), DMin(renormalise=False), GradDot()])
@pytest.mark.parametrize("order", ["proponents", "opponents"])
def test_the_answer_is_that_of_exact_search(tmp_path, kind, method, order):
    stores = pair(tmp_path, kind)
    exact = score_matrix(*stores, method)
    sign = 1 if order == "proponents" else -1
    for directions in (1, 9, 1000):
        found = retrieve(
            *stores, method, 7, selection=Selection(order=order), index=Certified(directions)
        )
        assert "proven" in found.notes["search"]
        best = -np.sort(-sign * exact, axis=1)[:, :7]
        scale = np.abs(exact).max() * 1e-5
        np.testing.assert_allclose(sign * found.scores, best, atol=scale)
        chosen = np.take_along_axis(exact, found.train_rows, axis=1)
        np.testing.assert_allclose(chosen, found.scores, atol=scale)
        assert all(len(set(rows)) == 7 for rows in found.train_rows.tolist())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_stored_types(tmp_path, dtype):
    stores = pair(tmp_path, "clustered", dtype)
    exact, found = retrieve(*stores, k=5), retrieve(*stores, k=5, index=Certified(9))
    assert np.array_equal(found.train_rows, exact.train_rows)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)
    np.testing.assert_allclose(found.contributions, exact.contributions, atol=1e-5)


def linear_of(stores, method):
    asked = FeatureSet(stores[0]).block(range(len(stores[0])), method.requires)
    return method.transform_query(asked)


@pytest.mark.parametrize("kind", DATA)
def test_the_bound_holds_for_every_pair(tmp_path, kind):
    stores = pair(tmp_path, kind)
    linear = linear_of(stores, DMin())
    index = ProjectionIndex.build(stores[1], linear, directions=9)
    basis = torch.from_numpy(index.directions).double()
    assert (basis.T @ basis - torch.eye(len(basis.T))).abs().max() < 1e-6
    queries = linear.queries.flatten(1).double()
    rows = torch.from_numpy(stores[1].features("loss")).double()
    rows = torch.nn.functional.normalize(rows, dim=-1).flatten(1)
    inside, kept = rows @ basis, torch.from_numpy(index.decoded(slice(None))).double()
    left, rounding = (rows - inside @ basis.T).norm(dim=1), (inside - kept).norm(dim=1)
    bounds = index.bounds(linear.queries.flatten(1))
    assert ((queries @ rows.T).numpy() <= bounds).all()
    assert ((-queries @ rows.T).numpy() <= index.bounds(-queries.float())).all()
    # Tight enough to be of use: the allowances are not what makes it hold.
    assert (left.numpy() <= index.residuals).all()
    assert (rounding.numpy() <= index.roundings + 1e-6).all()
    np.testing.assert_allclose(index.residuals, left, atol=1e-2)
    asked = queries @ basis
    tight = asked @ kept.T + asked.norm(dim=1)[:, None] * rounding
    tight += (queries - asked @ basis.T).norm(dim=1)[:, None] * left
    np.testing.assert_allclose(bounds, tight, atol=3e-2)


def test_few_rows_are_read_where_rows_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "FIRST", 8)
    monkeypatch.setattr(search_module, "MOST", 8)
    stores = pair(tmp_path, "clustered")
    linear = linear_of(stores, DMin())
    index = ProjectionIndex.build(stores[1], linear, directions=9)
    found = certified_search(linear, stores[1], index, k=3)
    assert (found.read < 0.25 * N).all()
    chance = ProjectionIndex.build(stores[1], linear, directions=9, passes=0)
    assert index.residuals.mean() < 0.3 * chance.residuals.mean()


def test_ties_are_ordered_by_row(tmp_path):
    stores = pair(tmp_path, "all the same")
    rows = retrieve(*stores, k=30, index=Certified(4)).train_rows
    assert np.array_equal(rows, np.tile(np.arange(30), (6, 1)))


def test_a_filter_is_kept(tmp_path):
    rows = clustered(N + 4, 0)
    metadata = [{"label": row % 5} for row in range(N)]
    asked, train = made(tmp_path / "q", rows[N:]), made(tmp_path / "x", rows[:N], metadata=metadata)
    chosen = Selection(where={"label": 3})
    exact = retrieve(asked, train, k=6, selection=chosen)
    found = retrieve(asked, train, k=6, selection=chosen, index=Certified(9))
    assert np.array_equal(found.train_rows, exact.train_rows)


def test_the_index_is_kept_and_made_again_when_stale(tmp_path):
    asked, train = pair(tmp_path, "clustered")
    linear = linear_of((asked, train), DMin())
    built = ProjectionIndex.of(train, linear, 5)
    path = ProjectionIndex.path(train, linear, 5)
    stamp = path.stat().st_mtime_ns
    kept = ProjectionIndex.of(Store(train.path), linear, 5)
    assert np.array_equal(kept.codes, built.codes)
    assert path.stat().st_mtime_ns == stamp
    other = made(tmp_path / "y", DATA["random"](N, 3))
    with pytest.raises(DminError, match="build it again"):
        certified_search(linear, other, kept, 3)
    shutil.copy(path, ProjectionIndex.path(other, linear, 5))
    assert ProjectionIndex.of(other, linear, 5).kind["store"] == other.fingerprint


def test_every_flipped_bit_of_an_index_is_found_and_it_is_made_again(tmp_path):
    asked, train = pair(tmp_path, "clustered")
    linear = linear_of((asked, train), DMin())
    built = ProjectionIndex.of(train, linear, 5)
    path = ProjectionIndex.path(train, linear, 5)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    head = generator.choice(8 * 700, 20 * FUZZ, replace=False)
    for bit in [*head, *generator.integers(0, 8 * len(content), 20 * FUZZ)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.warns(DminWarning, match="it is rebuilt"):
            found = ProjectionIndex.of(train, linear, 5)
        assert np.array_equal(found.codes, built.codes) and path.read_bytes() == content
        note("bits anywhere in an index", "made again")


def test_an_index_of_other_shapes_is_made_again(tmp_path):
    asked, train = pair(tmp_path, "clustered")
    linear = linear_of((asked, train), DMin())
    ProjectionIndex.of(train, linear, 5)
    path = ProjectionIndex.path(train, linear, 5)
    about, arrays = read_arrays(path)
    write_arrays(path, about, {**arrays, "codes": arrays["codes"][:200]})
    with pytest.warns(DminWarning, match="its arrays are not those of this store"):
        assert ProjectionIndex.of(train, linear, 5).codes.shape == (N, 5)


def test_an_index_that_cannot_be_kept_is_in_memory(tmp_path, monkeypatch):
    asked, train = pair(tmp_path, "clustered")

    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dmin.runtime.files.os.rename", refused)
    with pytest.warns(
        DminWarning, match=r"could not be saved \(Read-only file system\): it is kept in"
    ):
        found = retrieve(asked, train, k=5, index=Certified(9))
    assert np.array_equal(found.train_rows, retrieve(asked, train, k=5).train_rows)
    assert not list(train.path.glob("index-*"))


def test_one_index_object_serves_several_scales(tmp_path):
    stores, index = pair(tmp_path, "clustered"), Certified(9)
    for method in (DMin(), GradDot(), DMin()):
        found = retrieve(*stores, method, k=5, index=index)
        assert np.array_equal(found.train_rows, retrieve(*stores, method, k=5).train_rows)


def test_where_no_index_helps(tmp_path):
    stores = pair(tmp_path, "random")
    with pytest.raises(DminError, match="grad_cos scores are not inner products"):
        retrieve(*stores, GradCos(), index=Certified(4))
    for directions in (0, 2.5, "4", None):
        with pytest.raises(DminError, match=f"index.directions='?{directions}.*1 or more"):
            Certified(directions)
