"""Draws of what was random in training's data: each is an example of its own, side by side."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from latent_model import Latent
from PIL import Image

from dmin.attribution import DMin, FeatureSet, places, retrieve
from dmin.attribution.curvature.functional_loss import FunctionalLoss
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.data.base import collate
from dmin.data.captions import Captions, Draws
from dmin.data.image_folder import ImageFolder
from dmin.data.masks import Masks
from dmin.data.training_folder import TrainingFolder
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.evaluation.retraining.stacked_models import encoded
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store

RANDOM = Draws(number=3, flip=0.5, crop=True, shuffle=True, drop=0.3, lines=True, keep=1, spare=1)
TEXTS = ["a, b, c, d\ne, f, g", "h, i"]


class OfWords(Latent):
    """Reads the first letter of a caption as its class."""

    def encode(self, batch):
        letters = [ord(caption[:1] or "j") % 10 for caption in batch["caption"]]
        return super().encode({**batch, "label": letters})


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 255, (8, (20, 8)[n == 4])).astype("uint8")
        Image.fromarray(pixels).save(root / f"{n}.png")
        Image.fromarray(pixels).convert("RGB").save(root / f"{n}-masklabel.png")
        (root / f"{n}.txt").write_text(TEXTS[n % 2])
    return root


def data(root, draws=RANDOM, **settings):
    captions = Captions(lines="each", prefix="")
    leave, cut = ["-masklabel.png"], {"size": 8, "mode": "L"}
    return TrainingFolder(root, captions=captions, leave=leave, draws=draws, **cut, **settings)


def make(draws=3, model=OfWords, **settings):
    noise = SharedNoise(draws=draws)
    return GradientCollector(model(), BlockCyclic(32, block=16), Stratified(2), noise, **settings)


def collect(collector, dataset, path, block_size=2, **options):
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    options = {"dtype": "float32", **options}
    return collector.collect(dataset, path, block_size=block_size, trainer=trainer, **options)


def test_row_d_is_that_of_draw_d(folder, tmp_path):
    dataset = data(folder)
    drawn = [[dataset[n].drawn[d] for n in range(len(dataset))] for d in range(3)]
    store = collect(make(), dataset, tmp_path / "s")
    for d, examples in enumerate(drawn):
        alone = collect(make(), Examples(examples), tmp_path / str(d))
        for of in ("features", "norms"):
            there, here = (getattr(each, of)("loss")[:, d] for each in (alone, store))
            np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    centre = collect(make(), data(folder, None), tmp_path / "centre")
    assert not np.allclose(centre.features("loss"), store.features("loss"), atol=0.01)
    assert centre.manifest.features == store.manifest.features  # the same queries serve both
    assert centre.manifest.fingerprint != store.manifest.fingerprint


def test_methods_that_run_the_model_sum_the_gradients_of_the_draws(folder, tmp_path):
    dataset, collector = data(folder), make()
    store = collect(collector, dataset, tmp_path / "s", keep_encodings=True)
    for known in (FeatureSet(store, dataset, origin=collector), None):
        loss = FunctionalLoss(collector, known=known)
        found = loss.gradients([dataset[1], dataset[3]])
        for row, n in enumerate((1, 3)):
            total = 0
            for d in range(3):  # the slow mean: by autograd, a draw and a timestep at a time
                model = collector.model
                batch = collate([copy.copy(dataset[n].drawn[d])])
                x0, condition = model.encode(batch)
                for t in collector.timesteps:
                    noise = collector.noise(x0.shape[1:], t, d)[None]
                    made = model.predict(x0, noise, torch.tensor([t]), condition)
                    value = (made.prediction - made.target).square().flatten(1).mean(1).sum()
                    parts = torch.autograd.grad(value, list(model.network.parameters()))
                    total = total + torch.cat([part.flatten() for part in parts])
            torch.testing.assert_close(found[row], total, rtol=1e-4, atol=1e-6)


def test_neither_blocks_nor_passes_nor_a_restart_change_them(folder, tmp_path):
    dataset = data(folder)
    store = collect(make(microbatch=64), dataset, tmp_path / "a", segment_bytes=1)
    for name, block, passes in (("b", 5, 64), ("c", 2, 5)):
        other = collect(make(microbatch=passes), dataset, tmp_path / name, block_size=block)
        np.testing.assert_allclose(
            store.features("loss"), other.features("loss"), rtol=1e-4, atol=1e-5
        )
    digest = store.digest()
    for segment in sorted((tmp_path / "a").glob("segment-*"))[1:]:
        segment.unlink()
    assert Store(tmp_path / "a").missing_blocks
    again = collect(make(microbatch=64), dataset, tmp_path / "a", segment_bytes=1)
    assert again.digest() == digest


def test_examples_without_draws_stand_beside_those_that_have_some(folder, tmp_path):
    dataset, plain = data(folder), data(folder, None)
    mixed = [dataset[0], plain[1], dataset[2], plain[3]]
    store = collect(make(), Examples(mixed), tmp_path / "s")
    alone = collect(make(), Examples([plain[1], plain[3]]), tmp_path / "alone")
    found = store.features("loss")[[1, 3]]
    np.testing.assert_allclose(found, alone.features("loss"), rtol=1e-4, atol=1e-5)


def test_the_noise_has_as_many_draws_or_a_multiple(folder, tmp_path):
    with pytest.raises(DminError, match=r"3 draws per example.*noise\.draws=3"):
        collect(make(draws=2), data(folder), tmp_path / "s")
    collect(make(draws=6), data(folder), tmp_path / "t")
    for wrong in ({"number": 0}, {"flip": 1.5}, {"drop": -0.1}):
        with pytest.raises(DminError, match=rf"data\.draws\.{next(iter(wrong))}="):
            Draws(**wrong)


def test_draws_are_of_the_seed_the_id_and_their_number(folder):
    one, other = data(folder)[1].drawn, data(folder)[1].drawn
    assert all(torch.equal(a.image, b.image) for a, b in zip(one, other, strict=True))
    more = data(folder, Draws(**{**RANDOM.__dict__, "number": 5}))[1].drawn
    assert [e.caption for e in more[:3]] == [e.caption for e in one]
    seeds = [data(folder, Draws(**{**RANDOM.__dict__, "seed": n}))[1].drawn for n in range(3)]
    assert len({e.image.numpy().tobytes() for each in seeds for e in each}) > 3


def test_masks_and_sizes_are_cut_and_mirrored_with_their_image(folder):
    many = Draws(number=20, flip=0.5, crop=True)
    example = data(folder, many, masks=Masks(suffix="-masklabel.png"))[0]
    places = {each.sizes.crop for each in example.drawn}
    assert example.sizes.crop == (0, 6) and len(places) > 4
    assert all(top == 0 and 0 <= left <= 12 for top, left in places)
    for each in example.drawn:  # the mask is the image, in grey
        torch.testing.assert_close(each.mask, each.image, atol=0.01, rtol=0)
    whole = ImageFolder(folder, mode="L", draws=None, layout="labels")[0].image
    for each in example.drawn:
        left = each.sizes.crop[1]
        cut = whole[..., left : left + 8]
        assert torch.equal(each.image, cut) or torch.equal(each.image, cut.flip(-1))
    flipped = [torch.equal(e.image, whole[..., e.sizes.crop[1] :][..., :8]) for e in example.drawn]
    assert 4 < sum(flipped) < 16


def test_captions_are_drawn_as_often_as_they_should():
    draws = Draws(shuffle=True, keep=1, drop=0.25, spare=2, lines=True, dropout=0.2)
    captions = Captions(prefix="<", suffix=">", replace={"c": "C"})
    seen = Counter()
    for n in range(4000):
        seen[captions.worded(["a,b, c ,d", "x"], draws, draws.of("e", n))] += 1
    assert abs(seen[""] / 4000 - 0.2) < 0.03 and abs(seen["<x>"] / 4000 - 0.4) < 0.03
    tags = {text.strip("<>"): n for text, n in seen.items() if text not in ("", "<x>")}
    total = sum(tags.values())
    assert all(text.startswith("a") and "b" in text for text in tags)
    with_c = sum(n for text, n in tags.items() if "C" in text)
    assert abs(with_c / total - 0.75) < 0.04
    orders = [n for text, n in tags.items() if len(text.split(", ")) == 4]
    assert len(orders) == 6 and min(orders) > 0.6 * max(orders)
    assert captions.worded(["a, c", "x"]) == "<a, C>"


def test_marks_part_what_stays_from_what_moves_and_prefixes_may_be_parts():
    marked = Draws(number=1, shuffle=True, mark="|||", whole=True)
    captions = Captions(prefix="p, ")
    found = {captions.worded(["a ||| b, c ||| d"], marked, marked.of("e", n)) for n in range(50)}
    assert found == {"p, a, b, c, d", "p, a, c, b, d"}
    whole = Draws(shuffle=True, whole=True)
    found = {captions.worded(["a"], whole, whole.of("e", n)) for n in range(50)}
    assert found == {"p, a", "a, p"}
    joint = Draws(shuffle=True, joint=",")  # as one that splits at commas and keeps the blanks
    captions = Captions(rejoin=(",", ", "))
    found = {captions.worded(["a, b"], joint, joint.of("e", n)) for n in range(50)}
    assert found == {"a,  b", " b, a"}


def test_what_has_no_meaning_for_draws_is_refused(folder, tmp_path):
    dataset, collector = data(folder), make()
    side = FeatureSet(collect(collector, dataset, tmp_path / "s"), dataset, origin=collector)
    with pytest.raises(DminError, match=r"have several draws.*retrieve\.places=null"):
        places(side, side, retrieve(side, side, DMin(), k=1), DMin())
    with pytest.raises(DminError, match=r"data\.draws=null"):
        encoded(collector.model, Examples([dataset[0]]))
