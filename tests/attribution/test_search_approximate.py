"""What faiss proposes is scored exactly, recall is what is said, a stale index is not used."""

import shutil
import sys

import numpy as np
import pytest
from made_stores import drawn, made

from dmin.attribution import Approximate, GradCos, retrieve
from dmin.attribution.search.selection import Selection
from dmin.runtime.array_files import read_arrays, write_arrays
from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Store

N, DIM = 400, 32


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faiss")
    centres = drawn(20, dim=DIM, seed=99)
    rows = centres[np.arange(N + 9) % 20] + 0.3 * drawn(N + 9, dim=DIM)
    return made(folder / "q", rows[N:], "float16"), made(folder / "x", rows[:N], "float16")


@pytest.fixture(autouse=True)
def faiss():
    return pytest.importorskip("faiss")


@pytest.mark.parametrize(
    "factory, search",
    [
        ("Flat", {}),
        ("HNSW8", {"efSearch": 64}),
        ("IVF{cells},Flat", {"nprobe": 8}),
        ("IVF4,PQ8x4", {"nprobe": 4}),
    ],
)
@pytest.mark.parametrize("order", ["proponents", "opponents"])
def test_recall_is_what_is_said(stores, factory, search, order):
    chosen = Selection(order=order)
    exact = retrieve(*stores, k=5, selection=chosen)
    index = Approximate(factory, search, directions=24, recall_queries=100)
    found = retrieve(*stores, k=5, selection=chosen, index=index)
    pairs = zip(found.train_rows.tolist(), exact.train_rows.tolist(), strict=True)
    recall = np.mean([len({*a} & {*b}) / 5 for a, b in pairs])
    assert f"recall {recall:.3f} measured on 9 queries" in found.notes["search"]
    assert recall > 0.6
    same = found.train_rows == exact.train_rows
    np.testing.assert_allclose(found.scores[same], exact.scores[same], atol=1e-5)
    np.testing.assert_allclose(found.contributions.sum(-1), found.scores, atol=1e-5)


def test_all_rows_proposed_is_exact_search(stores):
    index = Approximate("Flat", directions=4, candidates=100)
    found, exact = retrieve(*stores, k=5, index=index), retrieve(*stores, k=5)
    assert np.array_equal(found.train_rows, exact.train_rows)
    assert "recall 1.000" in found.notes["search"]


def test_an_index_is_kept_and_a_stale_one_not_used(tmp_path, stores, faiss, monkeypatch):
    bare = shutil.ignore_patterns("index-*")  # of other tests
    shutil.copytree(stores[1].path, tmp_path / "x", ignore=bare)
    made_ones = []
    original = faiss.index_factory
    monkeypatch.setattr(faiss, "index_factory", lambda *a: made_ones.append(a[1]) or original(*a))
    for _ in range(2):
        retrieve(stores[0], Store(tmp_path / "x"), k=5, index=Approximate("HNSW8"))
    assert len(made_ones) == 1
    other = made(tmp_path / "y", drawn(N, dim=DIM, seed=5), "float16")
    for file in (tmp_path / "x").glob("index-*"):
        shutil.copy(file, other.path)
    found = retrieve(stores[0], other, k=5, index=Approximate("HNSW8", recall_queries=9))
    assert len(made_ones) == 2 and "recall" in found.notes["search"]
    exact = retrieve(stores[0], other, k=5)
    np.testing.assert_allclose(found.scores[:, 0], exact.scores[:, 0], atol=0.5)
    (file,) = other.path.glob("index-*-faiss-*")
    about, arrays = read_arrays(file)
    for change in (arrays["index"][:50], faiss.serialize_index(original(DIM, "Flat"))):
        write_arrays(file, about, {"index": change})
        with pytest.warns(DminWarning, match="faiss finds no index of this store in it"):
            retrieve(stores[0], other, k=5, index=Approximate("HNSW8"))


@pytest.mark.parametrize(
    "index, message",
    [
        (Approximate("Foo"), "factory='Foo'"),
        (Approximate("PQ7"), "factory='PQ7'"),
        (Approximate("Flat", {"nprobe": 3}), "has no parameter nprobe=3"),
    ],
)
def test_what_faiss_does_not_know(stores, index, message):
    with pytest.raises(DminError, match=message):
        retrieve(*stores, k=5, index=index)


def test_what_cannot_be_asked(stores, monkeypatch):
    with pytest.raises(DminError, match="not inner products"):
        retrieve(*stores, GradCos(), k=5, index=Approximate())
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DminError, match=r"pip install 'dmin\[faiss\]', or set index=certified"):
        retrieve(*stores, k=5, index=Approximate())
