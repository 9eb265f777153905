"""Every question by every method and search: answered, or refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_stores import preset

from dmin.attribution import (
    Approximate,
    AtTimesteps,
    Blend,
    Certified,
    DMin,
    FeatureSet,
    Pool,
    Pooled,
    SharpEnergy,
    retrieve,
)
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.models.toy.mlp import MLP
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

READOUTS = ("loss", "mean_output", "mean_squared_output")
INNER = (
    "dmin",
    "dmin_paper",
    "dmin_unnormalised",
    "grad_dot",
    "spectral",
    "trak",
    "d_trak",
    "datainf",
)
INNER += ("journey_trak", "z_sum", "popularity", "ekfac")
OTHERS = ("grad_cos", "das", "relative_if", "renormalised_if", "spectral_energy", "sharp_energy")
OTHERS += ("blend", "tracin", "gas", "trak_ensemble")
IMAGES = ("pixel_l2", "pixel_cosine", "ssim", "gaussian_kernel")
BLIND = ("random", "training_loss", "popularity")  # to the query
QUESTIONS = ("whole", "part", "concept", "mean", "max", "against", "timesteps", "all")
SEARCHES = {
    "exact": None,
    "certified": Certified(4),
    "approximate": Approximate("Flat", candidates=9),
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Queries, others, and training examples, with all that any method requires."""
    torch.manual_seed(0)
    place, examples = tmp_path_factory.mktemp("questions"), Digits("train").examples
    model = MLP.small(width=3, depth=1, embedding=2).eval()
    sketch = BlockCyclic(256, block=64)
    origin = GradientCollector(model, sketch, Stratified(2), SharedNoise(), readouts=READOUTS)
    found = []
    for name, some in (("q", examples[20:22]), ("a", examples[22:24]), ("x", examples[:9])):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        data = Examples(some)
        store = origin.collect(data, place / name, dtype="float32", trainer=trainer)
        alone = FeatureSet(store, data, origin=origin)
        states = [] if name == "x" else [alone]
        later = {"later": alone}
        found.append(FeatureSet(store, data, origin=origin, checkpoints=later, trajectory=states))
    return found


def method_of(name):
    if name == "blend":
        return Blend(DMin(), SharpEnergy(effective=2.0))
    of_models = name in ("tracin", "gas", "trak_ensemble")
    return preset(name, **({"checkpoints": ["later"]} if of_models else {}))


def ask(sides, name, question, search, monkeypatch):
    queries, others, train = sides
    method = method_of(name)
    if question in ("part", "all"):
        monkeypatch.setattr(queries.dataset, "part", SimpleNamespace(), raising=False)
    if question in ("concept", "all"):
        monkeypatch.setitem(queries.store.manifest.dataset, "without", "a fox")
    if question in ("timesteps", "all"):
        method = AtTimesteps(method, queries.store.layout.timesteps[:1])
    if question in ("mean", "max", "against", "all"):
        kind = "max" if question == "max" else "mean"
        queries = Pool(queries, others if question in ("against", "all") else None, kind)
        method = Pooled(method, queries)
    return retrieve(queries, train, method, 3, index=SEARCHES[search])


def refused(name, question, search):
    """What the refusal has to name; None where there is an answer."""
    if question in ("timesteps", "all") and name in (*IMAGES, *BLIND):
        return f"retrieve.timesteps=.*method={name}"
    if question in ("part", "concept") and name in IMAGES:
        return f"method={name} compares"
    if question in ("concept", "all") and name == "ekfac":
        return "query_without='a fox', but method=ekfac"
    is_inner = name in INNER and question != "max"
    return None if search == "exact" or is_inner else "index=null"


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", dict.fromkeys((*INNER, *OTHERS, *IMAGES, *BLIND)))
def test_it_is_answered_or_refused_by_name(sides, name, question, monkeypatch):
    searches = ("exact", "approximate" if question in ("max", "all") else "certified")
    for search in searches[: 1 if name == "ekfac" else 2]:
        told = refused(name, question, search)
        if told is None:
            found = ask(sides, name, question, search, monkeypatch)
            assert np.isfinite(found.scores).all() and found.scores.shape[1] == 3
            assert len(found.timesteps) == (1 if question in ("timesteps", "all") else 2)
        else:
            with pytest.raises(DminError, match=told):
                ask(sides, name, question, search, monkeypatch)
