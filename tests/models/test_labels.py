"""Labels that are text: a mapping of them is recorded in training, and holds from then on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from dmin.cli.config.groups import config_directory
from dmin.cli.workspace.built import build_queries
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples, Subset, collate
from dmin.data.digits import Digits
from dmin.data.image_folder import save_images
from dmin.evaluation.retraining.ensemble import Ensemble
from dmin.models import DDPM
from dmin.models.toy.mlp import MLP
from dmin.queries import Generated
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import check_comparable
from dmin.train import fit_trainer, train

KINDS = ("bee", "ant", "cat")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def named(split, count, kinds=KINDS):
    found = Digits(split).examples[:count]
    return Examples([replace(e, label=kinds[e.label % len(kinds)]) for e in found])


def small(classes=3):
    return lambda: MLP.small(width=8, depth=1, embedding=4, num_class_embeds=classes)


def trained(data, classes=3, steps=2):
    trainer = fit_trainer(**QUIET)
    return train(small(classes), data, steps=steps, batch_size=4, warmup=1, trainer=trainer)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Trained on text, saved, and loaded."""
    found = trained(named("train", 24))
    path = tmp_path_factory.mktemp("model") / "m"
    found.save_pretrained(path)
    assert json.loads((path / "labels.json").read_text()) == ["ant", "bee", "cat"]
    return MLP.from_pretrained(path)


def test_the_mapping_is_sorted_and_kept(model, tmp_path, ddpm):
    assert model.label_names == ["ant", "bee", "cat"]
    assert model.condition(["cat", "ant", "bee"])["class_labels"].tolist() == [2, 0, 1]
    assert model.describe()["classes"] == ["ant", "bee", "cat"]
    unet = DDPM(ddpm.network, ddpm.scheduler)
    unet.label_names = ["x", "y"]
    unet.save_pretrained(tmp_path / "unet")
    assert DDPM.from_pretrained(tmp_path / "unet").label_names == ["x", "y"]
    for wrong in ('["b", "a"]', '{"a": 0}', '["a", "b", "c", "d"', json.dumps(list("abcdefghijk"))):
        (tmp_path / "unet" / "labels.json").write_text(wrong)
        with pytest.raises(DminError, match=r"labels\.json (is not a sorted list|cannot be read)"):
            DDPM.from_pretrained(tmp_path / "unet")


def test_it_is_the_training_by_numbers(model):
    numbers = {"ant": 0, "bee": 1, "cat": 2}
    data = Examples([replace(e, label=numbers[e.label]) for e in named("train", 24).examples])
    other = trained(data)
    assert not other.label_names and "classes" not in other.describe()
    for one, two in zip(model.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("label", ["wolf", 1, "Ant", True])
def test_what_is_not_in_the_mapping_is_refused(model, label):
    with pytest.raises(DminError, match=rf"label {label!r}: .* the classes ant, bee, cat\. Use"):
        model.encode(collate([Example("a", torch.rand(1, 8, 8), label)]))


def test_labels_that_are_missing_name_the_settings(model, ddpm):
    batch = collate([Example("a", torch.rand(1, 8, 8))])
    for each in (model, ddpm):
        with pytest.raises(DminError, match=r"label None: .*data\.label=.*queries\.label="):
            each.encode(batch)
    # A prompt, which is a caption where it is text, may be the name of a class.
    prompted = collate([Example("a", torch.rand(1, 8, 8), None, "bee")])
    assert model.encode(prompted)[1]["class_labels"].tolist() == [1]
    with pytest.raises(DminError, match="label 'dog'"):
        model.encode(collate([Example("a", torch.rand(1, 8, 8), None, "dog")]))


def test_what_cannot_be_mapped_is_refused_before_training():
    data = named("train", 12)
    with pytest.raises(DminError, match=r"3 classes \(ant, bee, cat\).* num_class_embeds=3"):
        trained(data, classes=2)
    for odd in (None, 3):
        mixed = Examples([*data.examples[:-1], replace(data.examples[-1], label=odd)])
        with pytest.raises(DminError, match=rf"some labels .* text \(ant, bee, cat\), .* is {odd}"):
            trained(mixed)
    assert not trained(data, classes=None).label_names, "an unconditional model reads none"


def test_stores_know_what_labels_mean(model, tmp_path):
    collector = GradientCollector(model, BlockCyclic(64, block=16))
    options = {"block_size": 4, "trainer": predict_trainer(**QUIET)}
    train_store = collector.collect(named("train", 6), tmp_path / "t", **options)
    queries = collector.collect(named("heldout", 2), tmp_path / "q", **options)
    check_comparable(queries, train_store)
    assert train_store.manifest.features["loss"]["classes"] == ["ant", "bee", "cat"]
    assert train_store.metadata[0]["label"] in KINDS
    other = MLP(model.network, model.scheduler)
    other.label_names = ["ant", "bee", "dog"]
    with pytest.raises(DminError, match=r"features\.loss\.classes"):
        GradientCollector(other, BlockCyclic(64, block=16)).collect(
            named("train", 6), tmp_path / "t", **options
        )


def test_generated_queries_have_their_class(model, tmp_path):
    Generated(["cat", "ant"], steps=2).generate(model, tmp_path / "g")
    lines = (tmp_path / "g" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["cat", "ant"]


def test_retraining_on_parts_keeps_the_mapping_of_the_whole():
    data = named("train", 24)
    ensemble = Ensemble(small(), data, cache=None)
    without = np.array([i for i, e in enumerate(data.examples) if e.label != "ant"])
    assert Subset(data, ids=[data.examples[i].id for i in without]).facts(0).label != "ant"
    assert ensemble.template.label_names == ["ant", "bee", "cat"]


def test_the_column_of_the_data_reaches_the_queries(tmp_path):
    def labels(row, *overrides):
        image = torch.zeros(1, 1, 8, 8)
        save_images(tmp_path / "q", image, ["a.png"], [row])
        asked = ["model=mlp", "data=image_folder", "data.label=kind", f"queries.root={tmp_path}/q"]
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = compose("dmin", [*asked, *overrides])
        return build_queries(cfg.queries)[0].label

    assert labels({"kind": "bee", "label": 3, "text": "x"}) == "bee"
    assert labels({"label": "ant"}) == "ant", "as generated queries have it"
    assert labels({"sort": "cat"}) is None
    assert labels({"sort": "cat"}, "queries.label=sort") == "cat"
    with pytest.raises(DminError, match=r"no column 'kind'. Did you mean kinds.*queries\.label="):
        labels({"kinds": "cat"})


@pytest.mark.parametrize(
    "file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler"]
)
def test_a_saved_mlp_that_is_not_whole_is_refused(file, tmp_path):
    MLP.small(width=8, depth=1, embedding=4, num_class_embeds=3).save_pretrained(tmp_path)
    lost = tmp_path / file
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(DminError, match=r"model\.path=.* is no whole MLP \(.*Train it again"):
        MLP.from_pretrained(tmp_path)
    if lost.suffix:
        lost.write_text("[")
        with pytest.raises(DminError, match="is no whole MLP"):
            MLP.from_pretrained(tmp_path)
