"""Shapes drawn by rule: always the same, apart by split, and of the attributes they state."""

import itertools

import numpy as np
import pytest
import torch

from dmin.data.shapes import ATTRIBUTES, COLOURS, SHAPES, Shapes, _draw, _facts, _generator
from dmin.runtime.errors import DminError


def drawn(dataset):
    return torch.stack([dataset[index].image for index in range(len(dataset))])


def test_the_drawing_is_the_same_everywhere():
    # Of these settings and this recipe: another picture here wants RECIPE raised.
    image = Shapes(examples=1, size=8)[0].image
    assert image.mean().item() == pytest.approx(0.5496, abs=1e-4)
    assert Shapes(examples=1)[0].caption == "a small orange star on a green background"


def test_images_survive_being_saved_as_png():
    levels = drawn(Shapes(examples=5)) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_more_examples_leave_the_first_ones_as_they_are():
    few, many = Shapes(examples=3), Shapes(examples=9)
    assert few.ids == many.ids[:3] and torch.equal(drawn(few), drawn(many)[:3])


def test_splits_and_seeds_share_no_image():
    sets = [Shapes(s, 20, seed=seed) for s, seed in itertools.product(("train", "heldout"), (0, 1))]
    assert not set(sets[0].ids) & set(sets[2].ids)
    images = torch.cat([drawn(s) for s in sets]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 80


def test_labels_captions_and_metadata_agree():
    for label, values in ATTRIBUTES.items():
        dataset = Shapes(examples=30, label=label, minority=0.5)
        for example in (dataset[index] for index in range(30)):
            assert values[example.label] == example.metadata[label]
            told = {v for k, v in example.metadata.items() if k != "source"} - {"plain"}
            assert all(word in example.caption.split() for word in told)
            assert not set(ATTRIBUTES["source"]) & set(example.caption.split())


def test_every_value_comes_up_about_equally_often():
    examples = [_facts(_generator(0, number), 0.04) for number in range(600)]
    for name, values in ATTRIBUTES.items():
        counts = [sum(facts[name] == value for facts in examples) for value in values]
        if name == "source":
            assert 10 <= counts[1] <= 40  # 4 % of 600 is 24
        else:
            assert min(counts) > 0.6 * 600 / len(values)


@pytest.mark.parametrize("minority", [0.0, 1.0])
def test_the_minority_can_be_none_or_all(minority):
    sources = {Shapes(examples=20, minority=minority)[n].metadata["source"] for n in range(20)}
    assert sources == ({"print"} if minority else {"studio"})


def draw(**changes):
    facts = dict(
        shape="circle",
        colour="red",
        texture="plain",
        size="large",
        background="black",
        source="studio",
    )
    return _draw(facts | changes, 32, _generator(0, 5))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_changes_the_picture(name):
    pictures = [draw(**{name: value}) for value in ATTRIBUTES[name]]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).mean() > 0.01


def test_the_middle_has_the_colour_it_is_said_to_have():
    for colour, expected in COLOURS.items():
        image = draw(colour=colour).reshape(3, -1)
        distance = np.abs(image - np.array(expected)[:, None]).max(0)
        assert (distance < 0.06).mean() > 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_inside_and_has_smooth_edges(shape):
    for seed in range(5):
        facts = dict.fromkeys(ATTRIBUTES, "") | dict(
            shape=shape, colour="red", texture="plain", size="large", background="black"
        )
        image = _draw(facts | {"source": "studio"}, 32, _generator(0, seed))
        red = image[0] - image[1]
        border = np.concatenate([red[0], red[-1], red[:, 0], red[:, -1]])
        assert border.max() < 0.36  # of .72 inside: an edge may be cut halfway
        assert 8 < ((red > 0.1) & (red < 0.6)).sum() < 200


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"size": 16}, {"label": "colour"}, {"minority": 0.9}, {"examples": 21}]
)
def test_other_settings_are_another_dataset(change):
    assert Shapes(**{"examples": 20, **change}).describe() != Shapes(examples=20).describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "data.split='test': choose one of train, heldout"),
        ({"label": "color"}, "data.label='color': choose one of shape, colour"),
        ({"examples": 0}, "data.examples=0"),
        ({"size": 4}, "data.size=4"),
        ({"minority": 1.5}, "data.minority=1.5"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(DminError, match=message):
        Shapes(**settings)
