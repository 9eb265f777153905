"""What cannot be used is refused, or left out by name, while data are surveyed."""

import io
import json
import os

import numpy as np
import pytest
import torch
from examples_on_disk import encoded, write_tar
from PIL import Image, PngImagePlugin

from dmin.data.captions import Captions
from dmin.data.huggingface import HFDataset
from dmin.data.image_folder import ImageFolder
from dmin.data.pixels import Pixels
from dmin.data.texts import decode_text
from dmin.data.training_folder import TrainingFolder
from dmin.data.webdataset import TarShards
from dmin.runtime.errors import DminError

PICTURE = encoded(np.full((4, 4, 3), 99, np.uint8))
DEEP = "[" * 90 + "]" * 90
# What is said of an image, as JSON, and what is wrong with it.
ODD = {
    "NaN": ('"more": NaN', "more is nan, which JSON cannot represent: write null"),
    "infinite": ('"more": {"x": [1, -1e999]}', "x is -inf"),
    "half a character": ('"more": "\\ud800"', "more has an unpaired surrogate"),
    "a name": ('"\\udfff": 1', "a name in it has an unpaired surrogate"),
    "large number": ('"more": 1' + "0" * 20, "more is a number of more than 64 bits"),
    "larger number": ('"more": 1' + "0" * 5000, "not JSON"),
    "deep": (f'"more": {DEEP}', "more is nested more than 64 deep"),
    "deeper": ('"more": ' + "[" * 10**5, "not JSON"),
    "long": ('"more": "' + "x" * (2**20 + 1) + '"', "more has 1,048,577 characters"),
    "broken": ('"more', "not JSON"),
    "label": ('"label": 1.5', "the label 1.5"),
    "large label": ('"label": 1e300', "the label 1e\\+300"),
    "twice": ('"more": 1, "more": 2', "'more' occurs twice in an object"),
}


def in_folder(place, said, **settings):
    rows = []
    for name, each in (("a.png", said), ("b.png", '"more": 1')):
        (place / name).write_bytes(PICTURE)
        rows.append(f'{{"file_name": "{name}", {each}}}')
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return ImageFolder(place, **settings)


def in_files(place, said, **settings):
    for name, each in (("a", said), ("b", '"more": 1')):
        (place / f"{name}.png").write_bytes(PICTURE)
        (place / f"{name}.json").write_text(f"{{{each}}}")
    return ImageFolder(place, **settings)


def in_tar(place, said, **settings):
    members = []
    for name, each in (("a", said), ("b", '"more": 1')):
        members += [(f"{name}.png", PICTURE), (f"{name}.json", f"{{{each}}}".encode())]
    return TarShards(str(write_tar(place / "x.tar", members)), **settings)


@pytest.mark.parametrize("write", [in_folder, in_files, in_tar])
@pytest.mark.parametrize("name", ODD)
def test_what_a_store_cannot_keep_is_refused_or_left_out_by_name(name, write, tmp_path):
    said, message = ODD[name]
    with pytest.raises(DminError, match=message):
        write(tmp_path, said)
    with pytest.warns(UserWarning, match="They are left out"):
        dataset = write(tmp_path, said, on_error="skip")
    assert [os.path.basename(id) for id in dataset.ids] in (["b.png"], ["b"])
    assert len(dataset.describe()["skipped"]) == 1
    json.dumps(dataset[0].describe(), allow_nan=False).encode()


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.parquet"])
def test_two_columns_of_one_name_are_refused(table, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    cells = [["file_name", "a.png"], ["label", "1"], ["label", "2"]]
    if table.endswith("csv"):
        (tmp_path / table).write_text("\n".join(map(",".join, zip(*cells, strict=True))))
    else:
        pyarrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
        columns = pyarrow.table([[cell] for _, cell in cells], names=[name for name, _ in cells])
        parquet.write_table(columns, tmp_path / table)
    with pytest.raises(DminError, match=f"{table} has two columns 'label'. Rename one"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.jsonl", "thing"])
def test_what_has_no_end_is_never_read(name, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / name)
    dataset = ImageFolder(tmp_path)
    assert dataset.ids == ["a.png"] and f"1 pipe, socket or device ({name})" in dataset.summary


@pytest.mark.parametrize(
    ("name", "reason"), [("b.png", "it is a pipe"), ("\0", "not a valid file name")]
)
@pytest.mark.parametrize("check", [True, False])
def test_a_row_that_names_no_file_is_refused_or_left_out(name, reason, check, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "b.png")
    rows = [json.dumps({"file_name": each}) for each in ("a.png", name)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(DminError, match=reason if check else "there is no such file"):
        ImageFolder(tmp_path, check=check)
    if check:
        with pytest.warns(UserWarning, match="They are left out"):
            assert ImageFolder(tmp_path, on_error="skip").ids == ["a.png"]


def test_a_sample_whose_name_is_no_text_is_refused_or_left_out(tmp_path):
    shard = str(write_tar(tmp_path / "x.tar", [("a\udc80.png", PICTURE), ("b.png", PICTURE)]))
    with pytest.raises(DminError, match="its name is not UTF-8"):
        TarShards(shard)
    with pytest.warns(UserWarning, match="They are left out"):
        assert TarShards(shard, on_error="skip").ids == ["x/b"]


def test_where_nothing_is_left_it_is_said_what_was_wrong(tmp_path):
    with pytest.raises(DminError, match=r"1 of the 1 image.*metadata.jsonl, line 1 .*not JSON"):
        (tmp_path / "a.png").write_bytes(PICTURE)
        (tmp_path / "metadata.jsonl").write_text("{")
        ImageFolder(tmp_path, on_error="skip")


def test_a_table_is_held_to_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": PICTURE, "path": None}, "text": t, "x": x}
            for t, x in (("a", 1.0), ("b", float("nan")), (None, 2.0))]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(DminError, match=r"row-0000001 \(the metadata of row 1: x is nan"):
        HFDataset(tmp_path / "x", text="text")
    with pytest.warns(UserWarning, match="2 of the 3 .*it has no caption, and others have"):
        assert HFDataset(tmp_path / "x", text="text", on_error="skip").ids == ["row-0000000"]


def test_a_large_cell_of_a_csv_is_left_out_like_others(tmp_path):
    in_folder(tmp_path, '"more": 1')
    os.remove(tmp_path / "metadata.jsonl")
    rows = ["file_name,text", f"a.png,{'x' * (2**20 + 1)}", "b.png,y", "c.png,1,2"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(DminError, match="line 4 has more cells than the header"):
        ImageFolder(tmp_path)
    with pytest.warns(UserWarning, match=r"a\.png \(.*text has 1,048,577 characters.*line 4"):
        assert ImageFolder(tmp_path, on_error="skip").ids == ["b.png"]


def test_images_without_a_caption_are_left_out_where_others_have_one(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(PICTURE)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    os.rename(tmp_path / "b.txt", tmp_path / "b.caption")
    assert ImageFolder(tmp_path, layout="txt").ids == ["a.png", "b.png", "c.png"]
    with pytest.raises(DminError, match=r"b\.caption is not UTF-8"):
        ImageFolder(tmp_path)
    both = Captions(extensions=(".txt", ".caption"))
    for make in (ImageFolder, lambda *a, **k: TrainingFolder(*a, captions=both, **k)):
        with pytest.warns(UserWarning, match=r"b\.png \(.*not UTF-8.*c\.png \(it has no caption"):
            dataset = make(tmp_path, on_error="skip")
        assert dataset.ids == ["a.png"] and dataset.summary.startswith("1 images · ")
        assert "ignored: 2 images left out (b.png, c.png)" in dataset.summary
    assert len(ImageFolder(tmp_path, layout="labels", on_error="skip")) == 3


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_by_its_byte_order_mark(codec, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "a.txt").write_text("café 猫", codec)
    assert ImageFolder(tmp_path)[0].caption == "café 猫"
    rows = '{"file_name": "a.png", "text": "tasse é"}\n'
    (tmp_path / "metadata.jsonl").write_text(rows, codec)
    assert ImageFolder(tmp_path)[0].caption == "tasse é"
    with pytest.raises(DminError, match="x is not UTF-8"):
        decode_text("é".encode("utf-16-be"), "x")


def png(text, times=1):
    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for number in range(times):
        about.add_text(f"workflow {number}", text, zip=True)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def test_a_long_text_in_a_picture_is_no_damage(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)  # as Pillow has it
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 4 << 20)
    content = png("x" * (3 << 20))
    Pixels().probe(content, "x")
    assert Pixels().decode(content, "x").image.shape == (3, 3, 4)
    for look in (Pixels().probe, Pixels().decode):
        with pytest.raises(DminError, match="the text in it is longer than 4 MiB"):
            look(png("x" * (3 << 20), 2), "x")


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_whatever_else_its_exif_says(turn):
    exif, pixels = Image.Exif(), np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif[0x0112] = turn
    plain = Pixels(mode="L").decode(encoded(pixels, exif=exif), "x").image
    ways = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.T]
    ways += [np.rot90(pixels, -1), pixels[::-1, ::-1].T, np.rot90(pixels)]
    assert torch.equal((plain[0] * 255).round().byte(), torch.from_numpy(ways[turn - 1].copy()))
    exif[0x010E] = "x"
    damaged = exif.tobytes().replace(b"\x0e\x01\x02\x00", b"\x0e\x01\xff\x00")
    odd = Pixels(mode="L").decode(encoded(pixels, exif=damaged), "x").image
    assert torch.equal(odd, plain)
