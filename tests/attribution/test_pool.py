"""Pooled queries against the scores of each query, pooled by hand."""

import numpy as np
import pytest
from made_stores import drawn, made

from dmin.attribution import (
    Blend,
    Certified,
    DMin,
    GradDot,
    Pool,
    Pooled,
    SharpEnergy,
    Spectral,
    retrieve,
    score_matrix,
)
from dmin.attribution.copies import namesakes, with_copies
from dmin.attribution.features import FeatureSet
from dmin.attribution.search.selection import Selection
from dmin.attribution.wording import spell_same_as
from dmin.runtime.errors import DminError

METHODS = [DMin(), GradDot(), Spectral(), SharpEnergy(), Blend(DMin(), SharpEnergy(), share=0.5)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    many = 7
    rows = drawn(60 + many + 3, draws=2, groups=2, seed=4)
    metadata = [{"label": row % 3} for row in range(60)]
    train = made(folder / "x", rows[:60], metadata=metadata)
    good, bad = made(folder / "q", rows[60 : 60 + many]), made(folder / "a", rows[60 + many :])
    return FeatureSet(good), FeatureSet(bad), FeatureSet(train)


def asked(method, good, bad=None, kind="mean"):
    pool = Pool(good, bad, kind)
    return pool, Pooled(method, pool)


def by_hand(sides, method, kind, against):
    good, bad, train = sides
    pool = {"mean": np.mean, "max": np.max}[kind]
    found = pool(score_matrix(good, train, method).astype(float), 0)
    return found - pool(score_matrix(bad, train, method).astype(float), 0) * against


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("against", [False, True])
def test_pooled_scores_are_the_scores_pooled(sides, method, kind, against):
    good, bad, train = sides
    expected = by_hand(sides, method, kind, against)
    pool, method = asked(method, good, bad if against else None, kind)
    close = dict(rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(score_matrix(pool, train, method)[0], expected, **close)
    ranking = retrieve(pool, train, method, k=7)
    np.testing.assert_allclose(ranking.scores[0], np.sort(expected)[::-1][:7], **close)
    assert ranking.train_rows[0, 0] == expected.argmax()
    assert ranking.query_metadata[0]["pool"] == kind and len(ranking.query_ids) == 1
    assert ranking.query_metadata[0].get("against") == (bad.store.ids if against else None)
    assert ranking.query_metadata[0]["members"] == good.store.ids
    assert "q-3, …" in ranking.query_ids[0] and kind in ranking.method


@pytest.mark.parametrize("method", [DMin(), Spectral()], ids=lambda method: method.name)
def test_means_are_one_query_for_an_index(sides, method):
    good, bad, train = sides
    pool, pooled = asked(method, good, bad)
    for order in ("proponents", "opponents"):
        exact, proven = (
            retrieve(pool, train, pooled, 5, None, Selection(order), index)
            for index in (None, Certified(16))
        )
        np.testing.assert_array_equal(proven.train_rows, exact.train_rows)
        np.testing.assert_allclose(proven.scores, exact.scores, rtol=1e-6)
        assert "proven" in proven.notes["search"] and proven.contributions is not None
    with pytest.raises(DminError, match="max over queries scores are not inner products"):
        pool, pooled = asked(method, good, kind="max")
        retrieve(pool, train, pooled, 5, index=Certified(16))


def test_groups_are_ranked_by_pooled_scores(sides):
    good, bad, train = sides
    expected = by_hand(sides, DMin(), "max", True)
    pool, method = asked(DMin(), good, bad, "max")
    pooled = retrieve(pool, train, method, k=3, selection=Selection(group_by="label"))
    sums = sorted((expected[label::3].sum() for label in range(3)), reverse=True)
    np.testing.assert_allclose(pooled.scores[0], sums, rtol=1e-4)


def test_one_query_pooled_is_that_query(tmp_path, sides):
    one = made(tmp_path / "one", drawn(1, draws=2, groups=2, seed=9))
    alone = retrieve(one, sides[2], k=5)
    for kind in ("mean", "max"):
        pool, method = asked(DMin(), FeatureSet(one), kind=kind)
        pooled = retrieve(pool, sides[2], method, k=5)
        np.testing.assert_array_equal(pooled.train_rows, alone.train_rows)
        np.testing.assert_allclose(pooled.scores, alone.scores, rtol=1e-6)


@pytest.mark.parametrize("against", [False, True])
def test_pictures_that_are_training_images_are_told(sides, against):
    good, bad, train = sides
    pool, method = asked(DMin(), good, bad if against else None)
    ranking = retrieve(pool, train, method, k=3)
    shades = {id: np.full((1, 2, 2), n / 60) for n, id in enumerate(train.store.ids)}
    far = next(id for id in reversed(train.store.ids) if id not in ranking.train_ids[0])
    members = [shades[far], np.full((1, 2, 2), 0.999)]
    maybe = {pool.ids[0]: [far, train.store.ids[0]]}
    found = with_copies(ranking, shades.get, shades.get, maybe=maybe, members=members)
    assert found.same_as == [[far]]
    assert spell_same_as(found, 0) == f"pictures of this query are training images: {far}"
    ids = [id for side in pool.sides for id in side.store.ids]
    assert namesakes(pool, good) == {pool.ids[0]: [id for id in ids if id in good.store.ids]}
