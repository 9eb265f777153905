"""Every file of a folder is an example, a caption, a mask, metadata, or ignored for a reason."""

import json
import re

import numpy as np
import pytest
from examples_on_disk import encoded

from dmin.data.formats import FORMATS, formats, suffixes
from dmin.data.image_folder import ImageFolder
from dmin.data.pictures import Pictures
from dmin.data.training_folder import Together, TrainingFolder
from dmin.runtime.errors import DminError

PICTURE = encoded(np.full((4, 4, 3), 99, np.uint8))


def write(root, **files):
    """Write files by name; images where the content is None, else text or JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes | None):
            content = json.dumps(content)
        path.write_bytes(
            PICTURE
            if content is None
            else content.encode()
            if isinstance(content, str)
            else content
        )
    return root


def said(root, **settings):
    found = ImageFolder(root, **settings)
    return {
        id: (facts.label, facts.caption) for id, facts in zip(found.ids, found._facts, strict=True)
    }


IMG2DATASET = {"caption": "one", "url": "u", "key": "000", "status": "success"}
LAYOUTS = {
    "txt": (
        {"a.png": None, "a.txt": "a cup\n", "b.PNG": None},
        {"a.png": (None, "a cup"), "b.PNG": (None, None)},
    ),
    "caption, nested": (
        {"x/a.png": None, "x/a.caption": "one", "y/z/b.png": None, "y/z/b.CAPTION": "two"},
        {"x/a.png": ("x", "one"), "y/z/b.png": ("y/z", "two")},
    ),
    "img2dataset": (
        {"00000/000.jpg": None, "00000/000.txt": "one", "00000/000.json": IMG2DATASET},
        {"00000/000.jpg": (None, "one")},
    ),
    "kohya": (
        {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.txt": "a sks dog"},
        {"10_sks dog/a.png": (None, "sks dog"), "10_sks dog/b.png": (None, "a sks dog")},
    ),
    "kohya's metadata.json": (
        {
            "a.png": None,
            "b.png": None,
            "metadata.json": {"a.png": {"caption": "one", "tags": "x"}, "b": {"tags": "y"}},
        },
        {"a.png": (None, "one, x"), "b.png": (None, "y")},
    ),
    "diffusion-pipe's captions.json": (
        {"a.png": None, "captions.json": {"a.png": ["one", "two"]}},
        {"a.png": (None, "one")},
    ),
    "OneTrainer's masks": (
        {"a.png": None, "a.txt": "one", "a-masklabel.png": None, "a-condlabel.png": None},
        {"a.png": (None, "one")},
    ),
    "a folder of masks": (
        {"a.png": None, "x/b.png": None, "masks/a.png": None, "masks/x/b.jpg": None},
        {"a.png": (None, None), "x/b.png": ("x", None)},
    ),
    "a class that is called masks": (
        {"hats/a.png": None, "masks/b.png": None},
        {"hats/a.png": ("hats", None), "masks/b.png": ("masks", None)},
    ),
    "classes": (
        {"cat/a.png": None, "b.png": None},
        {"b.png": (None, None), "cat/a.png": ("cat", None)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_found(name, tmp_path):
    files, expected = LAYOUTS[name]
    assert said(write(tmp_path, **files)) == expected


def test_fields_and_repeats_travel_with_the_example(tmp_path):
    dataset = ImageFolder(write(tmp_path / "x", **LAYOUTS["img2dataset"][0]))
    assert dataset[0].describe() == {**IMG2DATASET, "caption": "one"}
    dataset = ImageFolder(write(tmp_path / "y", **LAYOUTS["kohya"][0]))
    assert dataset[1].describe()["repeats"] == 10 and "layout kohya" in dataset.summary


def test_a_column_called_repeats_is_no_count_of_passes(tmp_path):
    rows = "file_name,repeats\na.png,7\n"
    dataset = ImageFolder(write(tmp_path, **{"a.png": None, "metadata.csv": rows}))
    assert dataset[0].repeats == 1 and dataset[0].describe() == {"metadata_repeats": 7}


def test_metadata_in_parquet_is_read_as_in_the_other_forms(tmp_path):
    arrow = pytest.importorskip("pyarrow.parquet")
    rows = [{"file_name": "a.png", "text": "one", "label": 3, "more": [1]}]
    arrow.write_table(
        pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "metadata.parquet"
    )
    dataset = ImageFolder(write(tmp_path, **{"a.png": None}))
    assert dataset[0].describe() == {"label": 3, "caption": "one", "more": [1]}
    write(tmp_path, **{"metadata.jsonl": {"file_name": "a.png"}})
    with pytest.raises(DminError, match="Keep one of the two"):
        ImageFolder(tmp_path)


ASKED = {
    "texts differ": ({"a.png": None, "a.txt": "x", "a.caption": "y"}, ["txt", "caption"]),
    "json differs": ({"a.png": None, "a.txt": "x", "a.json": {"caption": "y"}}, ["txt", "json"]),
    "a table": ({"a.png": None, "a.txt": "x", "captions.json": {"a": "y"}}, ["beside", "table"]),
    "boxes": ({"a.png": None, "a.txt": "0 .5 .5 .1 .1\n1 .2 .2 .1 .1"}, ["beside", "labels"]),
    "numbered classes": ({"1_cat/a.png": None, "2_dog/b.png": None}, ["kohya", "labels"]),
    "zeros": ({"007_cat/a.png": None}, ["kohya", "labels"]),
    "metadata without captions": (
        {"a.png": None, "a.txt": "x", "metadata.jsonl": {"file_name": "a.png", "label": 1}},
        ["metadata", "beside"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_may_be_two_layouts_asks_for_a_setting_that_helps(name, tmp_path):
    files, choices = ASKED[name]
    write(tmp_path, **files)
    for choice in choices:
        with pytest.raises(DminError, match=f"is ambiguous: .*data.layout={choice}"):
            ImageFolder(tmp_path)
    assert len({json.dumps(said(tmp_path, layout=choice)) for choice in choices}) == 2
    with pytest.raises(DminError, match=r"data\.layout='x': choose one of auto, metadata"):
        ImageFolder(tmp_path, layout="x")


def test_some_masks_among_examples_are_asked_about(tmp_path):
    write(tmp_path, **{"a.png": None, "masks/a.png": None, "masks/c.png": None})
    with pytest.raises(DminError, match=r"masks/c\.png looks like a mask.*data\.leave"):
        ImageFolder(tmp_path)
    assert TrainingFolder(tmp_path, leave=["masks/"], recursive=True).ids == ["a.png"]


def test_captions_in_several_files_that_agree_are_one(tmp_path):
    write(
        tmp_path,
        **{"a.png": None, "a.txt": "x", "a.caption": "x\n", "b.png": None, "b.caption": "y"},
    )
    assert said(tmp_path) == {"a.png": (None, "x"), "b.png": (None, "y")}
    assert said(tmp_path, text=None) == {"a.png": (None, None), "b.png": (None, None)}


def test_layouts_of_before_mean_what_they_did(tmp_path):
    root = write(
        tmp_path, **{"a.png": None, "a.txt": "y", "metadata.csv": "file_name,text\na.png,x\n"}
    )
    dataset = ImageFolder(root)
    assert said(root) == {"a.png": (None, "x")} and "content" in dataset.describe()
    assert dataset.describe()["content"] == "8bde4f9fca158497"
    assert "a.txt" in dataset.summary and "metadata does not read" in dataset.summary


def test_every_file_is_told_of(tmp_path):
    files = {
        "a.png": None,
        "sub/b.webp": None,
        "a.txt": "x",
        "a-masklabel.png": None,
        "README.md": "x",
    }
    files |= {
        "lost.txt": "x",
        "c.heic": b"x",
        "d.jxl": b"x",
        "e.psd": b"8BPS",
        ".DS_Store": "x",
        "__pycache__/x.png": None,
    }
    files |= {"cache.npz": b"x", "no_suffix": None, "f.jpg_large": None, "unknown.bin": b"?"}
    dataset = ImageFolder(write(tmp_path, **files))
    assert dataset.ids == ["a.png", "f.jpg_large", "no_suffix", "sub/b.webp"]
    for told in (
        r"4 images · layout beside · 1 captions · 1 labels",
        r" 1 masks, not examples: data=masked_folder uses them \(a-masklabel.png\)",
        r"1 texts without an image \(lost\.txt\)",
        r"1 \.heic need the plugin pillow-heif \(pip install pillow-heif\) \(c\.heic\)",
        r"1 \.jxl need the plugin pillow-jxl-plugin",
        r"1 \.psd of a format that is not supported \(e\.psd\)",
        r"2 hidden \(\.DS_Store, __pycache__\)",
        r"ignored: 3 not in an image format \(README\.md, cache\.npz, …\)",
    ):
        assert re.search(told, dataset.summary), (told, dataset.summary)
    both = Together({"one": dataset, "two": TrainingFolder(tmp_path)})
    assert both.summary.startswith("one: 4 images") and "in folders below" in both.summary


@pytest.mark.parametrize(
    "suffix", [".avif", ".tga", ".jp2", ".JPG", ".qoi", ".ppm", ".sgi", ".ico", ".jfif"]
)
def test_whatever_pillow_opens_of_the_listed_formats_is_an_image(suffix, tmp_path):
    if suffix.lower() not in suffixes():
        pytest.skip("Pillow was built without it")
    assert ImageFolder(write(tmp_path, **{f"a{suffix}": None})).ids == [f"a{suffix}"]
    assert set(formats()) <= {*FORMATS, "HEIF", "JXL"} and ".eps" not in suffixes()


def test_pictures_that_are_named_have_the_caption_beside_them(tmp_path):
    write(tmp_path, **LAYOUTS["txt"][0])
    assert [e.caption for e in Pictures([tmp_path / "a.png", tmp_path / "b.PNG"])] == [
        "a cup",
        None,
    ]
    assert [e.caption for e in Pictures(tmp_path)] == ["a cup", None]
