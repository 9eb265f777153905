"""Stores are of what was computed from; other metadata change, and are taken over."""

import dataclasses
import json

import examples_on_disk as on_disk
import numpy as np
import pytest
import torch

from dmin.attribution.search.selection import Selection
from dmin.cli import main
from dmin.collect.described import as_found, describe, refresh_metadata, warn_if_stale
from dmin.data.base import Example, Examples, Facts, describe_fully
from dmin.data.huggingface import HFDataset
from dmin.data.ids import facts_of
from dmin.data.image_folder import ImageFolder
from dmin.data.subset import Subset
from dmin.data.webdataset import TarShards
from dmin.models.contract import encoded
from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter, revisions
from dmin.store.maintenance import compact, info, merge
from dmin.store.removal import remove


def stored(dataset, path, described):
    """Write a store of a dataset, as if it had been collected."""
    layout = Layout(("loss",), 1, (1.0,), ("model",), 4)
    manifest = Manifest(layout, {"weights": "w", "loss": {}}, described, len(dataset), 3)
    facts, ids = list(facts_of(dataset)), list(dataset.ids)
    with StoreWriter(path, manifest) as writer:
        for block in writer.pending():
            rows = manifest.block_rows(block)
            part = slice(rows.start, rows.stop)
            features = np.random.default_rng(block).standard_normal((len(rows), 1, 1, 1, 4))
            norms = np.ones((len(rows), 1, 1, 1), np.float32)
            kept = [each.describe() for each in facts[part]]
            content = {"loss": features.astype(np.float32)}, {"loss": norms}, norms[..., 0]
            writer.append(block, Rows(ids[part], kept, *content))
    return Store(path)


def folder(place, change=None, artists="", drop=()):
    """Write a folder of images whose metadata have an artist, if one is named."""
    on_disk.write_folder(place, change)
    lines = []
    for number, (_, label, caption) in enumerate(on_disk.rows(change)):
        row = {"file_name": f"{number}.png", "label": label, "text": caption}
        if artists:
            row["artist"] = artists[number % len(artists)]
        if number not in drop:
            lines.append(json.dumps(row) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    return ImageFolder(place)


DESCRIBED = {"now": describe, "before": describe_fully}


@pytest.fixture(params=DESCRIBED)
def store(request, tmp_path):
    """Of a folder of images, as it would be described now, and with all metadata as before."""
    data = folder(tmp_path / "images", artists="xy")
    return stored(data, tmp_path / "store", DESCRIBED[request.param](data))


def test_metadata_are_taken_over(store, tmp_path, capsys):
    files = {file.name: file.read_bytes() for file in store.path.glob("*.h5")}
    digest, _ = store.digest(), store.metadata
    data = folder(tmp_path / "images", artists="abc")
    assert main(["store", "metadata", str(store.path), str(tmp_path / "images")]) == 0
    assert "7 rows have the current metadata" in capsys.readouterr().out
    assert [row["artist"] for row in store.metadata[:2]] == ["x", "y"], "it was open before"
    found = Store(store.path)
    assert [row["artist"] for row in found.metadata] == list("abcabca")
    assert found.metadata[3] == {"artist": "a", "label": 0, "caption": "picture 3"}
    assert found.digest() == digest and info(found)["metadata renewed"]
    assert {file.name: file.read_bytes() for file in found.path.glob("*.h5")} == files
    # What asks by metadata asks the new ones.
    assert Selection(where={"artist": "c"}).candidates(found.metadata)[0] == 2
    names, groups = Selection(group_by="artist").groups(found.metadata)
    assert names == ["a", "b", "c"] and groups.tolist() == [0, 1, 2, 0, 1, 2, 0]
    # It is a store of these data from now on, and of the same ones when they change once more.
    for artists in ("abc", "z"):
        data = folder(tmp_path / "images", artists=artists)
        here = dataclasses.replace(found.manifest, dataset=describe(data), revisions=())
        assert StoreWriter(store.path, here).pending() == []
    refresh_metadata(store.path, data)
    assert {row["artist"] for row in Store(store.path).metadata} == {"z"}
    kept = compact(Store(store.path), tmp_path / "compacted")
    assert kept.metadata == merge([store.path], tmp_path / "merged").metadata
    assert {row["artist"] for row in kept.metadata} == {"z"} and not kept.metadata_digest


def test_a_column_may_come_and_go(store, tmp_path):
    refresh_metadata(store.path, folder(tmp_path / "images"))
    assert all("artist" not in row for row in Store(store.path).metadata)


@pytest.mark.parametrize("change", on_disk.CHANGES)
def test_no_more_than_metadata_is_taken_over(store, tmp_path, change):
    data = folder(tmp_path / "images", change, artists="abc")
    with pytest.raises(DminError, match=r"was collected from other data: .*content: "):
        refresh_metadata(store.path, data)
    if change != "pixel":  # of which a store keeps no copy
        with pytest.raises(DminError, match=rf"collected from other data: 3\.png\.{change}: "):
            refresh_metadata(store.path, data, same_images=True)
    assert Store(store.path).metadata == store.metadata


def test_ids_that_differ_are_named(store, tmp_path):
    data = folder(tmp_path / "images", artists="abc", drop=(2, 5))
    with pytest.raises(DminError, match=r"2 are in the store alone \('2\.png', '5\.png'\)"):
        refresh_metadata(store.path, data, same_images=True)
    whole = folder(tmp_path / "images", artists="abc")
    part = stored(data, tmp_path / "part", describe(data))
    with pytest.raises(DminError, match=r"2 are in the data alone .*collect.grow=true"):
        refresh_metadata(part.path, whole)
    # Those removed may be in the data, or not any more.
    remove(store, ["2.png", "5.png"])
    refresh_metadata(store.path, whole)
    with pytest.raises(DminError, match="set same_images=true"):
        refresh_metadata(store.path, data)
    found = refresh_metadata(store.path, data, same_images=True)
    assert found.ids == data.ids and found.metadata[2]["artist"] == "a"
    assert b"picture 5" not in (store.path / "metadata.jsonl").read_bytes()


def test_it_is_there_whole_or_not_at_all(store, tmp_path, monkeypatch):
    data = folder(tmp_path / "images", artists="abc")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(revisions, "commit", full)
        with pytest.raises(DminError, match="the disk is full"):
            refresh_metadata(store.path, data)
    assert Store(store.path).metadata == store.metadata
    # Stopped between its two files, it is done when it is given again.
    with monkeypatch.context() as patch:
        patch.setattr("dmin.collect.described.begin_revision", full)
        try:
            refresh_metadata(store.path, data)
        except OSError:
            assert "schema" not in store.manifest.dataset
    assert refresh_metadata(store.path, data).metadata[1]["artist"] == "b"
    file = store.path / "metadata.jsonl"
    whole = file.read_bytes()
    for place in range(0, len(whole), 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DminError, match=r"metadata\.jsonl (is damaged|was written for)"):
            Store(store.path).metadata[:]


def test_an_older_store_is_found_as_long_as_nothing_changed(tmp_path):
    data = folder(tmp_path / "images", artists="xy")
    store = stored(data, tmp_path / "store", describe_fully(data))
    here = dataclasses.replace(store.manifest, dataset=describe(data))
    assert as_found(here, data, store.path).dataset == store.manifest.dataset
    assert as_found(here, data, tmp_path / "nowhere") is here
    now = folder(tmp_path / "images", artists="ab")
    assert as_found(here, now, store.path) is here
    with pytest.raises(
        DminError, match=r"`dmin store metadata .*/store FOLDER`.*updates the store"
    ):
        StoreWriter(store.path, here)


def tars(place, extra):
    on_disk.write_shards(place)
    for path in sorted(place.glob("*.tar")):
        parts = []
        for number, (pixels, label, caption) in enumerate(on_disk.rows()):
            said = {"label": label, "text": caption, **extra}
            parts += [(f"{number}.png", on_disk.encoded(pixels))]
            parts += [(f"{number}.json", json.dumps(said).encode())]
        on_disk.write_tar(path, parts)
    return TarShards(f"{place}/*.tar")


def table(place, extra):
    pytest.importorskip("datasets")
    whole = on_disk.table()
    for name, value in extra.items():
        whole = whole.add_column(name, [value] * len(whole))
    whole.save_to_disk(str(place))
    return HFDataset(place, text="text", label="label", id="key")


def images(place, extra):
    return folder(place, artists=list(extra.values()))


@pytest.mark.parametrize("make", [images, tars, table])
@pytest.mark.parametrize("part", [False, True])
def test_what_nothing_is_computed_from_is_in_no_description(make, part, tmp_path):
    cases = {"one": {"artist": "a"}, "two": {"artist": "b"}, "three": {"licence": "c"}}
    found = [make(tmp_path / name, extra) for name, extra in cases.items()]
    if part:
        found = [Subset(data, ids=list(data.ids)[:3]) for data in found]
    first, *others = map(describe, found)
    assert first["schema"] == 2 and all(each == first for each in others)
    assert describe_fully(found[0]) != describe_fully(found[1])
    # Nothing is decoded for it, and it is the same.
    assert [f.describe() for f in facts_of(found[0])] == [
        found[0][i].describe() for i in range(len(found[0]))
    ]


def test_metadata_that_are_stale_are_told_of(store, tmp_path, recwarn):
    warn_if_stale(store, folder(tmp_path / "images", artists="xy"))
    assert not recwarn
    now = folder(tmp_path / "images", artists="xyxxxxx")
    with pytest.warns(
        DminWarning, match=r'3\.png: artist: "x" here, "y" there.*dmin store metadata'
    ):
        warn_if_stale(store, now)
    refresh_metadata(store.path, now)
    recwarn.clear()
    warn_if_stale(Store(store.path), now)
    assert not recwarn


def test_columns_that_a_model_reads_are_in_its_description(tmp_path):
    one, two = (folder(tmp_path / name, artists=name) for name in ("x", "y"))
    assert describe(one) == describe(two)
    assert describe(one, ["artist"]) != describe(two, ["artist"])
    store = stored(one, tmp_path / "store", describe(one, ["artist"]))
    with pytest.raises(DminError, match=r"other data: columns\.content: "):
        refresh_metadata(store.path, two)


def test_masks_of_the_loss_are_in_the_description():
    image, half = torch.ones(1, 4, 4), torch.full((1, 4, 4), 0.5)
    found = [describe(Examples([Example("a", image, mask=m)])) for m in (None, image, half)]
    assert found[0] != found[1] != found[2] != found[0]


def test_a_model_reads_only_what_it_declares(ddpm):
    class Reads(type(ddpm)):
        def encode(self, batch):
            assert [facts.get("artist") for facts in batch["metadata"]] == ["x"]
            return super().encode(batch)

    model = Reads(ddpm.network, ddpm.scheduler)
    batch = {
        **{"id": ["a"], "label": [1], "caption": [None], "sizes": [None]},
        **{"image": torch.zeros(1, 1, 8, 8), "metadata": [{"artist": "x", "label": 1}]},
    }
    with pytest.raises(DminError, match=r"reads 'artist' .* metadata_columns = \['artist'\]"):
        encoded(model, batch)
    model.metadata_columns = ["artist"]
    encoded(model, batch)


@pytest.mark.parametrize("described", DESCRIBED.values())
def test_a_column_that_once_stood_for_a_label_is_renamed(described, tmp_path, monkeypatch):
    folder(tmp_path / "images")
    data = ImageFolder(tmp_path / "images", label=None)
    with monkeypatch.context() as then:
        then.setattr(Facts, "describe", lambda facts: {"caption": facts[1], **facts.metadata})
        stored(data, tmp_path / "store", described(data))
    assert "label" in Store(tmp_path / "store").metadata[0]
    with pytest.warns(DminWarning, match="dmin store metadata"):
        warn_if_stale(Store(tmp_path / "store"), data)
    for same_images in (False, True):
        kept = refresh_metadata(tmp_path / "store", data, same_images).metadata[2]
        assert kept == {"caption": "picture 2", "metadata_label": 2}
