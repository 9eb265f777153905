"""Retrieval in parts: whatever the cuts, the bits of the one scan."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from attribution.made_stores import drawn, made, preset

from dmin.attribution import (
    Certified,
    DMin,
    FeatureSet,
    merged,
    ranked_groups,
    retrieve,
    retrieve_part,
    scores,
)
from dmin.attribution.search.selection import Groups, Selection
from dmin.cli.workspace.ranking_parts import joined
from dmin.runtime.errors import DminError
from dmin.workers.shard import Shard


def spectral_energy():
    return preset("spectral_energy")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    train = drawn(53)
    train[41] = train[17]  # equal scores, in different parts
    metadata = [{"label": row % 5} for row in range(53)]
    return made(folder / "q", drawn(3, seed=1)), made(folder / "t", train, metadata=metadata)


def same(one, other):
    assert np.array_equal(one.scores, other.scores)
    assert np.array_equal(one.train_rows, other.train_rows)
    a, b = one.contributions, other.contributions
    assert (a is None and b is None) or np.abs(a - b).max() < 1e-6
    assert (one.typical is None) == (other.typical is None) and one.sampled is None
    assert one.typical is None or np.array_equal(one.typical, other.typical)
    assert one.train_ids == other.train_ids and one.train_metadata == other.train_metadata


def in_parts(stores, shards, method, k, selection, **options):
    parts = [
        retrieve_part(*stores, Shard(i, shards).range(53), method(), k, None, selection, **options)
        for i in range(shards)
    ]
    return merged([part for part in parts if part is not None], k, selection.min_score)


@pytest.mark.parametrize("shards", [1, 4, 60])
@pytest.mark.parametrize("method", [DMin, spectral_energy])
@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection(order="opponents"),
        Selection(where={"label": [1, 3]}),
        Selection(min_score=0.2),
    ],
    ids=["plain", "opponents", "where", "min_score"],
)
def test_parts_make_the_answer_of_one(stores, shards, method, selection):
    if method is spectral_energy:
        selection = replace(selection, min_score=None)
    whole = retrieve(*stores, method(), 7, None, selection)
    same(in_parts(stores, shards, method, 7, selection), whole)


def test_an_index_answers_in_parts_as_well(stores):
    whole = retrieve(*stores, DMin(), 5)
    found = in_parts(stores, 3, DMin, 5, Selection(), index=Certified(8))
    assert np.array_equal(found.train_rows, whole.train_rows)
    assert np.abs(found.scores - whole.scores).max() < 1e-6


def test_what_cannot_be_parted_is_refused(stores):
    one, other = retrieve(*stores, k=2), retrieve(*stores, k=2, selection=Selection("opponents"))
    with pytest.raises(DminError, match="different questions"):
        merged([one, other], 2)
    with pytest.raises(DminError, match=r"min_score=99.*strongest"):
        merged([one], 2, min_score=99)


@pytest.mark.parametrize("shards", [1, 4, 60])
@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
@pytest.mark.parametrize("order", ["proponents", "opponents"])
def test_groups_of_parts_are_those_of_one(stores, tmp_path, monkeypatch, shards, kind, order):
    monkeypatch.setattr(scores, "QUERY_BYTES", 1)  # each query a batch of its own
    selection = Selection(order, 0.01, {"label": [0, 1, 3, 4]}, "label", kind)
    whole = retrieve(*stores, DMin(), 3, None, selection)
    files = []
    for i in range(shards):
        part = retrieve_part(*stores, Shard(i, shards).range(53), DMin(), 3, None, selection)
        if part is not None:
            files.append(tmp_path / f"{i}")
            files[-1].write_bytes(part.dump())
    tallies = [Groups.load(file) for file in files[::-1]]
    found = ranked_groups(*stores, tallies, DMin(), 3, selection)
    same(found, replace(whole, scores=found.scores))
    assert np.abs(found.scores - whole.scores).max() < 1e-7 * (0 if kind == "max" else 1) + 1e-12
    files[0].write_bytes(files[0].read_bytes()[:-40])
    with pytest.raises(DminError, match=r"is damaged.*rank that part again"):
        Groups.load(files[0])


@pytest.mark.parametrize("order", [(2, 0, 1), range(59, -1, -1)], ids=len)  # some of 60 have none
@pytest.mark.parametrize("group_by", [None, "label"])
def test_shards_of_a_command_leave_their_parts_and_the_last_has_the_answer(
    stores, tmp_path, group_by, order
):
    queries, train = map(FeatureSet, stores)
    selection = Selection(group_by=group_by)
    told, answers = [], []
    for i in order:
        work = SimpleNamespace(
            resolved=lambda *names: dict.fromkeys(names),
            cfg=SimpleNamespace(name="d"),
            outputs=tmp_path,
            share=Shard(i, len(order)),
            console=SimpleNamespace(print=lambda text, **_: told.append(text)),
        )
        rows = Shard(i, len(order)).range(53)
        part = retrieve_part(*stores, rows, DMin(), 3, None, selection)
        answers.append(joined(work, part, queries, train, DMin(), selection, 3))
    *others, answer = answers
    assert set(others) == {None} and f"missing: {order[-1]})" in told[-1]
    whole = retrieve(*stores, DMin(), 3, None, selection)
    same(answer, replace(whole, scores=answer.scores))
    assert np.abs(answer.scores - whole.scores).max() < 1e-6
