"""What was asked for is what a model sees, what is kept and shown; other columns stand apart."""

import json

import numpy as np
import pytest
from examples_on_disk import encoded, write_tar

from dmin.data import collate
from dmin.data.huggingface import HFDataset
from dmin.data.image_folder import ImageFolder
from dmin.data.webdataset import TarShards
from dmin.runtime.errors import DminError
from dmin.runtime.escape import named_apart

PICTURE = encoded(np.full((4, 4, 3), 99, np.uint8))
ROWS = [
    {"text": "real", "caption": "alt", "artist": "monet", "label": 7, "metadata_label": "own"},
    {"text": "two", "caption": "alt", "artist": None, "label": 8, "metadata_label": None},
]


def in_folder(place, **asked):
    place.mkdir()
    lines = []
    for number, row in enumerate(ROWS):
        (place / f"{number}.png").write_bytes(PICTURE)
        lines.append(json.dumps({"file_name": f"{number}.png", **row}))
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return ImageFolder(place, **asked)


def in_table(place, **asked):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": PICTURE, "path": None}, **row} for row in ROWS]
    datasets.Dataset.from_list(rows).save_to_disk(str(place))
    return HFDataset(place, **asked)


def in_tar(place, **asked):
    members = []
    for number, row in enumerate(ROWS):
        members += [(f"{number}.png", PICTURE), (f"{number}.json", json.dumps(row).encode())]
    return TarShards(str(write_tar(place.with_suffix(".tar"), members)), **asked)


WRITE = [in_folder, in_table, in_tar]


@pytest.mark.parametrize("write", WRITE)
def test_other_columns_never_stand_for_what_was_asked_for(write, tmp_path):
    dataset = write(tmp_path / "x", label="artist", text="text")
    first, second = dataset[0], dataset[1]
    assert (first.label, first.caption) == ("monet", "real")
    kept = first.describe()
    assert (kept["label"], kept["caption"]) == ("monet", "real")
    assert (kept["metadata_caption"], kept["metadata_metadata_label"]) == ("alt", 7)
    assert kept["metadata_label"] == "own" and "artist" not in kept
    assert collate([first])["metadata"] == [dataset.facts(0).describe()] == [kept]
    assert second.label is None and "label" not in second.describe(), "8 was not asked for"


@pytest.mark.parametrize("write", WRITE)
def test_without_a_label_nothing_is_called_one_and_a_column_may_be_both(write, tmp_path):
    kept = write(tmp_path / "x", label=None, text="text")[0].describe()
    assert "label" not in kept and kept["metadata_metadata_label"] == 7
    both = write(tmp_path / "y", label="caption", text="caption")[0]
    assert both.label == both.caption == "alt" and both.metadata["text"] == "real"


def test_the_id_of_a_table_may_be_its_label_and_class_names_hide_no_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": PICTURE, "path": None}], "kind": [0], "kind_name": ["mine"]}
    features = {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat"])}
    features["kind_name"] = datasets.Value("string")
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.save_to_disk(str(tmp_path / "x"))
    (example,) = HFDataset(tmp_path / "x", label="kind", id="kind")
    assert (example.id, example.label, example.metadata) == ("0", 0, {"kind_name": "mine"})


def test_names_that_are_taken_are_store_and_pictures():
    names = ["score", "metadata_score", "mine"]
    found = named_apart(names, ["score", "id"])
    assert found == {
        "score": "metadata_metadata_score",
        "metadata_score": "metadata_score",
        "mine": "mine",
    }


@pytest.mark.parametrize("asked", ["label", "text"])
@pytest.mark.parametrize("write", WRITE)
def test_a_column_that_is_nowhere_is_refused(write, asked, tmp_path):
    with pytest.raises(DminError, match=f"(data.{asked}=.?nowhere|no column 'nowhere')"):
        write(tmp_path / "x", **{asked: "nowhere"})
