"""Tar shards: samples by random access, and what is wrong with a shard by name."""

import gzip
import json

import pytest
import torch
from examples_on_disk import encoded, rows, write_shards, write_tar

from dmin.data import survey
from dmin.data.webdataset import TarShards
from dmin.runtime.errors import DminError

PICTURE = encoded(rows()[0][0])


def test_samples_of_all_shards_in_order(tmp_path):
    dataset = TarShards(write_shards(tmp_path))
    assert dataset.ids == [f"part-{0 if n < 4 else 1:03d}/{n}" for n in range(7)]
    for index, (pixels, label, caption) in enumerate(rows()):
        example = dataset[index]
        assert torch.equal(example.image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        assert (example.label, example.caption) == (label, caption)


@pytest.mark.parametrize(
    "pattern", ["*.tar", "part-{000,001}.tar", "part-00{0..1}.tar", "*-00?.tar"]
)
def test_patterns_of_shards(pattern, tmp_path):
    write_shards(tmp_path)
    assert len(TarShards(f"{tmp_path}/{pattern}")) == 7
    assert len(TarShards([f"{tmp_path}/part-000.tar", f"{tmp_path}/{pattern}"])) == 7


def test_json_gives_what_no_file_of_its_own_does(tmp_path):
    fields = {"caption": "from json", "label": 4, "url": "u"}
    members = [
        ("./deep/a.b.jpg", encoded(rows()[0][0], "JPEG")),  # the key ends at the first dot
        ("deep/k.WEBP", encoded(rows()[0][0], "WEBP")),
        ("deep/k.json", json.dumps(fields).encode()),
        ("deep/k.cls", b"cat\n"),
        ("deep/k.embedding.npy", b"123"),
    ]
    with pytest.raises(DminError, match=r"1 of the 2 image.*x/deep/a \(it has no images"):
        TarShards(str(write_tar(tmp_path / "x.tar", members)))
    dataset = TarShards(str(write_tar(tmp_path / "x.tar", members[1:])), text="caption")
    example = dataset[0]
    assert example.id == "x/deep/k" and example.caption == "from json"
    assert example.label == "cat" and example.metadata == {"url": "u"}


def test_members_that_are_not_read_are_named(tmp_path):
    members = [(f"{n}.png", PICTURE) for n in range(3)]
    assert TarShards(str(write_tar(tmp_path / "a.tar", members))).summary == ""
    members += [(f"{n}.embedding.npy", b"1") for n in range(2)]
    members += [("0.caption", b"a"), ("._0.png", b"x"), ("LICENSE", b"x")]
    summary = TarShards(str(write_tar(tmp_path / "x.tar", members))).summary
    assert summary == "not read: 2 .embedding.npy, 2 without a key or suffix, 1 .caption"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("a.txt", b"x")], r"1 of the 1 image.*x/a \(it has no images"),
        ([("a.png", PICTURE), ("a.jpg", PICTURE)], r"1 of the 1 image.*x/a \(it has 2 images"),
        ([("a.png", PICTURE), ("a.png", PICTURE)], "a.png twice"),
    ],
)
def test_a_shard_with_a_mistake_is_refused(members, message, tmp_path):
    with pytest.raises(DminError, match=message):
        TarShards(str(write_tar(tmp_path / "x.tar", members)))


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("json", b"{", "the json of x/a .*is not JSON"),
        ("json", b"[]", "the json of x/a .*is not a JSON object"),
        ("txt", b"\xff", "the text of x/a .*is not UTF-8"),
        ("json", b'{"label": []}', r"x/a .*has the label \[\]"),
    ],
)
def test_a_part_with_a_mistake_is_refused(kind, content, message, tmp_path):
    members = [("a.png", PICTURE), (f"a.{kind}", content)]
    shard = str(write_tar(tmp_path / "x.tar", members))
    with pytest.raises(DminError, match=message):
        TarShards(shard)
    with pytest.raises(DminError, match=message):
        TarShards(shard, check=False)[0]


def test_an_unreadable_image_is_named_with_its_shard(tmp_path):
    shard = str(write_tar(tmp_path / "x.tar", [("a.png", b"nothing")]))
    with pytest.raises(DminError, match=r"1 of the 1 image.* of data.shards=.*x/a \(its content"):
        TarShards(shard)
    with pytest.raises(DminError, match=r"x/a \(.*x\.tar\) cannot be read"):
        TarShards(shard, check=False)[0]


BAD = [
    ("a.png", PICTURE),
    ("b.png", PICTURE[: len(PICTURE) // 2]),
    ("c.txt", b"of nothing"),
    ("d.png", PICTURE),
    ("d.json", b"{"),
    ("e.png", PICTURE),
]


def test_unreadable_samples_can_be_left_out_and_are_counted(tmp_path):
    write_tar(tmp_path / "x.tar", BAD)
    write_tar(tmp_path / "y.tar", BAD[:1])
    with pytest.warns(UserWarning, match=r"3 of the 6 image.*x/b.*x/c.*x/d.*They are left out"):
        dataset = TarShards(f"{tmp_path}/*.tar", on_error="skip")
    assert dataset.ids == ["x/a", "x/e", "y/a"] and len(dataset) == 3
    assert [dataset[i].id for i in range(3)] == dataset.ids
    assert sorted(dataset.skipped) == ["x/b", "x/c", "x/d"]
    assert dataset.describe()["skipped"] == ["x/b", "x/c", "x/d"]
    with pytest.raises(DminError, match=r"data\.on_error=skip"):
        TarShards(f"{tmp_path}/*.tar")
    with pytest.raises(DminError, match=r"set data\.check=true"):
        TarShards(f"{tmp_path}/*.tar", on_error="skip", check=False)


def test_what_was_wrong_with_a_large_shard_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "LARGE", 1)
    monkeypatch.setattr(survey, "_SETTLED_NS", -(10**12))
    write_tar(tmp_path / "x.tar", BAD)
    looked = []
    probe = TarShards.probe
    monkeypatch.setattr(TarShards, "probe", lambda *a: looked.append(a[2]) or probe(*a))
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 of the 5"):
            dataset = TarShards(str(tmp_path / "x.tar"), on_error="skip")
        assert dataset.ids == ["x/a", "x/e"]
    assert looked == ["x/a", "x/b", "x/d", "x/e"]
    digest = dataset.describe()["content"]
    write_tar(tmp_path / "x.tar", BAD[:1])
    assert TarShards(str(tmp_path / "x.tar")).describe()["content"] != digest


def test_a_shard_cut_off_anywhere_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", PICTURE), ("b.png", PICTURE)])
    whole = path.read_bytes()
    end = 2 * (512 + -(-len(PICTURE) // 512) * 512)
    for length in range(0, end + 512, 128):
        path.write_bytes(whole[:length])
        with pytest.raises(DminError, match=r"x\.tar"):
            TarShards(str(path))
    path.write_bytes(whole[: end + 512])
    assert len(TarShards(str(path))) == 2


def test_a_compressed_shard_is_refused(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [("a.png", PICTURE)]).read_bytes()
    (tmp_path / "x.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(DminError, match="Decompress it if it is compressed"):
        TarShards(f"{tmp_path}/x.tar")


@pytest.mark.parametrize("pattern", ["*.tar", "x.tar", "part-{000..002}.tar"])
def test_shards_that_are_not_there_are_refused(pattern, tmp_path):
    if "{" in pattern:
        write_shards(tmp_path)
    with pytest.raises(DminError, match=r"there is no .*(part-002|x|[*])\.tar"):
        TarShards(f"{tmp_path}/{pattern}")


def test_two_shards_of_one_name_are_refused(tmp_path):
    write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    with pytest.raises(DminError, match=r"a/part-000.tar and .*b/part-000.tar have the same name"):
        TarShards(f"{tmp_path}/*/*.tar")
