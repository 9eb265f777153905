"""Groups of parameters from the setting to the gallery, and one collection for several k."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmin.attribution import retrieve
from dmin.attribution.ranking import Ranking
from dmin.attribution.ranking_files import records, save_ranking
from dmin.attribution.ranking_json import load_ranking
from dmin.attribution.ranking_table import ranking_table
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.timesteps import Stratified
from dmin.gallery.html import save_html
from dmin.gallery.png import save_png
from dmin.gradients.groups import grouped
from dmin.gradients.parameters import Parameter, Parameters
from dmin.runtime.errors import DminError
from dmin.sketches import SJLT, BlockCyclic, FullGradient, MaskSJLT, TensorSketch
from dmin.store.maintenance import fold

NAMES = (
    "conv_in.weight",
    "down.0.a.weight",
    "down.0.a.bias",
    "down.1.weight",
    "scale",
    "norm.bias",
)
MODEL = Parameters(tuple(Parameter(name, (3, 2)) for name in NAMES))


@pytest.mark.parametrize(
    ("groups", "names", "places"),
    [
        (None, ("model",), [0, 0, 0, 0, 0, 0]),
        ("block", ("conv_in", "down.0", "down.1", "scale", "norm"), [0, 1, 1, 2, 3, 4]),
        ("layer", ("conv_in", "down.0.a", "down.1", "scale", "norm"), [0, 1, 1, 2, 3, 4]),
        (
            {"bias": "bias$", "down": r"^down\.", "rest": "."},
            ("bias", "down", "rest"),
            [2, 1, 0, 1, 2, 0],
        ),
    ],
)
def test_parameters_are_put_into_groups(groups, names, places):
    found = grouped(MODEL, groups)
    assert found.groups == names
    assert [entry.group for entry in found.entries] == places
    assert [entry.name for entry in found.entries] == list(NAMES)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("blocks", r"collect\.groups='blocks': allowed are null, block, layer"),
        ({}, "give one or more groups"),
        ({"down": "["}, r"collect\.groups\.down='\[' is not a regular expression"),
        ({"down": "down"}, r"3 parameter\(s\) match none of down: conv_in.weight, scale"),
        ({"all": ".", "down": "down"}, r"collect\.groups\.down='down': no parameter is left"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, message):
    with pytest.raises(DminError, match=message):
        grouped(MODEL, groups)


def collect(model, dataset, path, dtype="float32", **settings):
    collector = GradientCollector(model, timesteps=Stratified(2), **settings)
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector.collect(dataset, path, block_size=8, dtype=dtype, trainer=trainer), collector


@pytest.fixture(scope="module")
def few(digits):
    return Examples(digits.examples[:6])


@pytest.fixture(scope="module")
def whole(ddpm, few, tmp_path_factory):
    """The full gradients of all parameters in one group."""
    return collect(ddpm, few, tmp_path_factory.mktemp("whole") / "s", sketch=FullGradient())


GROUPS = {"attention": "attentions", "embedding": "embedding", "rest": "."}


def test_what_groups_contribute_sums_to_the_score_and_is_their_own(ddpm, few, whole, tmp_path):
    store, _ = collect(ddpm, few, tmp_path / "s", sketch=FullGradient(), groups=GROUPS)
    assert store.layout.groups == tuple(GROUPS)
    rows = store.features("loss").astype(np.float64)
    np.testing.assert_allclose(np.square(rows).sum((3, 4)), 1, rtol=1e-5)  # not each group
    ranking = retrieve(store, store, k=6)
    assert ranking.groups == tuple(GROUPS)
    np.testing.assert_allclose(ranking.group_contributions.sum(2), ranking.scores, atol=1e-4)
    # The oracle: the ungrouped gradients, cut where the parameters are.
    full, collector = whole
    flat = full.features("loss")[:, 0, :, 0].astype(np.float64)
    attributed = grouped(collector.attributed, GROUPS)
    of_scalar = np.repeat(
        [entry.group for entry in attributed.entries],
        [int(np.prod(entry.shape)) for entry in attributed.entries],
    )
    for query in range(6):
        for rank, row in enumerate(ranking.train_rows[query]):
            products = (flat[query] * flat[row]).sum(0)
            expected = [products[of_scalar == group].sum() for group in range(3)]
            found = ranking.group_contributions[query, rank]
            np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = retrieve(full, full, k=6)
    assert np.array_equal(plain.train_rows, ranking.train_rows)
    np.testing.assert_allclose(plain.scores, ranking.scores, atol=1e-4)
    assert plain.groups == () and plain.group_contributions is None


def test_groups_reach_files_and_gallery(ddpm, few, tmp_path):
    sketch = BlockCyclic(256)
    store, _ = collect(ddpm, few, tmp_path / "s", sketch=sketch, groups="block", dtype="int8")
    ranking = retrieve(store, store, k=3)
    assert ranking.groups[:2] == ("conv_in", "time_embedding") and len(ranking.groups) > 5
    np.testing.assert_allclose(ranking.group_contributions.sum(2), ranking.scores, atol=1e-4)
    loaded = load_ranking(save_ranking(ranking, tmp_path / "ranking"))
    assert loaded.groups == ranking.groups
    assert np.array_equal(loaded.group_contributions, ranking.group_contributions)
    record = records(ranking)[4]
    assert record["group_conv_in"] == pytest.approx(ranking.group_contributions[1, 1, 0])
    image = lambda name: few[few_index(few, name)].image.numpy()  # noqa: E731
    page = save_html(ranking, image, image, tmp_path / "gallery.html").read_text()
    assert json.dumps("time_embedding") in page and '"groupParts"' in page
    whole = save_png(ranking, image, image, tmp_path / "gallery.png")
    without = replace(ranking, groups=(), group_contributions=None)
    plain = save_png(without, image, image, tmp_path / "plain.png")
    widths = [Image.open(path).width for path in (whole, plain)]
    assert widths[0] > widths[1] + 300
    assert (
        ranking_table(ranking).columns[-1].header
        == "from"
        != ranking_table(without).columns[-1].header
    )
    mean = ranking.group_contributions[0, :3].mean(0)
    name = ranking.groups[int(np.abs(mean).argmax())]
    assert str(next(ranking_table(ranking).columns[-1].cells)).startswith(f"{name} ")
    with pytest.raises(DminError, match="group_contributions"):
        Ranking(**{**vars(ranking), "groups": ()})


def few_index(examples, name):
    return [example.id for example in examples.examples].index(name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_every_type_that_the_store_has_can_be_collected(ddpm, few, whole, dtype, tmp_path):
    exact = whole[0].features("loss")
    found, _ = collect(ddpm, few, tmp_path / "s", dtype, sketch=FullGradient())
    largest = np.abs(exact).max((3, 4), keepdims=True)
    step = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}[dtype]
    assert found.layout.dtype == dtype
    assert (np.abs(found.features("loss") - exact) <= step * largest + 1e-7).all()


@pytest.mark.parametrize(
    "sketch",
    [
        lambda k: BlockCyclic(k, block=32),
        lambda k: TensorSketch(k, block=32, from_size=64),
        SJLT,
        lambda k: MaskSJLT(k, keep=2000),
    ],
    ids=["block_cyclic", "tensor_sketch", "sjlt", "mask_sjlt"],
)
def test_one_collection_folds_to_what_smaller_k_would_have_collected(ddpm, few, sketch, tmp_path):
    large, _ = collect(ddpm, few, tmp_path / "large", sketch=sketch(256))
    small, _ = collect(ddpm, few, tmp_path / "small", sketch=sketch(64))
    folded = fold(large, tmp_path / "folded", 64)
    assert folded.manifest.feature_fingerprint == small.manifest.feature_fingerprint

    def unit(store):
        return torch.nn.functional.normalize(torch.tensor(store.features("loss")), dim=-1)

    torch.testing.assert_close(unit(folded), unit(small), atol=1e-5, rtol=0)
