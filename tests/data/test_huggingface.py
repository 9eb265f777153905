"""Hugging Face datasets in each form they have on a disk."""

import datetime
import sys

import pytest
import torch
from examples_on_disk import rows, table, write_folder

from dmin.data import survey
from dmin.data.huggingface import HFDataset
from dmin.runtime.errors import DminError


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """Hugging Face's library without a network, and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def write(form, folder, hub, change=None):
    found = table(change)
    if form == "parquet":
        folder.mkdir(exist_ok=True)
        found.to_parquet(str(folder / "x.parquet"))
        return folder / "x.parquet"
    if form == "parquet folder":
        folder.mkdir(exist_ok=True)
        found.to_parquet(str(folder / "train-0.parquet"))
        return folder
    if form == "saved dictionary":
        hub.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(str(folder))
        return folder
    found.save_to_disk(str(folder))
    if form == "arrow":
        return next(folder.glob("*.arrow"))
    return folder


@pytest.mark.parametrize(
    "form", ["parquet", "parquet folder", "arrow", "saved", "saved dictionary"]
)
def test_every_form_holds_the_same(form, hub, tmp_path):
    dataset = HFDataset(write(form, tmp_path / "x", hub), text="text", label="label")
    assert len(dataset) == 7 and list(dataset.ids) == [f"row-{n:07d}" for n in range(7)]
    for index, (pixels, label, caption) in enumerate(rows()):
        example = dataset[index]
        assert torch.equal(example.image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        assert (example.id, example.label, example.caption) == (dataset.ids[index], label, caption)
        names = ("cat", "dog", "elk")
        assert example.metadata == {"key": f"key-{index}", "label_name": names[label]}


def test_columns_that_are_not_read_are_named(hub, tmp_path):
    path = write("parquet", tmp_path / "x", hub)
    assert HFDataset(path).summary == ""
    found = table()
    found = found.add_column("when", [datetime.date(2026, 1, 1)] * 7)
    found = found.add_column("boxes", [[1, 2]] * 7).add_column("raw", [b"1"] * 7)
    found.to_parquet(str(tmp_path / "y.parquet"))
    summary = HFDataset(tmp_path / "y.parquet").summary
    assert summary == "not read: column when (date32), column boxes (List), column raw (binary)"


def test_a_folder_of_images(hub, tmp_path):
    dataset = HFDataset(write_folder(tmp_path / "x"), text="text", label="label", size=4)
    assert len(dataset) == 7 and dataset[6].image.shape == (3, 4, 4)
    assert dataset[6].caption == "picture 6"


def test_a_column_of_ids(hub, tmp_path):
    path = write("saved", tmp_path / "x", hub)
    dataset = HFDataset(path, id="key", split="train[2:4]")
    assert dataset.ids[0] == dataset[0].id == "key-0" and "key" not in dataset[0].metadata


def test_a_rewritten_file_is_another_dataset(hub, tmp_path):
    path = write("parquet", tmp_path / "x", hub)
    before = HFDataset(path).describe()
    assert HFDataset(path).describe() == before
    write("parquet", tmp_path / "x", hub, "pixel")
    assert HFDataset(path).describe() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "picture"}, "data.image='picture' is not a column .* image, label, text, key"),
        ({"label": "class"}, "data.label='class' is not a column"),
        ({"split": "train[:2]"}, "are not stable ids"),
        ({"split": "test"}, "no split 'test' among train"),
        ({"split": "val"}, "no split 'val'"),
    ],
)
def test_a_setting_that_leads_nowhere_is_refused(settings, message, hub, tmp_path):
    hub.DatasetDict({"train": table()}).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(DminError, match=message):
        HFDataset(tmp_path / "x", **settings)


@pytest.mark.parametrize("path", ["nobody/nothing", "/nowhere/at/all", "/nowhere/x.parquet"])
def test_a_dataset_that_is_not_there_is_refused(path, hub):
    with pytest.raises(DminError, match=f"data.path={path}.* cannot be loaded"):
        HFDataset(path)


def test_a_file_of_another_kind_is_refused(hub, tmp_path):
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(DminError, match=r"x.parquet.* cannot be loaded"):
        HFDataset(tmp_path / "x.parquet")
    (tmp_path / "x.zip").write_text("hello")
    with pytest.raises(DminError, match=r"x.zip.* cannot be loaded"):
        HFDataset(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["text"], "the column holds str, not image files"),
        ([{"bytes": None, "path": None}], "the column holds dict"),
        ([{"bytes": b"", "path": None}], "it is empty"),
        ([{"bytes": None, "path": "/nowhere.png"}], "no such file"),
    ],
)
def test_a_cell_that_holds_no_image_is_named(cells, message, hub, tmp_path):
    hub.Dataset.from_dict({"image": cells}).save_to_disk(str(tmp_path))
    with pytest.raises(DminError, match=f"1 of the 1 image.*row-0000000 .*{message}"):
        HFDataset(tmp_path)
    with pytest.raises(DminError, match=f"image 'row-0000000' of .*{message}"):
        HFDataset(tmp_path, check=False)[0]


def test_unreadable_rows_can_be_left_out_and_keep_the_numbers_of_the_others(hub, tmp_path):
    def spoil(row, at):
        content = row["image"]["bytes"]
        return {
            "image": {"bytes": {2: b"nothing", 5: content[: len(content) // 2]}.get(at, content)}
        }

    encoded = table().cast_column("image", hub.Image(decode=False))
    encoded.map(spoil, with_indices=True).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(DminError, match=r"2 of the 7 image.*data\.on_error=skip"):
        HFDataset(tmp_path / "x")
    for settings, names in (
        ({}, [f"row-{n:07d}" for n in (0, 1, 3, 4, 6)]),
        ({"id": "key"}, [f"key-{n}" for n in (0, 1, 3, 4, 6)]),
    ):
        with pytest.warns(UserWarning, match=r"2 of the 7 image.*They are left out"):
            dataset = HFDataset(tmp_path / "x", text="text", on_error="skip", **settings)
        assert dataset.ids == names == [dataset[i].id for i in range(5)] and len(dataset) == 5
        assert dataset[2].caption == "picture 3"
        assert len(dataset.describe()["skipped"]) == 2


def test_a_large_table_without_problems_is_looked_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "MANY", 5)
    table().save_to_disk(str(tmp_path / "x"))
    looked, probe = [], HFDataset.probe
    monkeypatch.setattr(HFDataset, "probe", lambda *a: looked.append(1) or probe(*a))
    for _ in range(2):
        assert len(HFDataset(tmp_path / "x")) == 7
    assert len(looked) == 7
    HFDataset(tmp_path / "x", size=4)  # another question
    assert len(looked) == 14


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DminError, match=r"pip install 'dmin\[data\]'"):
        HFDataset(tmp_path)
