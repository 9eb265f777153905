"""Scores at some timesteps against those of a store that has no others."""

import numpy as np
import pytest
from made_stores import TIMES, drawn, made, preset

from dmin.attribution import (
    Approximate,
    AtTimesteps,
    Blend,
    Certified,
    DMin,
    FeatureSet,
    JourneyTRAK,
    Pool,
    Pooled,
    SharpEnergy,
    retrieve,
    score_matrix,
)
from dmin.attribution.methods.popularity import PopularityCorrected
from dmin.attribution.search.selection import Selection
from dmin.runtime.errors import DminError

READOUTS = {"das": "mean_output", "d_trak": "mean_squared_output"}
PRESETS = ("dmin", "dmin_paper", "dmin_unnormalised", "grad_dot", "grad_cos", "datainf", "spectral")
PRESETS += ("trak", "relative_if", "spectral_energy", "sharp_energy", "z_sum", *READOUTS)
KEPT = [0, 2]  # of 900, 500, 100


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """By readout: queries and training examples, whole and at two timesteps alone."""
    place, found = tmp_path_factory.mktemp("at"), {}
    draw = np.random.default_rng(3)
    rows = {"q": drawn(3, draws=2, groups=2, seed=1), "x": drawn(40, draws=2, groups=2, seed=2)}
    lengths = {n: draw.uniform(0.5, 2, r.shape[:4]).astype(np.float32) for n, r in rows.items()}
    losses = {n: draw.uniform(0.5, 2, r.shape[:3]).astype(np.float32) for n, r in rows.items()}
    for readout in ("loss", *READOUTS.values()):
        for kept in ([0, 1, 2], KEPT):
            found[readout, len(kept)] = [
                FeatureSet(
                    made(
                        place / readout / str(len(kept)) / name,
                        rows[name][:, :, kept],
                        metadata=[{"label": n % 3} for n in range(len(rows[name]))],
                        readout=readout,
                        norms=lengths[name][:, :, kept],
                        losses=losses[name][:, :, kept],
                        times=[TIMES[k] for k in kept],
                    )
                )
                for name in rows
            ]
    return found


def at(method):
    return AtTimesteps(method, (100, 900))


def same(found, expected):
    np.testing.assert_array_equal(found.train_rows, expected.train_rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    assert found.timesteps == expected.timesteps == (900, 100)
    for name in ("contributions", "group_contributions", "maximum"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", PRESETS)
def test_the_answer_is_that_of_a_store_of_these_timesteps(sides, name):
    readout = READOUTS.get(name, "loss")
    found = retrieve(*sides[readout, 3], at(preset(name)), k=6)
    same(found, retrieve(*sides[readout, 2], preset(name), k=6))
    assert found.method.endswith("at t = 100, 900")
    assert all(each["timesteps"] == "900, 100" for each in found.query_metadata)


@pytest.mark.parametrize(
    "made_of",
    [
        lambda wrap, queries: (queries, wrap(Blend(DMin(), SharpEnergy(), share=0.5))),
        lambda wrap, queries: (queries, PopularityCorrected(wrap(DMin()))),
        *(
            lambda wrap, queries, kind=kind: (
                pool := Pool(queries, kind=kind),
                Pooled(wrap(SharpEnergy() if kind == "max" else DMin()), pool),
            )
            for kind in ("mean", "max")
        ),
    ],
    ids=["blend", "popularity", "mean", "max"],
)
def test_it_composes_with_other_questions(sides, made_of):
    (whole, train), (some, few) = sides["loss", 3], sides["loss", 2]
    queries, method = made_of(at, whole)
    others, plain = made_of(lambda method: method, some)
    same(retrieve(queries, train, method, k=5), retrieve(others, few, plain, k=5))


@pytest.mark.parametrize("order", ["proponents", "opponents"])
def test_it_composes_with_every_search(sides, order):
    (queries, train), few = sides["loss", 3], sides["loss", 2]
    for name in ("dmin", "spectral", "trak"):
        expected = retrieve(*few, preset(name), 5, selection=Selection(order))
        proven = retrieve(
            queries, train, at(preset(name)), 5, None, Selection(order), Certified(16)
        )
        same(proven, expected)
    pytest.importorskip("faiss")
    near = retrieve(queries, train, at(DMin()), 5, index=Approximate("Flat", candidates=40))
    same(near, retrieve(*few, DMin(), 5))
    groups = Selection(order, group_by="label")
    found = retrieve(queries, train, at(DMin()), 3, selection=groups)
    np.testing.assert_allclose(
        found.scores, retrieve(*few, DMin(), 3, selection=groups).scores, rtol=1e-4
    )


def test_it_reaches_checkpoints_and_states_of_a_generation(sides, tmp_path):
    sizes = {"q": 3, "x": 20}
    rows = {(n, m): drawn(c, seed=9 * m + c) for m in range(3) for n, c in sizes.items()}

    def pair(kept):
        times, found = [TIMES[k] for k in kept], {}
        for (name, model), values in rows.items():
            place = tmp_path / str(len(kept)) / str(model) / name
            norms = np.ones(values.shape[:4], np.float32)[:, :, kept] + model
            found[name, model] = FeatureSet(
                made(place, values[:, :, kept], norms=norms, times=times)
            )
        return [
            FeatureSet(
                found[name, 0].store,
                checkpoints={"later": found[name, 1]},
                trajectory=[found[name, 1], found[name, 2]] if name == "q" else [],
            )
            for name in sizes
        ]

    whole, few = pair([0, 1, 2]), pair(KEPT)
    methods = [preset(name, checkpoints=["later"]) for name in ("tracin", "gas", "trak_ensemble")]
    for method in (*methods, JourneyTRAK()):
        expected = score_matrix(*few, method)
        np.testing.assert_allclose(score_matrix(*whole, at(method)), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("timesteps", "told"),
    [
        ((100, 250), "t = 250 is not among the timesteps of the store, which are 900, 500, 100"),
        ((), "give each once"),
        ((100, 100), "give each once"),
    ],
)
def test_timesteps_of_no_store_are_refused(sides, timesteps, told):
    with pytest.raises(DminError, match=told):
        retrieve(*sides["loss", 3], AtTimesteps(DMin(), timesteps), k=3)


@pytest.mark.parametrize("name", ["pixel_l2", "ssim", "random", "training_loss", "popularity"])
def test_what_has_no_timesteps_is_refused_by_name(name):
    with pytest.raises(DminError, match=f"method={name}"):
        at(preset(name))
