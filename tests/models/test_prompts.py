"""Prompt dropout and guided queries: what they mean, by plain autograd on every family."""

import pytest
import torch
from models.families import FAMILIES, load
from test_families import examples, inputs

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples, collate
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit
from dmin.models.base import READOUTS, per_example_loss
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import check_comparable

STEP = 400


def readings(model, family):
    """Loss and prediction of each example, from the model's own encoding."""
    with torch.no_grad():
        found = model.predict(*inputs(model, family))
    return {name: readout(found) for name, readout in READOUTS.items()}, found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_its_mean_over_prompt_dropout(name):
    family = FAMILIES[name]
    always, given = readings(load(name), family)
    never, nothing = readings(load(name, prompt_dropout=1), family)
    assert (given.prediction - nothing.prediction).abs().max() > 1e-5
    mean, _ = readings(load(name, prompt_dropout=0.25), family)
    for readout, value in mean.items():
        torch.testing.assert_close(value, 0.75 * always[readout] + 0.25 * never[readout])
    described = {str(load(name, prompt_dropout=p).describe()) for p in (0, 0.25, 1)}
    assert len(described) == 3
    for wrong in (-0.1, 1.1):
        with pytest.raises(DminError, match=r"model\.prompt_dropout=.*0\.1 is usual"):
            load(name, prompt_dropout=wrong)


def test_without_prompts_none_is_asked_for():
    for name in ("stable_diffusion", "dit"):
        dataset = Examples([e.__class__(e.id, e.image) for e in examples(FAMILIES[name]).examples])
        x0, condition = load(name, prompt_dropout=1).encode(collate(dataset.examples))
        assert all(len(value) == len(x0) for value in condition.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_of_the_mean_loss_and_queries_of_the_guided_one(name, tmp_path):
    """By autograd: two calls of the network an example, mixed or guided by hand."""
    family = FAMILIES[name]
    model = load(name, prompt_dropout=0.1, query_guidance=3.0)
    given, nothing = load(name), load(name, prompt_dropout=1)
    # Whose sampler steps away from a low score, too.
    low = {"aesthetic_score": 2.5} if name == "stable_diffusion_xl_refiner" else {}
    unguided = load(name, prompt_dropout=1, **low)
    dataset, noise = examples(family, 2), SharedNoise(seed=5)
    collector = GradientCollector(model, BlockCyclic(256), Explicit([STEP]), noise)
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    options = {"dtype": "float32", "trainer": trainer}
    train = collector.collect(dataset, tmp_path / "train", **options)
    queries = collector.collect(dataset, tmp_path / "queries", as_queries=True, **options)
    assert collector.model is model and model.guidance is None
    check_comparable(queries, train)
    assert queries.manifest.dataset == {**train.manifest.dataset, "guidance": 3.0}
    for row in range(2):
        predictions = []
        for each in (given, nothing, unguided):
            x0, condition = each.encode(collate(dataset.examples))
            one = {k: v[[row]] for k, v in condition.items()}
            drawn = noise(x0.shape[1:], STEP)[None]
            model.network.requires_grad_(True)
            with torch.enable_grad():
                call = model.predict(x0[[row]], drawn, torch.tensor([STEP]), one)
            predictions.append(call)
        c, u, away = predictions
        target = c.target
        mean = 0.9 * per_example_loss(c) + 0.1 * per_example_loss(u)
        guided = away.prediction + 3.0 * (c.prediction - away.prediction)
        query = (guided - target).square().mean()
        for store, loss in ((train, mean.sum()), (queries, query)):
            found = torch.from_numpy(store.features("loss", row, row + 1)[0, 0, 0])
            assert store.losses()[row, 0, 0] == pytest.approx(float(loss), rel=1e-4)
            parameters = list(model.network.parameters())
            flows = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            norm = torch.stack([g.square().sum() for g in flows]).sum().sqrt()
            named = zip(model.network.named_parameters(), flows, strict=True)
            expected = collector.sketch.of({n: (g / norm)[None] for (n, _), g in named})[0]
            assert (found - expected).norm() <= 2e-5
        model.network.requires_grad_(False)


@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "flux"])
def test_a_concept_is_what_makes_two_predictions_differ(name):
    """The gradient is −2 (ε(c) − ε(c⁻)) · ∂ε(c) / P, by two calls of the network."""
    family, without = FAMILIES[name], 1 if name == "dit" else "ab"
    plain = load(name, query_without=without)
    asked = plain.for_queries()
    assert asked.describe_query() == {"without": without}
    assert asked.describe() == load(name).describe()
    batch = collate(examples(family, 1).examples)
    other = {**batch, "label": [without]} if name == "dit" else {**batch, "caption": [without]}
    calls, weight = [], next(iter(asked.network.parameters())).requires_grad_(True)
    for model, each in ((asked, batch), (plain, batch), (plain, other)):
        x0, condition = model.encode(each)
        noise, at = SharedNoise(seed=5)(x0.shape[1:], STEP)[None], torch.tensor([STEP])
        calls.append(model.predict(x0, noise, at, condition))
    found, c, less = calls
    torch.testing.assert_close(found.prediction, c.prediction)
    difference = (c.prediction - less.prediction).detach()
    assert difference.abs().max() > 0 and not found.target.requires_grad
    expected = -2 * (difference * c.prediction).mean()
    gradients = [
        torch.autograd.grad(x, weight)[0] for x in (per_example_loss(found).sum(), expected)
    ]
    weight.requires_grad_(False)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    with pytest.raises(DminError, match="equals the prompt of a query"):
        asked.encode(other)
    with pytest.raises(DminError, match="two different losses of a query"):
        load(name, query_without=without, query_guidance=2.0)


def test_guidance_of_one_is_no_guidance(tmp_path):
    model = load("stable_diffusion", query_guidance=1.0)
    with torch.no_grad():
        plain = model.predict(*inputs(model, FAMILIES["stable_diffusion"]))
        guided = model.for_queries()
        found = guided.predict(*inputs(guided, FAMILIES["stable_diffusion"]))
    torch.testing.assert_close(found.prediction, plain.prediction)
    assert guided.network is model.network and guided.describe() == model.describe()
    assert load("stable_diffusion").for_queries() is load("stable_diffusion")
