"""What groups of layers add to a score, against Shapley's and Aumann's own definitions."""

import itertools
from dataclasses import replace
from math import factorial

import numpy as np
import pytest
import torch
from made_stores import drawn, made, preset

from dmin.attribution import (
    DAS,
    TRAK,
    Blend,
    DMin,
    FeatureSet,
    GradDot,
    Random,
    SharpEnergy,
    Spectral,
    retrieve,
)
from dmin.attribution.methods.popularity import PopularityCorrected
from dmin.attribution.search.selection import Selection
from dmin.runtime.errors import DminError

GROUPS, DRAWS = 3, 2
SPLIT = {
    "dmin": DMin,
    "grad_dot": GradDot,
    "trak": TRAK,
    "spectral": Spectral,
    "spectral_energy": lambda: preset("spectral_energy"),
    "sharp_energy": lambda: SharpEnergy(exponent=1.5, length_weight=0.5),
    "das": DAS,
    "blend": lambda: Blend(preset("spectral_energy"), DMin()),
    "popularity": lambda: PopularityCorrected(preset("spectral_energy"), references=4),
}


def sides(folder, method):
    readout = method.requires.readouts[0]
    settings = {"readout": readout}
    train = made(folder / "train", drawn(20, DRAWS, 3, GROUPS, 8), **settings)
    queries = made(folder / "queries", drawn(2, DRAWS, 3, GROUPS, 8, seed=1), **settings)
    return queries, train


@pytest.mark.parametrize("name", SPLIT)
def test_what_groups_add_sums_to_the_score(name, tmp_path):
    method = SPLIT[name]()
    queries, train = sides(tmp_path, method)
    ranking = retrieve(queries, train, method, k=5, selection=Selection(split=True))
    assert ranking.groups == ("g0", "g1", "g2")
    total = ranking.group_contributions.sum(2)
    np.testing.assert_allclose(total, ranking.scores, rtol=1e-4, atol=1e-6)
    whole = SPLIT[name]()
    plain = retrieve(queries, train, whole, k=5)
    np.testing.assert_allclose(plain.contributions, ranking.contributions, rtol=1e-6)
    asked = whole.transform_query(FeatureSet(queries).block([0], whole.requires))
    block = FeatureSet(train).block(ranking.train_rows[0], whole.requires)
    parts = whole.contributions(asked, block)[0].numpy()
    close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(parts).max()}
    np.testing.assert_allclose(ranking.contributions[0], parts.sum(2), **close)
    np.testing.assert_allclose(ranking.group_contributions[0], parts.sum(1), **close)
    np.testing.assert_allclose(whole.score(asked, block)[0], parts.sum((1, 2)), **close)


def fitted(name, tmp_path):
    """A method, a query as it wants it, a block, and its score of some groups of the query."""
    method = SPLIT[name]()
    queries, train = sides(tmp_path, method)
    method.fit(FeatureSet(train))
    asked = method.transform_query(FeatureSet(queries).block([0], method.requires))
    block = FeatureSet(train).block(np.arange(6), method.requires)
    block.features.update({key: x.double() for key, x in block.features.items()})

    energy = name in ("spectral_energy", "sharp_energy")

    def of(weights):
        """The query with its groups times weights."""
        if name == "das":
            return asked.double() * weights[:, None]
        product = asked.product if energy else asked
        product = replace(product, queries=product.queries.double() * weights[:, None])
        return asked._replace(product=product) if energy else product

    shares = method.contributions(of(torch.ones(GROUPS)), block)[0].sum(1)  # [n, G]
    return lambda weights: method.score(of(weights), block)[0], shares


@pytest.mark.parametrize("name", ["dmin", "spectral", "spectral_energy", "das"])
def test_a_share_is_the_mean_of_what_a_group_adds_to_others(name, tmp_path):
    """Shapley's value by its definition: over all orders in which groups may come."""
    score, shares = fitted(name, tmp_path)
    for group in range(GROUPS):
        others = [g for g in range(GROUPS) if g != group]
        value = torch.zeros(6, dtype=torch.float64)
        for size in range(GROUPS):
            weight = factorial(size) * factorial(GROUPS - size - 1) / factorial(GROUPS)
            for before in itertools.combinations(others, size):
                without = torch.tensor([float(g in before) for g in range(GROUPS)]).double()
                with_it = without.clone()
                with_it[group] = 1
                value += weight * (score(with_it) - score(without))
        torch.testing.assert_close(shares[:, group].double(), value, rtol=1e-4, atol=1e-7)


def test_a_share_of_a_power_is_what_a_group_adds_while_all_grow_in_step(tmp_path):
    score, shares = fitted("sharp_energy", tmp_path)
    steps = 400
    for group in range(GROUPS):
        own = torch.zeros(GROUPS).double()
        own[group] = 0.5 / steps
        value = torch.zeros(6, dtype=torch.float64)
        for step in range(steps):
            all_of = torch.full((GROUPS,), (step + 0.5) / steps).double()
            value += score(all_of + own) - score(all_of - own)
        torch.testing.assert_close(shares[:, group].double(), value, rtol=2e-3, atol=1e-5)


def test_what_cannot_be_split_is_refused_before_anything_is_read(tmp_path):
    queries, train = sides(tmp_path, DMin())
    ask = Selection(split=True)
    with pytest.raises(
        DminError, match=r"random scores cannot be split.*sharp_energy.*split=false"
    ):
        retrieve(queries, train, Random(), k=2, selection=ask)
    assert retrieve(queries, train, Random(), k=2).groups == ()
    one = made(tmp_path / "one", drawn(9, groups=1))
    with pytest.raises(DminError, match=r"one group of layers only.*collect\.groups=block"):
        retrieve(one, one, DMin(), k=2, selection=ask)
    label = [{"label": n % 3} for n in range(9)]
    labelled = made(tmp_path / "labelled", drawn(9, groups=2), metadata=label)
    by_label = Selection(split=True, group_by="label")
    with pytest.raises(DminError, match=r"the sum over label.*group_score=max"):
        retrieve(labelled, labelled, DMin(), k=2, selection=by_label)
    found = Selection(split=True, group_by="label", group_score="max")
    assert retrieve(labelled, labelled, DMin(), k=2, selection=found).groups == ("g0", "g1")
