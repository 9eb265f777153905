"""Methods that run the model, against curvature matrices written out and inverted in float64."""

import numpy as np
import pytest
import torch
from torch.func import hessian, jacrev

from dmin.attribution import (
    CG,
    EKFAC,
    Arnoldi,
    AtTimesteps,
    DMin,
    FeatureSet,
    LiSSA,
    Unlearning,
    retrieve,
    score_matrix,
)
from dmin.attribution.curvature.functional_loss import FunctionalLoss
from dmin.attribution.curvature.hessian import LossCurvature
from dmin.attribution.curvature.kronecker import KroneckerCurvature, _factors
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit, Stratified
from dmin.gradients.factors import Correlation
from dmin.models.base import DiffusionModel, Prediction
from dmin.models.toy.mlp import MLP
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

DIGITS = Digits("train").examples


@pytest.fixture(scope="module")
def origin():
    """A FiLM-MLP of 501 parameters in float64, at two timesteps and two draws."""
    torch.manual_seed(0)
    model = MLP.small(width=3, depth=1, embedding=2).double().eval()
    sketch = BlockCyclic(256, block=64)
    return GradientCollector(model, sketch, Stratified(2), SharedNoise(draws=2))


@pytest.fixture(scope="module")
def sides(origin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model methods")
    made = []
    for role, examples in (("q", DIGITS[20:23]), ("x", DIGITS[:9])):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False, precision="64-true")
        dataset = Examples(examples)
        store = origin.collect(dataset, folder / role, dtype="float32", trainer=trainer)
        made.append(FeatureSet(store, dataset, origin=origin))
    return tuple(made)


@pytest.fixture(scope="module")
def matrices(origin):
    """Hessian and GGN of the nine training examples, mean over them of the sum over points."""
    loss = FunctionalLoss(origin)
    pairs, here = loss.pairs(DIGITS[:9]), loss.flat(loss.weights)
    h = hessian(lambda v: loss.losses(loss.shaped(v), pairs).sum())(here) / 9
    j = jacrev(lambda v: loss.predict(loss.shaped(v), pairs).prediction.flatten())(here)
    return {"hessian": h, "ggn": 2 / 64 / 9 * j.T @ j}


def influence(origin, sides, inverse):
    """⟨S M g(q), S g(i)⟩ with every matrix and gradient formed."""
    loss = FunctionalLoss(origin)
    q, x = (loss.gradients([s.example(i) for i in s.store.ids]) for s in sides)
    rows = [origin.sketch.of(loss.shaped(g))[:, 0] for g in (q @ inverse.T, x)]
    return (rows[0] @ rows[1].T).numpy()


def relative(found, expected):
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def test_gradients_are_those_of_the_store(origin, sides):
    loss, store = FunctionalLoss(origin), sides[1].store
    rows = store.features("loss") * store.norms("loss")[..., None]
    found = origin.sketch.of(loss.shaped(loss.gradients(DIGITS[:9], batch_size=3)))
    assert relative(found.numpy()[:, 0], rows.sum((1, 2))[:, 0]) < 1e-5


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
class TestProducts:
    @pytest.mark.parametrize("forward", [True, False], ids=["forward", "transposed"])
    def test_they_are_those_of_the_matrix(self, origin, matrices, kind, forward):
        v = torch.randn(501, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        operator = LossCurvature(FunctionalLoss(origin), DIGITS[:9], kind, batch_size=5)
        operator.loss.forward = forward
        assert relative(operator.product(v), matrices[kind] @ v) < 1e-12
        assert operator.loss.forward == forward

    def test_an_example_that_counts_thrice_is_as_three(self, origin, kind):
        v = torch.randn(501, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loss, counts = FunctionalLoss(origin), torch.tensor([1.0, 3.0, 1.0, 2.0])
        there = [DIGITS[n] for n in (0, 1, 1, 1, 2, 3, 3)]
        told = LossCurvature(loss, DIGITS[:4], kind, 3, counts)
        assert relative(told.product(v), LossCurvature(loss, there, kind).product(v)) < 1e-12
        one = LossCurvature(loss, DIGITS[1:2], kind, 8, counts[1:2])
        assert relative(told.product(v, one.pairs), one.product(v)) < 1e-12

    def test_leading_eigenpairs(self, origin, matrices, kind):
        values, vectors = LossCurvature(FunctionalLoss(origin), DIGITS[:9], kind).eigenpairs(4)
        dense = torch.linalg.eigvalsh(matrices[kind])
        largest = dense[dense.abs().argsort(descending=True)[:4]].sort(descending=True).values
        assert torch.allclose(values, largest, rtol=1e-6)
        assert torch.allclose(vectors @ matrices[kind], values[:, None] * vectors, atol=1e-4)

    def test_timesteps_add_up(self, origin, kind):
        v, parts = torch.ones(501, dtype=torch.float64), []
        for timesteps in (None, origin.timesteps[:1], origin.timesteps[1:]):
            operator = LossCurvature(FunctionalLoss(origin, timesteps), DIGITS[:9], kind)
            parts.append(operator.product(v))
        assert torch.allclose(parts[0], parts[1] + parts[2])


def test_a_network_without_forward_derivatives_is_differentiated_all_the_same(ddpm, digits):
    """Group norm of a strided tensor has none in torch; the product is checked by differences."""
    origin = GradientCollector(ddpm, BlockCyclic(256), Stratified(1))
    loss = FunctionalLoss(origin)
    loss.weights = {name: value.double() for name, value in loss.weights.items()}
    operator = LossCurvature(loss, digits.examples[:1], "hessian")
    operator.pairs = [p._replace(x0=p.x0.double(), noise=p.noise.double()) for p in operator.pairs]
    v = torch.randn(loss.count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, (pairs,) = loss.flat(loss.weights), operator.pairs
    gradient = torch.func.grad(lambda w: loss.losses(loss.shaped(w), pairs).sum())
    step = 1e-5 / v.norm()
    expected = (gradient(here + step * v) - gradient(here - step * v)) / (2 * step)
    assert relative(operator.product(v).detach(), expected.detach()) < 1e-4


def solved(origin, sides, matrix, damping=0.1):
    values = torch.linalg.eigvalsh(matrix)
    shift = damping * values.abs().max()
    return influence(origin, sides, torch.linalg.inv(matrix + shift * torch.eye(len(matrix))))


@pytest.mark.parametrize(
    "method",
    [
        CG(0.1, tolerance=1e-6),
        CG(0.1, batch_size=7, tolerance=1e-6),
        LiSSA(0.1, steps=100),
    ],
    ids=["cg", "cg in batches", "lissa"],
)
def test_inverses_are_those_of_the_dense_matrix(origin, sides, matrices, method):
    expected = solved(origin, sides, matrices["ggn"])
    found = score_matrix(*sides, method)
    assert relative(found, expected) < 2e-3
    assert np.sign(found.sum()) == np.sign(expected.sum())


def test_arnoldi_is_the_inverse_within_the_leading_eigenvectors(origin, sides, matrices):
    values, vectors = torch.linalg.eigh(matrices["ggn"])
    values, vectors = values.flip(0), vectors.flip(1)
    rank = 4 + int((values[3:12] / values[4:13]).argmax())  # at a gap, so that it is unique
    inverse = vectors[:, :rank] / (values[:rank] + 0.1 * values[0]) @ vectors[:, :rank].T
    found = score_matrix(*sides, Arnoldi(0.1, rank=rank))
    assert relative(found, influence(origin, sides, inverse)) < 0.01


def test_random_batches_give_the_inverse_in_the_mean(origin, sides, matrices):
    expected = solved(origin, sides, matrices["ggn"], 0.3)
    found = score_matrix(*sides, LiSSA(0.3, batch_size=12, steps=40, repeats=8))
    assert relative(found, expected) < 0.3


def test_the_hessian_where_it_is_positive_enough(origin, sides, matrices):
    found = score_matrix(*sides, CG(2.0, curvature="hessian", tolerance=1e-6))
    assert relative(found, solved(origin, sides, matrices["hessian"], 2.0)) < 1e-3
    with pytest.raises(DminError, match=r"not positive.*ggn"):
        score_matrix(*sides, CG(1e-3, curvature="hessian"))
    with pytest.raises(DminError, match="diverged"):
        score_matrix(*sides, LiSSA(1e-3, curvature="hessian", steps=1500))


class Regression(DiffusionModel):
    """Predicts the noise by one linear layer of the noised image: its GGN is known."""

    timesteps = range(9, -1, -1)

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Linear(64, 64, bias=bias).double()

    def predict(self, x0, noise, t, condition):
        x = (x0 + (1 + t)[:, None, None, None] * noise).flatten(1)
        return Prediction(self.network(x), noise.flatten(1), torch.ones(len(x0)))


def kronecker(model, count, samples, counts=None, **settings):
    origin = GradientCollector(model, BlockCyclic(256), Explicit([2, 7]), SharedNoise())
    loss = FunctionalLoss(origin)
    found = KroneckerCurvature(loss, origin.attributed, **settings)
    total = count if counts is None else float(counts.sum())
    found.fit(loss.pairs(DIGITS[:count], counts), total, samples, 256, 0)
    return loss, found


@pytest.mark.parametrize("method", [CG(), LiSSA(steps=1), EKFAC(samples=60)])
def test_methods_count_an_example_as_often_as_an_epoch_passed_it(origin, sides, method):
    train, times = sides[1], torch.tensor([1, 4, 1, 1, 1, 1, 1, 1, 9.0], dtype=torch.float64)
    told = FeatureSet(train.store, train.dataset, origin=origin)
    told.counts = times
    rows = [n for n, count in enumerate(times) for _ in range(int(count))]
    there = FunctionalLoss(origin).pairs([DIGITS[n] for n in rows])
    method.fit(told)
    if isinstance(method, CG | LiSSA):
        exact = LossCurvature(FunctionalLoss(origin), [DIGITS[n] for n in rows])
        v = torch.ones(501, dtype=torch.float64)
        assert relative(method.operator.product(v), exact.product(v)) < 1e-12
        return
    exact = KroneckerCurvature(FunctionalLoss(origin), origin.attributed)
    exact.fit(there, len(rows), 60, 256, 1)
    for name, block in method.curvature.blocks.items():
        found, expected = block.values.sum(), exact.blocks[name].values.sum()
        torch.testing.assert_close(found, expected, rtol=0.15, atol=1e-12)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_is_exact_but_for_the_draw_of_targets(bias, counted):
    """GGN = 2/P · 1 ⊗ mean [x; 1][x; 1]ᵀ: a Kronecker product, so EK-FAC has it whole."""
    counts = 1.0 + torch.arange(40) % 7 if counted else None
    loss, found = kronecker(Regression(bias), 40, samples=150, counts=counts)
    x0, noise, t, _ = loss.pairs(DIGITS[:40])
    x = (x0 + (1 + t)[:, None, None, None] * noise).flatten(1)
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    r = torch.ones(40) if counts is None else counts
    moment = 2 / 64 / r.sum() * (r.repeat_interleave(2)[:, None] * x).T @ x
    assert found.diagonal == []
    block = found.blocks["weight"]
    assert block.bias == ("bias" if bias else None)
    rebuilt = torch.zeros_like(moment)
    for out in range(64):  # the block of one output
        weight = block.left[out].square() @ block.values
        rebuilt += block.right * weight @ block.right.T / 64
    assert relative(rebuilt, moment) < 0.03
    g = torch.randn(1, 64, x.shape[1], dtype=torch.float64)
    damping = 0.1 * moment.trace() / len(moment)
    expected = g @ torch.linalg.inv(moment + damping * torch.eye(len(moment)))
    assert float((block.power(g, 0.1, 1.0) - expected).norm() / expected.norm()) < 0.05


def test_layers_called_often_and_convolutions_have_their_own_second_moments(ddpm, digits):
    """In its eigenbasis each block has the second moments of the examples' own gradients."""
    origin = GradientCollector(ddpm, BlockCyclic(256), Stratified(1), SharedNoise())
    loss = FunctionalLoss(origin)
    found = KroneckerCurvature(loss, origin.attributed)
    found.fit(loss.pairs(digits.examples[:3]), 3, 1, 2, 0)
    plain = KroneckerCurvature(loss, origin.attributed, diagonal=True)
    plain.fit(loss.pairs(digits.examples[:3]), 3, 1, 2, 0)
    kinds = {name: block.left is not None for name, block in found.blocks.items()}
    assert kinds["conv_in.weight"] and kinds["time_embedding.linear_1.weight"]
    assert {"class_embedding.weight", "conv_norm_out.weight"} <= set(found.diagonal)
    covered = {*found.blocks, *(b.bias for b in found.blocks.values())} - {None}
    assert covered == set(plain.blocks) == {e.name for e in origin.attributed.entries}
    for name, block in found.blocks.items():  # a rotation leaves the trace
        total = plain.blocks[name].values.sum()
        if block.bias is not None:
            total = total + plain.blocks[block.bias].values.sum()
        assert torch.allclose(block.values.sum(), total, rtol=1e-4), name


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 11)),
        (torch.nn.Conv2d(3, 4, (1, 3), stride=(1, 2), padding=(0, 1)), (3, 5, 7)),
    ],
    ids=["signals", "images"],
)
def test_the_gradient_of_a_convolution_is_a_product_of_two_factors(layer, shape):
    inputs = torch.randn(5, *shape)
    output = torch.randn_like(layer(inputs))
    whole = Correlation(output, inputs, layer, layer.padding)
    one, other = _factors(whole)
    expected = whole.dense().flatten(2)
    assert torch.allclose(torch.einsum("npo,npi->noi", one, other), expected, atol=1e-4)


def flat_rows(loss, values):
    return torch.cat([values[name].flatten(1) for name in loss.weights], 1)


def test_ekfac_scores_are_the_sketched_products(origin, sides):
    method = EKFAC(0.1, batch_size=5)
    found = score_matrix(*sides, method)
    loss, identity = method.loss, torch.eye(501, dtype=torch.float64)
    inverse = flat_rows(loss, method.curvature.power(loss.shaped(identity), 0.1, 1.0))
    assert relative(inverse, inverse.T) < 1e-9 and (torch.linalg.eigvalsh(inverse) > 0).all()
    assert relative(found, influence(origin, sides, inverse)) < 1e-5


@pytest.mark.parametrize("fisher", ["ekfac", "diagonal"])
def test_unlearning_by_a_small_step_is_influence(origin, sides, fisher):
    method = Unlearning(1e-5, fisher)
    found = score_matrix(*sides, method)
    loss = method.loss
    g = [loss.gradients([s.example(i) for i in s.store.ids]) for s in sides]
    moved = flat_rows(loss, method.curvature.power(loss.shaped(g[0]), 0.1, 1.0))
    moved *= 1e-5 * loss.flat(loss.weights).norm() / moved.norm(dim=1, keepdim=True)
    expected = (moved @ g[1].T / loss.points).numpy()
    assert relative(found, expected) < 1e-3
    parts = retrieve(*sides, method, k=4)
    assert np.allclose(parts.contributions.sum(-1), parts.scores, rtol=1e-4)


@pytest.mark.parametrize("method", [EKFAC(), CG(), Unlearning()], ids=lambda m: m.name)
def test_scores_do_not_depend_on_the_blocks(sides, method):
    whole = score_matrix(*sides, method)
    assert np.allclose(score_matrix(*sides, method, rows=2), whole, rtol=1e-4)


@pytest.mark.parametrize("method", [EKFAC(), CG(), Unlearning()], ids=lambda m: m.name)
def test_at_one_timestep_they_are_of_a_store_of_it(origin, sides, method, tmp_path):
    first = origin.timesteps[:1]
    alone = GradientCollector(origin.model, origin.sketch, Explicit(first), origin.noise)
    few = []
    for role, side in zip("qx", sides, strict=True):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False, precision="64-true")
        store = alone.collect(side.dataset, tmp_path / role, dtype="float32", trainer=trainer)
        few.append(FeatureSet(store, side.dataset, origin=alone))
    expected = score_matrix(*few, method)
    assert relative(score_matrix(*sides, AtTimesteps(method, first)), expected) < 1e-4


def test_another_model_than_the_stores_is_refused(sides):
    queries, train = sides
    with pytest.raises(DminError, match="only a store"):
        score_matrix(queries, FeatureSet(train.store, train.dataset), EKFAC())
    other = GradientCollector(MLP.small(width=3, depth=1, embedding=2), BlockCyclic(256, block=64))
    with pytest.raises(DminError, match="another model"):
        score_matrix(queries, FeatureSet(train.store, train.dataset, origin=other), EKFAC())


def test_guided_queries_are_refused_where_their_gradient_is_computed_anew(sides, monkeypatch):
    queries, train = sides
    monkeypatch.setitem(queries.store.manifest.dataset, "guidance", 3.0)
    with pytest.raises(DminError, match=r"query_guidance=3, but method=ekfac"):
        score_matrix(queries, train, EKFAC())
    assert score_matrix(queries, train, DMin()).shape == (3, 9)


def test_settings_out_of_range_are_refused(origin):
    for wrong in (
        lambda: CG(damping=0),
        lambda: CG(iterations=0),
        lambda: LiSSA(steps=0),
        lambda: Arnoldi(rank=0),
        lambda: EKFAC(samples=0),
        lambda: Unlearning(step=-1),
    ):
        with pytest.raises(DminError, match="method"):
            wrong()
    with pytest.raises(DminError, match="choose timesteps of the store"):
        FunctionalLoss(origin, [3])
    with pytest.raises(DminError, match="count=501"):
        LossCurvature(FunctionalLoss(origin), DIGITS[:1]).eigenpairs(501)
