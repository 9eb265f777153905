"""Many models at once against one at a time, and what is kept on disk."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_ddpm import TINY_UNET

from dmin.data import Examples
from dmin.diffusion.noise import SharedNoise
from dmin.evaluation.retraining.ensemble import Ensemble
from dmin.evaluation.retraining.recipe import Recipe
from dmin.models.base import per_example_loss
from dmin.models.families.ddpm import DDPM
from dmin.models.toy.mlp import MLP
from dmin.runtime.errors import DminError
from dmin.train import fit_trainer, train

RECIPE = Recipe(steps=25, batch_size=8, warmup=5, ema_decay=0.9)
SUBSETS = [np.arange(26), np.arange(0, 26, 2), np.array([3, 1, 4, 15])]
small = functools.partial(MLP.small, width=16, depth=2, embedding=8)


@pytest.fixture(scope="module")
def trained(digits):
    ensemble = Ensemble(small, digits, RECIPE)
    return ensemble, ensemble.train(SUBSETS, seed=3)


@pytest.mark.parametrize("number", range(3))
def test_each_model_is_what_dmin_train_makes_of_its_subset(trained, digits, number):
    ensemble, models = trained
    subset = Examples([digits.examples[i] for i in SUBSETS[number]])
    recipe = Recipe(25, min(8, len(subset)), 3e-3, 5, 0.9)
    alone = train(
        small,
        subset,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        ema_decay=recipe.ema_decay,
        seed=3,
        trainer=fit_trainer(accelerator="cpu", enable_progress_bar=False),
    )
    if number == 2:  # smaller than a batch: the ensemble repeats it, so only the kind agrees
        ensemble = Ensemble(small, digits, recipe)
        models, number = ensemble.train([SUBSETS[2]], seed=3), 0
    found = ensemble.load(models, number).network.state_dict()
    untrained = ensemble._start(1, 3)
    for name, value in alone.network.state_dict().items():
        moved = (value - untrained[name][0]).abs().max()
        assert moved > 1e-3
        assert (found[name] - value).abs().max() < 2e-2 * moved, name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_class_embeds": None, "depth": 1},
        {"prediction_type": "v_prediction", "num_train_timesteps": 50},
        {"prediction_type": "sample", "sample_size": [4, 16]},
    ],
)
def test_compiled_loops_train_what_torch_trains(digits, settings):
    shape = settings.get("sample_size", (8, 8))
    images = [replace(e, image=e.image.reshape(1, *shape)) for e in digits.examples]
    ensemble = Ensemble(functools.partial(small, **settings), Examples(images), RECIPE)
    orders = [RECIPE.order(subset, 3) for subset in (SUBSETS[1], SUBSETS[0])]
    found, oracle = ensemble._train_films(orders, 3), ensemble._train_stacked(orders, 3)
    assert found.keys() == oracle.keys()
    for name, values in oracle.items():
        moved = (values - ensemble._start(1, 3)[name]).abs().max()
        assert (found[name] - values).abs().max() < 1e-3 * moved, name


def test_models_do_not_mix_and_chunks_do_not_matter(trained, digits):
    _, models = trained
    one = Ensemble(small, digits, RECIPE, chunk=1).train(SUBSETS, seed=3)
    other = Ensemble(small, digits, RECIPE).train(SUBSETS, seed=4)
    for name, values in models.items():
        assert torch.allclose(values, one[name], atol=1e-4)
        assert not torch.allclose(values, other[name], atol=1e-3)
    assert not torch.allclose(models["leave.weight"][0], models["leave.weight"][1], atol=1e-3)


def test_losses_are_those_of_the_models_one_by_one(trained, digits):
    ensemble, models = trained
    queries, noise, steps = Examples(digits.examples[:5]), SharedNoise(draws=2), (700, 200)
    found = ensemble.losses(models, queries, steps, noise)
    assert found.shape == (3, 5)
    for number in range(3):
        model = ensemble.load(models, number)
        for place, example in enumerate(queries.examples):
            x0, condition = model.encode({"image": example.image[None], "label": [example.label]})
            each = [
                per_example_loss(
                    model.predict(x0, noise((1, 8, 8), t, d)[None], torch.tensor([t]), condition)
                ).item()
                for t in steps
                for d in range(2)
            ]
            assert found[number, place] == pytest.approx(np.mean(each), rel=1e-5)


def test_convolutional_networks_train_together_too(digits):
    unet = functools.partial(DDPM.build, TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"})
    recipe = Recipe(steps=3, batch_size=4, warmup=1)
    ensemble = Ensemble(unet, digits, recipe)
    models = ensemble.train(SUBSETS[:2], seed=0)
    alone = Ensemble(unet, digits, recipe).train([SUBSETS[1]], seed=0)
    assert all(torch.allclose(models[name][1], alone[name][0], atol=1e-4) for name in alone)
    example, noise = digits.examples[0], SharedNoise()
    found = ensemble.losses(models, Examples([example]), (700,), noise)
    for number in range(2):
        model = ensemble.load(models, number)
        x0, condition = model.encode({"image": example.image[None], "label": [example.label]})
        t = torch.tensor([700])
        one = per_example_loss(model.predict(x0, noise((1, 8, 8), 700)[None], t, condition))
        assert found[number, 0] == pytest.approx(one.item(), rel=1e-4)


def test_training_lowers_the_loss_of_what_was_trained_on(digits):
    ensemble = Ensemble(small, digits, Recipe(steps=300, batch_size=13))
    halves = [np.arange(13), np.arange(13, 26)]
    models = ensemble.train(halves, seed=0)
    losses = ensemble.losses(models, digits, range(950, 0, -100), SharedNoise())
    assert losses[0, :13].mean() < losses[1, :13].mean()
    assert losses[1, 13:].mean() < losses[0, 13:].mean()


def weights(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_what_is_trained_is_kept_and_found(digits, tmp_path, monkeypatch):
    first = Ensemble(small, digits, RECIPE, cache=tmp_path, chunk=2)
    told = []
    models = first.train(SUBSETS, 0, lambda *numbers: told.append(numbers))
    assert told == [(2, 3), (3, 3)]
    assert len(weights(tmp_path)) == 3 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(Ensemble, "_train", lambda *_: pytest.fail("trained again"))
    again = Ensemble(small, digits, RECIPE, cache=tmp_path).train(SUBSETS[::-1], 0)
    assert all(torch.equal(models[name], again[name].flip(0)) for name in models)


def test_one_more_subset_trains_one_more_model(digits, tmp_path, monkeypatch):
    trained = []
    train = Ensemble._train
    monkeypatch.setattr(
        Ensemble, "_train", lambda self, s, seed: trained.append(len(s)) or train(self, s, seed)
    )
    queries, steps, noise = Examples(digits.examples[:4]), (700,), SharedNoise()

    def outcomes(subsets):
        ensemble = Ensemble(small, digits, RECIPE, cache=tmp_path)
        return ensemble.outcomes(subsets, 0, queries, steps, noise)

    two = outcomes(SUBSETS[:2])
    three = outcomes([SUBSETS[2], *SUBSETS[:2], SUBSETS[2]])
    assert trained == [2, 1]
    assert np.array_equal(three[1:3], two) and np.array_equal(three[0], three[3])
    ensemble = Ensemble(small, digits, RECIPE, cache=tmp_path)
    losses = ensemble.losses(ensemble.train(SUBSETS, 0), queries, steps, noise)
    assert np.allclose(losses, three[[1, 2, 0]])


def test_losses_survive_a_line_that_was_cut_off(digits, tmp_path):
    arguments = 0, Examples(digits.examples[:4]), (700,), SharedNoise()
    whole = Ensemble(small, digits, RECIPE, cache=tmp_path).outcomes(SUBSETS, *arguments)
    file = next(tmp_path.rglob("losses-*.jsonl"))
    file.write_text(file.read_text()[:-20])
    for _ in range(2):
        found = Ensemble(small, digits, RECIPE, cache=tmp_path).outcomes(SUBSETS, *arguments)
        assert np.allclose(found, whole, rtol=1e-6)


@pytest.mark.parametrize("change", ["seed", "subset", "recipe", "data", "model"])
def test_anything_else_is_trained_anew(digits, tmp_path, change):
    def make(changed=""):
        data = Examples(digits.examples[:25]) if changed == "data" else digits
        recipe = Recipe(steps=2 if changed == "recipe" else 1, batch_size=4)
        model = functools.partial(small, width=8) if changed == "model" else small
        return Ensemble(model, data, recipe, cache=tmp_path)

    make().train([np.arange(8)], 0)
    make().train([np.arange(8)], 0)
    assert len(weights(tmp_path)) == 1
    subset = np.arange(9) if change == "subset" else np.arange(8)
    make(change).train([subset], int(change == "seed"))
    assert len(weights(tmp_path)) == 2


def test_what_cannot_be_trained_is_refused(digits):
    with pytest.raises(DminError, match="steps=0"):
        Recipe(steps=0)
    with pytest.raises(DminError, match="without examples"):
        Ensemble(small, digits, RECIPE).train([np.arange(0)], 0)
    with pytest.raises(DminError, match="became NaN"):
        Ensemble(small, digits, Recipe(101, 4, 1e30, 0)).train([np.arange(8)], 0)
