"""What a model is given with each image: found in folders, columns, tables and tars."""

import io
import json
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from dmin.data import collate
from dmin.data.base import describe_dataset
from dmin.data.huggingface import HFDataset
from dmin.data.image_folder import ImageFolder
from dmin.data.pictures import Pictures
from dmin.data.training_folder import TrainingFolder
from dmin.data.webdataset import TarShards
from dmin.runtime.errors import DminError

NAMES = ("a", "b", "c")


def picture(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), "uint8"))


def content(image):
    kept = io.BytesIO()
    image.save(kept, "PNG")
    return kept.getvalue()


def same(example, seed):
    expected = torch.from_numpy(np.asarray(picture(seed), dtype=np.float32) / 255).permute(2, 0, 1)
    return torch.equal(example.condition_image, expected)


@pytest.fixture
def folder(tmp_path):
    """Images a, b and c; below them, in `before`, those of seeds 10, 11 and 12, and one of none."""
    (tmp_path / "before").mkdir()
    for number, name in enumerate(NAMES):
        picture(number).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"make it {name}")
        picture(10 + number).save(tmp_path / "before" / f"{name}.png")
    picture(13).save(tmp_path / "before" / "of_none.png")
    return tmp_path


@pytest.mark.parametrize("kind", [ImageFolder, TrainingFolder])
def test_a_folder_below_has_files_of_the_same_names(folder, kind):
    found = kind(folder, condition_image="before")
    assert found.ids == ["a.png", "b.png", "c.png"]
    assert all(same(found[i], 10 + i) for i in range(3))
    batch = collate([found[i] for i in range(3)])
    assert batch["condition_image"].shape == (3, 3, 8, 8)
    assert "left out" not in found.summary
    before = describe_dataset(found)
    assert before != describe_dataset(
        kind(folder, leave=["before/"])
        if kind is TrainingFolder
        else ImageFolder(folder, condition_image=folder / "a.png")
    )
    picture(99).save(folder / "before" / "b.png")
    assert describe_dataset(kind(folder, condition_image="before")) != before
    with pytest.raises(DminError, match=r"before/b\.png has changed"):
        found[1]


def test_a_folder_elsewhere_or_a_picture_for_all(folder, tmp_path_factory):
    other = (folder / "before").rename(tmp_path_factory.mktemp("other") / "before")
    found = ImageFolder(folder, condition_image=str(other))
    assert found.ids == ["a.png", "b.png", "c.png"] and same(found[2], 12)
    asked = Pictures(folder / "b.png", condition_image=str(other / "a.png"))
    assert len(asked) == 1 and same(asked[0], 10)


def test_a_column_names_files(folder):
    (folder / "before" / "of_none.png").unlink()
    rows = [{"file_name": f"{n}.png", "text": n, "source": f"before/{n}.png"} for n in NAMES]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ImageFolder(folder, condition_image="source")
    assert all(same(found[i], 10 + i) for i in range(3)) and found[0].caption == "a"
    with pytest.raises(DminError, match=r"condition_image=sauce: this is neither a folder.*column"):
        ImageFolder(folder, condition_image="sauce")


def test_what_cannot_be_paired_is_refused_by_name_or_left_out(folder):
    (folder / "before" / "a.png").unlink()
    (folder / "before" / "c.png").write_bytes(b"no image")
    with pytest.raises(DminError, match=r"a\.png \(it has no condition image\), c\.png \(its con"):
        ImageFolder(folder, condition_image="before")
    with pytest.warns(match="left out"):
        found = ImageFolder(folder, condition_image="before", on_error="skip")
    assert found.ids == ["b.png"]
    picture(1, (8, 4)).save(folder / "before" / "b.png")
    with pytest.raises(
        DminError, match=r"b\.png \(its condition image is 4 × 8 pixels, but the image is 8"
    ):
        ImageFolder(folder, condition_image="before", on_error="skip", size=8)
    picture(10).save(folder / "before" / "a.png")
    found = ImageFolder(folder, condition_image="before", check=False, size=8)
    with pytest.raises(DminError, match=r"'b\.png': its condition image is 4 × 8 pixels"):
        found[1]


@pytest.mark.skipif(not find_spec("datasets"), reason="needs datasets")
def test_a_column_of_a_table(tmp_path):
    import datasets

    columns = {
        "image": [{"bytes": content(picture(i)), "path": None} for i in range(3)],
        "original": [{"bytes": content(picture(10 + i)), "path": None} for i in range(3)],
        "edit": ["make it red"] * 3,
    }
    features = {"image": datasets.Image(), "original": datasets.Image()}
    table = datasets.Dataset.from_dict(
        columns, features=datasets.Features({**features, "edit": datasets.Value("string")})
    )
    table.save_to_disk(str(tmp_path / "table"))
    plain = HFDataset(tmp_path / "table", text="edit")
    found = HFDataset(tmp_path / "table", text="edit", condition_image="original")
    assert all(same(found[i], 10 + i) for i in range(3)) and plain[0].condition_image is None
    assert found.facts(0).caption == "make it red" and "original" not in found.facts(0).metadata
    assert plain.describe()["content"] != found.describe()["content"]
    with pytest.raises(DminError, match=r"data\.condition_image='mask' is not a column"):
        HFDataset(tmp_path / "table", condition_image="mask")


def test_a_pair_of_two_shapes_is_left_out_of_a_tar_and_a_turned_one_is_a_pair(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    kept = io.BytesIO()
    picture(10, (4, 8)).save(kept, "PNG", exif=turned)
    given = [content(picture(10, (8, 4))), content(picture(10, (4, 8))), kept.getvalue()]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, each in enumerate(given):
            parts = {"png": content(picture(number, (8, 4))), "was.png": each}
            for kind, image in parts.items():
                told = tarfile.TarInfo(f"{number}.{kind}")
                told.size = len(image)
                tar.addfile(told, io.BytesIO(image))
    with pytest.warns(match=r"0/1 \(its condition image is 8 × 4 pixels, but the image is 4 × 8"):
        found = TarShards(str(tmp_path / "0.tar"), on_error="skip", condition_image="was")
    assert [each.condition_image.shape for each in found] == [(3, 8, 4)] * 2


def test_a_part_of_a_sample_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3):
            parts = {"png": picture(number), "Before.png": picture(10 + number)}
            for kind, image in parts.items():
                if (number, kind) != (2, "Before.png"):
                    told = tarfile.TarInfo(f"{number}.{kind}")
                    told.size = len(content(image))
                    tar.addfile(told, io.BytesIO(content(image)))
    shards = {"shards": str(tmp_path / "0.tar"), "on_error": "skip"}
    with pytest.warns(match=r"0/2 \(it has no condition image\)"):
        found = TarShards(**shards, condition_image="Before")
    plain = TarShards(**shards)
    assert len(plain) == 3 and found.ids == ["0/0", "0/1"] and same(found[1], 11)
    assert plain.describe()["content"] != found.describe()["content"]
