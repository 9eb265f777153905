"""What is decoded is what was digested: data that change meanwhile are refused at their turn."""

import os

import numpy as np
import pytest
from examples_on_disk import encoded, write_folder, write_shards

from dmin.data import survey
from dmin.data.huggingface import HFDataset
from dmin.data.image_folder import ImageFolder
from dmin.data.masks import Masks
from dmin.data.training_folder import TrainingFolder
from dmin.data.webdataset import TarShards
from dmin.runtime.errors import DminError


def in_place(path, old, new):
    """Change bytes of a file in place; its size and its time stay."""
    before, content = path.stat(), path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def pixels(tmp_path):
    """Return the bytes of the fourth picture, and of one of as many bytes that differs."""
    one = (write_folder(tmp_path / "one") / "3.png").read_bytes()
    other = (write_folder(tmp_path / "other", "pixel") / "3.png").read_bytes()
    assert len(one) == len(other) and one != other
    return one, other


def folder(place):
    return ImageFolder(write_folder(place)), place / "3.png"


def shards(place):
    return TarShards(write_shards(place)), place / "part-000.tar"


def table(place):
    datasets = pytest.importorskip("datasets")
    files = [{"bytes": None, "path": str(write_folder(place) / f"{n}.png")} for n in range(7)]
    datasets.Dataset.from_dict({"image": files}).save_to_disk(str(place / "table"))
    return HFDataset(place / "table"), place / "3.png"


@pytest.mark.parametrize("make", [folder, shards, table])
@pytest.mark.parametrize("described", [False, True])
def test_an_image_that_changes_meanwhile_is_refused_at_its_turn(make, described, tmp_path):
    dataset, file = make(tmp_path / "x")
    if described:
        dataset.describe()
    in_place(file, *pixels(tmp_path))
    assert dataset[2].image.shape == (3, 8, 8)
    with pytest.raises(DminError, match=r"3(\.png)? has changed since the data were surveyed"):
        dataset[3]
    in_place(file, *pixels(tmp_path / "again")[::-1])
    assert dataset[3].image.shape == (3, 8, 8)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda file: file.unlink(), "Could not read .*part-000.tar .*No such file"),
        (lambda file: os.truncate(file, 700), "part-000.tar cannot be read: it is shorter"),
    ],
)
def test_a_shard_that_is_gone_or_shorter_is_refused_at_its_turn(change, named, tmp_path):
    dataset, file = shards(tmp_path / "x")
    change(file)
    for look in (dataset.__getitem__, dataset.facts):
        with pytest.raises(DminError, match=named):
            look(3)


def test_a_caption_in_a_tar_that_changes_is_refused_as_well(tmp_path):
    dataset, file = shards(tmp_path / "x")
    in_place(file, b"picture 3", b"painted 3")
    with pytest.raises(DminError, match="3 has changed"):
        dataset[3]


def test_a_mask_that_changes_is_refused_at_its_turn(tmp_path):
    for name, grey in (("a.png", 9), ("a-masklabel.png", 255)):
        (tmp_path / name).write_bytes(encoded(np.full((4, 4), grey, np.uint8)))
    masks = Masks(suffix="-masklabel.png")
    dataset = TrainingFolder(tmp_path, leave=["-masklabel.png"], masks=masks)
    dataset.describe()
    assert dataset[0].mask.min() == 1
    (tmp_path / "a-masklabel.png").write_bytes(encoded(np.full((4, 4), 99, np.uint8)))
    with pytest.raises(DminError, match=r"a-masklabel\.png has changed"):
        dataset[0]


@pytest.mark.parametrize("make", [folder, shards])
def test_a_cache_is_keyed_by_inode_and_time_of_change(make, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "LARGE", 1)
    monkeypatch.setattr(survey, "_SETTLED_NS", -(10**12))
    dataset, file = make(tmp_path / "x")
    before = dataset.describe()
    looked, look = [], survey._stamp
    monkeypatch.setattr(survey, "_stamp", lambda path: looked.append(path) or look(path))
    os.utime(file, (1, 1))
    assert dataset.describe() == before and looked, "the same bytes are hashed anew, not refused"
    in_place(file, *pixels(tmp_path))
    assert dataset.describe() != before, "size and time are the same, the inode's time is not"


def test_a_large_table_keeps_its_sums(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "MANY", 5)
    _, file = table(tmp_path / "x")
    dataset = HFDataset(tmp_path / "x/table")
    in_place(file, *pixels(tmp_path))
    with pytest.raises(DminError, match="row-0000003 has changed"):
        dataset[3]
