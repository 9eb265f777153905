"""Folders as trainers have them: captions and masks in files beside the images."""

import json

import numpy as np
import pytest
import torch
from examples_on_disk import encoded

from dmin.data.base import describe_dataset
from dmin.data.captions import Captions
from dmin.data.masks import Masks
from dmin.data.training_folder import Together, TrainingFolder
from dmin.runtime.errors import DminError


def put(path, grey=200, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(np.full((*size, 3), grey, np.uint8)))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "cups"
    for name in ("a.png", "b.PNG", "c_big one.png", "deep/d.png"):
        put(root / name)
    (root / "a.txt").write_text("\ufeffa cup\nof tea\n", "utf-8")
    (root / "b.TXT").write_text("a mug")
    return root


def captions(root, **settings):
    found = TrainingFolder(root, captions=Captions(**settings))
    return {e.id: e.caption for e in found}


@pytest.mark.parametrize("name", ["source", "lines", "missing"])
def test_an_unknown_choice_is_refused_by_name(name):
    with pytest.raises(DminError, match=rf"data\.captions\.{name}='odd': choose one of \w+, "):
        Captions(**{name: "odd"})


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"missing": "drop"}, {"a.png": "a cup\nof tea", "b.PNG": "a mug"}),
        ({"missing": "drop", "lines": "first"}, {"a.png": "a cup", "b.PNG": "a mug"}),
        (
            {"missing": "text", "text": "zqx", "lines": "first", "prefix": "p, ", "suffix": " s"},
            {"a.png": "p, a cup s", "b.PNG": "p, a mug s", "c_big one.png": "p, zqx s"},
        ),
        (
            {"missing": "empty", "extensions": [".caption"]},
            {"a.png": "", "b.PNG": "", "c_big one.png": ""},
        ),
        (
            {"missing": "text", "text": "[x], z", "rejoin": [",", ", "], "replace": {"[x]": "mug"}},
            {"a.png": "a cup\nof tea", "b.PNG": "a mug", "c_big one.png": "mug,  z"},
        ),
        (
            {"missing": "empty", "trigger": "mug"},
            {"a.png": "mug a cup\nof tea", "b.PNG": "a mug", "c_big one.png": "mug "},
        ),
        ({"source": "names"}, {"a.png": "a", "b.PNG": "b", "c_big one.png": "c big one"}),
        ({"source": "text", "text": "x"}, {"a.png": "x", "b.PNG": "x", "c_big one.png": "x"}),
    ],
)
def test_captions_are_read_by_each_rule(folder, settings, expected):
    assert captions(folder, **settings) == expected


def test_captions_of_a_table_are_found_by_path_name_or_stem(folder, tmp_path):
    table = {
        "a.png": {"caption": "one", "tags": "x, y"},
        str(folder / "b.PNG"): ["two", "three"],
        "c_big one": "four",
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    found = captions(folder, source="table", table=tmp_path / "table.json")
    assert list(found.values()) == ["one, x, y", "two", "four"]


def test_missing_captions_are_an_error_with_counts_and_remedy(folder):
    with pytest.raises(DminError, match=r"1 of the 3 images.*c_big one.*missing=drop"):
        captions(folder)


def test_an_empty_caption_is_one_unless_it_counts_as_none(folder):
    (folder / "b.TXT").write_text(" \n")
    assert captions(folder, missing="drop")["b.PNG"] == ""
    assert "b.PNG" not in captions(folder, missing="drop", empty_is_missing=True)


def test_folders_below_and_what_is_no_example(folder):
    put(folder / "a-masklabel.png", 255)
    put(folder / "deep/_controls/e.png")
    put(folder / "no_controls/f.png")
    leave = ("-masklabel.png", "_controls/", "no_controls/")
    found = TrainingFolder(folder, recursive=True, leave=leave)
    assert found.ids == ["a.png", "b.PNG", "c_big one.png", "deep/d.png"]


def test_several_together_have_the_names_of_their_folders(folder):
    datasets = {"one": TrainingFolder(folder), "two": TrainingFolder(folder, repeats=3)}
    both = Together(datasets, ["x"])
    assert len(both) == 6 and both.ids == [e.id for e in both]
    assert [both.facts(i) for i in range(6)] == [e.facts for e in both]
    assert both[3].id == "two/a.png" and both[3].describe() == {"repeats": 3}
    assert describe_dataset(both) != describe_dataset(Together(datasets))
    with pytest.raises(DminError, match="empty"):
        Together({})


def masked(root, **settings):
    return TrainingFolder(root, masks=Masks(**settings), size=4)


def test_a_mask_is_cut_as_its_image_is(folder, tmp_path):
    mask = np.zeros((8, 6, 3), np.uint8)
    mask[:, :3] = 255  # the left half
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").write_bytes(encoded(mask))
    found = {e.id: e.mask for e in masked(folder, folder=tmp_path / "masks")}
    assert found["b.PNG"] is None and found["a.png"].shape == (1, 4, 4)
    assert found["a.png"][0, :, 0].min() > 0.9 and found["a.png"][0, :, 3].max() < 0.1
    inverted = masked(folder, folder=tmp_path / "masks", invert=True)[0].mask
    torch.testing.assert_close(inverted, 1 - found["a.png"])
    grey = masked(folder, folder=tmp_path / "masks", least=0.5, proportion=True)[0].mask
    torch.testing.assert_close(grey, 0.5 + found["a.png"] / 2)
    normal = masked(folder, folder=tmp_path / "masks", least=0.5, normalised=True)[0].mask
    torch.testing.assert_close(normal.mean(), torch.tensor(1.0))


def test_masks_are_part_of_the_fingerprint(folder, tmp_path):
    put(folder / "a-masklabel.png", 255)
    said = []
    for settings in ({}, {"least": 0.1}, {"normalised": True}):
        found = TrainingFolder(
            folder, leave=("-masklabel.png",), masks=Masks(suffix="-masklabel.png", **settings)
        )
        said.append(json.dumps(found.describe()))
    put(folder / "a-masklabel.png", 128)
    said.append(json.dumps(found.describe()))
    assert len(set(said)) == 4


@pytest.mark.parametrize(
    "size, grey, settings, named",
    [
        ((4, 6), 255, {}, "4 × 6, its image .* 8 × 6"),
        ((8, 6), 0, {}, "entirely black"),
        ((8, 6), 255, {"required": True}, "2 of the 3 images .* have no mask"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_at_once(folder, tmp_path, size, grey, settings, named):
    put(tmp_path / "masks/a.png", grey, size)
    with pytest.raises(DminError, match=named):
        masked(folder, folder=tmp_path / "masks", **settings)


@pytest.mark.parametrize(
    "size, grey, settings, left, named",
    [
        ((4, 6), 255, {}, ["b.PNG", "c_big one.png"], "4 × 6, its image"),
        ((8, 6), 0, {}, ["b.PNG", "c_big one.png"], "entirely black"),
        ((8, 6), 255, {"required": True}, ["a.png"], r"b\.PNG \(it has no mask\)"),
    ],
)
def test_an_image_whose_mask_does_not_fit_can_be_skipped(
    folder, tmp_path, size, grey, settings, left, named
):
    put(tmp_path / "masks/a.png", grey, size)
    masks = Masks(folder=tmp_path / "masks", **settings)
    with pytest.warns(match=named):
        found = TrainingFolder(folder, masks=masks, size=4, on_error="skip")
    assert found.ids == left == [each.id for each in found]
    assert set(found.describe()["masks"]) == {"a.png"} & set(left)
