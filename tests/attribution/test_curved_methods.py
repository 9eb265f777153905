"""Methods with a curvature, and likeness of images, against their formulas by explicit inverses."""

import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from made_stores import preset
from scipy.optimize import brentq
from torchmetrics.functional.image import structural_similarity_index_measure

from dmin.attribution import (
    DAS,
    SSIM,
    TRAK,
    Blend,
    DataInf,
    DMin,
    FeatureSet,
    GaussianKernel,
    PixelL2,
    SharpEnergy,
    Spectral,
    TrainingLoss,
    ZSum,
    retrieve,
    score_matrix,
)
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.methods.spectral import SpectralFamily
from dmin.attribution.search.approximate import Approximate
from dmin.attribution.search.certified import Certified
from dmin.data import Example, Examples
from dmin.runtime.errors import DminError
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

DRAWS, STEPS, GROUPS, DIM = 2, 3, 2, 8
READOUTS = ("loss", "mean_squared_output", "mean_output")
METHODS = [
    Spectral(),
    Spectral(0.5, 0.5, [1, 2, 0.5]),
    preset("spectral_energy", alpha=0.3, weights=[1, 2, 0.5]),
    SharpEnergy(),
    SharpEnergy(0.3, 1.0, [1, 2, 0.5], exponent=0.5, effective=None),
    SharpEnergy(length_weight=1.5, exponent=1.0, effective=2.5),
    ZSum(),
    TRAK(),
    preset("relative_if"),
    preset("renormalised_if"),
    preset("d_trak"),
    DAS(),
    DAS(leverage=False),
    DataInf(),
    Blend(SharpEnergy(), DAS(100.0, leverage=False), share=0.3),
    Blend(SharpEnergy(), SharpEnergy(length_weight=1.0, exponent=1.0), share=0.3),
    TrainingLoss(),
    GaussianKernel(),
    SSIM(0.5),
]


def side(path, prefix, count, seed):
    """Write a store of random gradients that share a few strong directions."""
    generator = np.random.default_rng(seed)
    layout = Layout(READOUTS, DRAWS, tuple(range(STEPS, 0, -1)), ("a", "b"), DIM)
    manifest = Manifest(layout, {}, {"name": prefix}, count, 16)
    common = np.random.default_rng(7).normal(size=(STEPS, GROUPS, DIM))
    features, norms = {}, {}
    for name in READOUTS:
        gradient = generator.normal(size=(count, *layout.row_shape)) + 2 * common
        gradient *= generator.gamma(2, size=(count, DRAWS, STEPS, 1, 1))
        length = np.linalg.norm(gradient.reshape(count, DRAWS, STEPS, -1), axis=-1)
        features[name] = gradient / length[..., None, None]
        norms[name] = np.linalg.norm(gradient, axis=-1)
    losses = generator.gamma(2, size=(count, DRAWS, STEPS))
    ids = [f"{prefix}-{i}" for i in range(count)]
    images = torch.from_numpy(generator.random((count, 1, 8, 8))).float()
    with StoreWriter(path, manifest) as writer:
        for block in range(manifest.num_blocks):
            part = slice(block * 16, min(count, (block + 1) * 16))
            rows = Rows(
                ids[part],
                [{}] * len(ids[part]),
                {name: values[part] for name, values in features.items()},
                {name: values[part] for name, values in norms.items()},
                losses[part],
            )
            writer.append(block, rows)
    return FeatureSet(
        Store(path), Examples([Example(i, x) for i, x in zip(ids, images, strict=True)])
    )


@pytest.fixture(scope="module", params=[40, 7], ids=["primal", "dual"])
def sides(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    return side(folder / "q", "q", 3, 1), side(folder / "x", "x", request.param, 2)


def features(side, readout):
    """Return float64 unit rows and gradients, both [n, D, T, G, k], from the store's arrays."""
    rows = side.store.features(readout).astype(np.float64)
    length = np.linalg.norm(side.store.norms(readout).astype(np.float64), axis=-1)
    return rows, rows * length[..., None, None]


def inverse(rows, method, p=1.0):
    """Return (C + λ)^−p by a dense eigendecomposition, and λ; rows [n, m]."""
    c = rows.T @ rows / len(rows)
    if method.effective is None:
        damping = method.alpha * np.trace(c) / min(rows.shape)
    else:  # dense, to its root
        values = np.linalg.eigvalsh(c)[-min(rows.shape) :]
        wanted = min(method.effective, len(values) / 2)
        damping = brentq(lambda x: (values / (values + x)).sum() - wanted, 1e-12, 1e3)
    if p == 1:
        return np.linalg.inv(c + damping * np.eye(len(c))), damping
    values, vectors = np.linalg.eigh(c + damping * np.eye(len(c)))
    return vectors * values**-p @ vectors.T, damping


def spectral(method, queries, train):
    q, x = (features(s, "loss")[0].reshape(len(s), DRAWS, STEPS, -1) for s in (queries, train))
    weights = np.ones(STEPS) if method.weights is None else np.array(method.weights)
    parts = []
    for t in range(STEPS):
        matrix, damping = inverse(x[:, :, t].reshape(-1, GROUPS * DIM), method, method.p)
        matrix = weights[t] * matrix * damping**method.p
        parts.append(np.einsum("qdm,mk,ndk->qn", q[:, :, t], matrix, x[:, :, t]) / DRAWS)
    return np.stack(parts, 2)


def by_hand(method, queries, train):
    """Each method's formula with the matrix written out and inverted."""
    if isinstance(method, Blend):
        parts = zip((1.0, 0.3), method.methods, strict=True)
        found = [(share, by_hand(part, queries, train)) for share, part in parts]
        return sum(share * x / x.std(1, keepdims=True) for share, x in found)
    if isinstance(method, TrainingLoss):
        losses = train.store.losses().astype(np.float64)
        return np.tile((losses / losses.mean(0)).mean(1).sum(1), (len(queries), 1))
    if isinstance(method, ZSum):
        plain, other = spectral(Spectral(p=0), queries, train), spectral(method, queries, train)
        return sum(x.sum(2) / x.sum(2).std(1, keepdims=True) for x in (plain, other))
    if isinstance(method, SharpEnergy):
        logs = [
            np.log(np.linalg.norm(s.store.norms("loss").astype(np.float64), axis=-1).mean(1))
            for s in (queries, train)
        ]
        z, own = ((x - logs[1].mean(0)) / logs[1].std(0) for x in logs)
        factor = np.exp(method.length_weight * np.tanh(z)[:, None] * own.clip(-3, 3)[None])
        return (spectral(method, queries, train) ** 2 * factor).sum(2) ** method.exponent
    if isinstance(method, Spectral):
        return spectral(method, queries, train).sum(2)
    if isinstance(method, GaussianKernel):
        q, x = pixels(queries), pixels(train)
        scale = ((x[:, None] - x[None]) ** 2).sum(2).mean()  # pairs with themselves as well
        return np.exp(-((q[:, None] - x[None]) ** 2).sum(2) / (2 * 0.3**2 * scale))
    if isinstance(method, SSIM):
        return np.array([[ssim(a, b) for b in pixels(train)] for a in pixels(queries)])
    readout = method.requires.readouts[0]
    if isinstance(method, DAS):
        return das(method, queries, train)
    q, x = (features(s, readout)[1].sum((1, 2)) for s in (queries, train))
    if isinstance(method, DataInf):
        return sum(datainf(q[:, g], x[:, g]) for g in range(GROUPS))
    q, x = q.reshape(len(q), -1), x.reshape(len(x), -1)
    matrix, _ = inverse(x, method)
    divisor = {"change": x @ matrix, "length": x, None: np.ones((len(x), 1))}[method.divisor]
    return q @ matrix @ x.T / np.linalg.norm(divisor, axis=1)


def das(method, queries, train):
    q, x = (
        features(side, "mean_output")[0].reshape(len(side), DRAWS, STEPS, -1)
        for side in (queries, train)
    )
    error = np.sqrt(train.store.losses().astype(np.float64))
    error /= error.mean(0)
    scores = np.zeros((len(q), len(x)))
    for t in range(STEPS):
        rows = x[:, :, t].reshape(-1, GROUPS * DIM)
        matrix = inverse(rows, method)[0] / len(rows)
        for d in range(DRAWS):
            change = q[:, d, t] @ matrix @ x[:, d, t].T * error[:, d, t]
            leverage = np.einsum("nm,mk,nk->n", x[:, d, t], matrix, x[:, d, t])
            scores += (change / (1 - leverage * method.leverage)) ** 2 / DRAWS
    return scores


def datainf(q, x):
    damping = 0.1 * (x**2).mean()
    eye = np.eye(DIM)
    return q @ np.mean([np.linalg.inv(damping * eye + np.outer(g, g)) for g in x], 0) @ x.T


def pixels(side):
    return np.stack([side.image(i).numpy().ravel() for i in side.store.ids]).astype(np.float64)


def ssim(a, b):
    """Wang et al. 2004, one window after another; σ = 0.5 spans five pixels, borders mirrored."""
    window = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    a, b = (np.pad(x.reshape(8, 8), 2, mode="reflect") for x in (a, b))
    found = []
    for i in range(8):
        for j in range(8):
            x, y = a[i : i + 5, j : j + 5], b[i : i + 5, j : j + 5]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x**2).sum() - mx**2, (window * y**2).sum() - my**2
            cov = (window * x * y).sum() - mx * my
            top = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
            found.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return np.mean(found)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_scores_follow_the_formula(sides, method):
    expected = by_hand(method, *sides)
    assert np.abs(score_matrix(*sides, method) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_blocks_are_scored_by_the_formula_too(sides, method):
    """What is one inner product is scanned as such; the method's own scores must agree."""
    queries, train = sides
    method.fit(train)
    asked = method.transform_query(queries.block(range(3), method.requires))
    found = method.score(asked, train.block(range(len(train)), method.requires)).numpy()
    expected = by_hand(method, queries, train)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    inner = ("spectral", "z_sum", "trak", "d_trak", "datainf")
    assert isinstance(asked, InnerProduct) == (method.name in inner)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("rows", [1, 5])
def test_scores_do_not_depend_on_the_blocks(sides, method, rows):
    whole = score_matrix(*sides, method)
    assert np.allclose(score_matrix(*sides, method, rows=rows), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_contributions_add_up_to_the_scores(sides, method):
    found = retrieve(*sides, method, k=4)
    divided = ("relative_if", "renormalised_if")
    splits = isinstance(method, DAS | DataInf | SpectralFamily | Blend | TRAK)
    splits = splits and method.name not in divided
    assert (found.contributions is not None) == splits
    if splits:
        assert np.allclose(found.contributions.sum(-1), found.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [{"p": 0.0}, {"alpha": 1e9}])
def test_dmin_is_a_member_of_the_spectral_family(sides, limit):
    assert np.allclose(
        score_matrix(*sides, Spectral(**limit)), score_matrix(*sides, DMin()), atol=1e-6
    )


@pytest.mark.parametrize("method", [Spectral(), TRAK(), ZSum(), DataInf()], ids=lambda m: m.name)
def test_every_search_serves_preconditioned_queries(sides, method):
    """They are vectors as others are: no search knows of the curvature."""
    exact = retrieve(*sides, method, k=5)
    certified = retrieve(*sides, method, k=5, index=Certified(6))
    assert "proven" in certified.notes["search"]
    found = [certified]
    if find_spec("faiss"):
        found.append(retrieve(*sides, method, k=5, index=Approximate("Flat", directions=6)))
    for ranking in found:
        assert np.array_equal(ranking.train_rows, exact.train_rows)
        assert np.allclose(ranking.scores, exact.scores, rtol=1e-4)


def test_the_path_is_walked_on_one_curvature(sides):
    queries, train = sides
    method = Spectral()
    method.fit(train)
    other = method.at(0.5, 2.0)
    assert other.curvature is method.curvature and (method.alpha, method.p) == (0.03, 1.0)
    asked = other.transform_query(queries.block(range(3), other.requires))
    scores = other.score(asked, train.block(range(len(train)), other.requires)).numpy()
    assert np.allclose(scores, score_matrix(queries, train, Spectral(0.5, 2.0)), atol=1e-6)


def test_methods_of_the_same_rows_share_one_fit(sides):
    train = sides[1]
    fresh, methods = (
        FeatureSet(train.store),
        [Spectral(), SharpEnergy(), DAS(), SharpEnergy(rank=3)],
    )
    for method in methods:
        method.fit(fresh)
    spectral, sharp, das, low = (method.curvature for method in methods)
    assert spectral is sharp and das is not spectral and low is not sharp
    fresh.fits.memory = low.nbytes  # so that only the last is kept
    TRAK(rank=3).fit(fresh)
    assert len(fresh.fits.kept) == 1
    both = Blend(SharpEnergy(), SharpEnergy(length_weight=1.0))
    both.fit(FeatureSet(train.store))
    assert both.methods[0].curvature is both.methods[1].curvature


def test_one_thing_decides_the_damping():
    for settings in ({"effective": 4.0}, {"alpha": None}):
        with pytest.raises(DminError, match="exactly one of the two sets the damping"):
            TRAK(**settings)
    with pytest.raises(DminError, match=r"method\.effective=0: give a positive"):
        SharpEnergy(effective=0)
    with pytest.raises(DminError, match=r"method\.length_weight=-1"):
        SharpEnergy(length_weight=-1)


def test_gradients_as_long_as_the_querys_count_more(sides):
    """Of two examples of one direction, the query's own length decides which is first."""
    train = sides[1]
    method = SharpEnergy(length_weight=1.0, exponent=1.0)
    method.fit(train)
    block = train.block(range(len(train)), method.requires)
    plain = SharpEnergy(exponent=1.0)
    plain.fit(train)
    lengths = block.norms["loss"].square().sum(-1).sqrt().mean((1, 2))
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    for own, favoured in ((longest, longest), (shortest, shortest)):
        asked = train.block([own], method.requires)
        ratio = method.score(method.transform_query(asked), block) / plain.score(
            plain.transform_query(asked), block
        )
        assert ratio[0, favoured] == ratio[0, [longest, shortest]].max() > 1


def test_a_low_rank_is_nearer_to_the_whole_than_none_is(sides):
    whole = score_matrix(*sides, Spectral(0.1))
    low, none = score_matrix(*sides, Spectral(0.1, rank=3)), score_matrix(*sides, DMin())
    aligned = [np.corrcoef(other.ravel(), whole.ravel())[0, 1] for other in (low, none)]
    assert aligned[1] < aligned[0] < 1 - 1e-6


def test_the_spread_is_that_of_a_sample_when_there_are_many(sides):
    queries, train = sides
    plain, other = (score_matrix(queries, train, m) for m in (DMin(), Spectral()))
    chosen = [0, len(train) // 3, 2 * len(train) // 3]
    expected = sum(x / x[:, chosen].std(1, keepdims=True) for x in (plain, other))
    assert np.allclose(score_matrix(queries, train, ZSum(sample=3)), expected, rtol=1e-4)


def test_the_curvature_is_described_in_the_log(sides, caplog):
    with caplog.at_level(logging.INFO, "dmin.attribution.curvature.damped"):
        Spectral().fit(sides[1])
    assert "of the energy; effective dimension" in caplog.text
    note = retrieve(*sides, Spectral(), k=2).notes["curvature"]
    assert "directions keep 100.0% of the energy; effective dimension" in note


def test_ssim_is_that_of_torchmetrics_and_one_for_a_copy(sides):
    queries, train = sides
    one = score_matrix(queries, queries, SSIM(0.5))
    assert np.allclose(one.diagonal(), 1, atol=1e-5)
    a, b = queries.image("q-0")[None], train.image("x-1")[None]
    expected = structural_similarity_index_measure(a, b, sigma=0.5, data_range=1.0)
    assert score_matrix(queries, train, SSIM(0.5))[0, 1] == pytest.approx(float(expected))


def test_a_gaussian_kernel_ranks_as_pixels_do(sides):
    one, other = score_matrix(*sides, GaussianKernel(1.0)), score_matrix(*sides, PixelL2())
    assert (one.argsort(1) == other.argsort(1)).all() and one.min() > 0 and one.max() <= 1


def test_a_part_that_scores_all_alike_adds_nothing_to_a_blend(sides):
    class Flat(DMin):
        def score(self, queries, train):
            return torch.full_like(super().score(queries, train), 0.5)

    alone, blend = (score_matrix(*sides, m) for m in (DMin(), Blend(DMin(), Flat(), share=1.0)))
    spread = alone.std(1, keepdims=True)
    np.testing.assert_allclose(blend, alone / spread, rtol=1e-4)


def test_settings_out_of_range_are_refused(sides):
    for method in (TRAK, DAS, DataInf, Spectral):
        with pytest.raises(DminError, match="alpha=0"):
            method(alpha=0)
    with pytest.raises(DminError, match="alpha=inf"):
        Spectral().at(float("inf"), 1)
    with pytest.raises(DminError, match="p=nan"):
        Spectral(p=float("nan"))
    for wrong in (lambda: ZSum(sample=1), lambda: Blend(DMin(), DAS(), sample=1)):
        with pytest.raises(DminError, match="sample=1"):
            wrong()
    with pytest.raises(DminError, match="exponent=0"):
        SharpEnergy(exponent=0)
    with pytest.raises(DminError, match="window of 23"):
        score_matrix(*sides, SSIM(3.0))
    with pytest.raises(DminError, match="bandwidth"):
        GaussianKernel(0)
    with pytest.raises(DminError, match="sigma"):
        SSIM(0)
