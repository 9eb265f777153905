"""Maps of where a score comes from, against gradients of single places by autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmin.attribution import TRAK, DMin, FeatureSet, PixelCosine, SharpEnergy, places, retrieve
from dmin.attribution.place_maps import _Split
from dmin.attribution.search.selection import Selection
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.models.base import READOUTS, Dropped, Prediction
from dmin.models.places import by_place
from dmin.runtime.errors import DminError
from dmin.sketches import Auto, BlockCyclic, FullGradient, TensorSketch


@pytest.fixture(scope="module")
def sides(ddpm, digits, tmp_path_factory):
    """Two queries, one about its left half, and six examples of whole gradients."""
    folder, half = tmp_path_factory.mktemp("places"), torch.zeros(1, 8, 8)
    half[..., :4] = 2
    asked = Examples([digits[20], replace(digits[21], mask=half)])
    collector = GradientCollector(ddpm, FullGradient(), Stratified(2), SharedNoise(draws=2))
    made = []
    for role, data in (("q", asked), ("x", Examples(digits.examples[:6]))):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        store = collector.collect(data, folder / role, dtype="float32", trainer=trainer)
        made.append(FeatureSet(store, data, origin=collector))
    return made


SOME = [0, 9, 36, 63]  # places


def by_autograd(loss, example, point):
    """Gradients of the loss at some places of one example, and as a whole."""
    pair = loss.pairs([example]).rows(slice(point, point + 1))
    weights = {n: w.clone().requires_grad_() for n, w in loss.weights.items()}
    each = by_place("loss", loss.predict(weights, pair)).flatten()
    values = [*each[SOME], each.sum()]
    rows = [torch.autograd.grad(v, list(weights.values()), retain_graph=True) for v in values]
    found = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return found[:-1], found[-1]


def test_maps_are_the_products_of_gradients_by_place_and_sum_to_the_score(sides):
    queries, train = sides
    found = places(queries, train, retrieve(queries, train, k=3), shown=1)
    split = _Split(queries, train, DMin())
    for (method, query, id), maps in found.items():
        expected = torch.zeros(2, len(SOME))
        for point in range(4):  # two draws at two timesteps
            of_query, g = by_autograd(split.asking, queries.example(query), point)
            of_train, h = by_autograd(split.known, train.example(id), point)
            scale = 1 / (g.norm() * h.norm()) / 2
            expected += torch.stack([of_train @ g, of_query @ h]) * scale
        assert method == "dmin"
        size = abs(maps.score)
        np.testing.assert_allclose(maps.train.flatten()[SOME], expected[0], atol=1e-5 * size)
        np.testing.assert_allclose(maps.query.flatten()[SOME], expected[1], atol=1e-5 * size)
        assert abs(maps.rest) < 1e-5 * size and abs(maps.query.sum() - maps.score) < 1e-5 * size
        if queries.example(query).mask is not None:
            assert not maps.query[:, 4:].any() and maps.train[:, 4:].any()
    assert [query for _, query, _ in found] == queries.store.ids


def test_other_inner_products_are_split_by_the_adjoint_of_the_sketch(sides):
    queries, train = sides
    method = TRAK()
    ranking = retrieve(queries, train, method, k=2)
    found = places(queries, train, ranking, method)
    assert len(found) == 4
    for maps in found.values():
        assert maps.query is None
        assert abs(maps.rest) < 1e-3 * abs(maps.score)


@pytest.mark.parametrize(
    "sketch",
    [Auto(64, block=8, from_size=64), BlockCyclic(64, block=8), TensorSketch(64, block=8)],
    ids=lambda sketch: sketch.family,
)
def test_the_adjoint_of_a_sketch(sides, sketch):
    parameters, row = sides[1].origin.attributed, torch.randn(1, 64)
    bound = sketch.bind(parameters)
    gradient = {name: torch.randn(1, *shape) for name, shape, _ in parameters.entries}
    back = bound.adjoint(row)
    whole = sum((back[name] * g[0]).sum() for name, g in gradient.items())
    assert float(whole) == pytest.approx(float((bound.of(gradient)[0] * row).sum()), rel=1e-3)


@pytest.mark.parametrize("readout", READOUTS)
def test_readouts_are_sums_over_places(readout):
    make = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 2, 4, 5, generator=make) for _ in range(3))
    mask = torch.rand(3, 1, 4, 5)
    dropped = Dropped(0.25, Prediction(c, b, torch.arange(3.0), mask=mask))
    prediction = Prediction(a, b, torch.arange(3.0), mask=mask, dropped=dropped)
    found = by_place(readout, prediction)
    assert found.shape == (3, 4, 5)
    torch.testing.assert_close(found.sum((1, 2)), READOUTS[readout](prediction))


def test_what_has_no_places_is_refused_by_name(sides):
    queries, train = sides
    ranking = retrieve(queries, train, k=1)
    with pytest.raises(DminError, match="method=sharp_energy computes another kind of score"):
        places(queries, train, ranking, SharpEnergy(effective=2.0))
    with pytest.raises(DminError, match="method=pixel_cosine does not compare gradients"):
        places(queries, train, ranking, PixelCosine())
    grouped = retrieve(queries, train, k=1, selection=Selection(group_by="label"))
    with pytest.raises(DminError, match="groups of examples are ranked"):
        places(queries, train, grouped)
    with pytest.raises(DminError, match="only a store was given"):
        places(queries, FeatureSet(train.store, train.dataset), ranking)
    own = Prediction(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1))
    with pytest.raises(DminError, match="a loss of its own"):
        by_place("loss", own._replace(loss=torch.ones(1)))
