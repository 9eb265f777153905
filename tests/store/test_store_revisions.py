"""Stores that grow, shrink and come from elsewhere: rows that stay are the same to the bit."""

import json
import os

import numpy as np
import pytest

from dmin.runtime.errors import DminError
from dmin.store import Rows, Store, StoreWriter
from dmin.store.export import export
from dmin.store.interchange import import_store
from dmin.store.maintenance import compact, convert, info, merge, verify
from dmin.store.manifest import Manifest
from dmin.store.removal import remove
from dmin.store.revisions import append, begin_revision


def write(path, manifest, make_rows, blocks=None, **options):
    with StoreWriter(path, manifest, **options) as writer:
        for block in writer.pending() if blocks is None else blocks:
            writer.append(block, make_rows(manifest, block))
    return Store(path)


@pytest.fixture
def store(tmp_path, make_manifest, make_rows):
    """30 rows in blocks of 4: the last block has 2."""
    return write(tmp_path / "s", make_manifest(), make_rows, segment_bytes=9000)


@pytest.fixture
def more(tmp_path, make_manifest, make_rows):
    """The next 9 examples, collected apart, in blocks of 5."""
    manifest = make_manifest(num_examples=9, block_size=5, dataset={"name": "more"})
    whole = make_manifest(num_examples=39, block_size=1)

    def shifted(manifest, block):
        parts = [make_rows(whole, 30 + row) for row in manifest.block_rows(block)]
        return joined(parts)

    return write(tmp_path / "more", manifest, shifted)


def joined(parts):
    def both(name):
        return {r: np.concatenate([getattr(p, name)[r] for p in parts]) for r in parts[0].norms}

    return Rows(
        [id for part in parts for id in part.ids],
        [entry for part in parts for entry in part.metadata],
        both("features"),
        both("norms"),
        np.concatenate([part.losses for part in parts]),
    )


@pytest.fixture
def all_at_once(tmp_path, make_manifest, make_rows):
    return write(tmp_path / "whole", make_manifest(num_examples=39), make_rows)


def test_what_is_appended_comes_behind(store, more, all_at_once, make_manifest):
    before = {file.name: file.read_bytes() for file in store.path.glob("*.h5")}
    found = append(store.path, more)
    assert found.complete and found.digest() == all_at_once.digest()
    assert found.metadata == all_at_once.metadata
    assert info(found)["grown"] == 1 and found.manifest.num_blocks == 8 + 3
    assert all((store.path / name).read_bytes() == content for name, content in before.items())
    assert found.manifest.dataset["joined"][0]["dataset"] == store.manifest.dataset
    assert found.fingerprint != store.fingerprint
    assert Manifest.from_json(found.manifest.to_json()) == found.manifest
    with pytest.raises(DminError, match=r"the dataset changed since collection"):
        StoreWriter(store.path, make_manifest())
    assert verify(store.path).digest() == all_at_once.digest()


def test_appending_resumes(store, more, all_at_once, monkeypatch):
    original, calls = StoreWriter.append, []

    def dies(self, block, rows):
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, block, rows)

    monkeypatch.setattr(StoreWriter, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        append(store.path, more)
    half = Store(store.path, growing=True)
    assert not half.complete and len(half) == 34 and len(Store(store.path)) == 30
    with pytest.raises(DminError, match="34 of 39 rows"):
        half.require_complete()
    monkeypatch.setattr(StoreWriter, "append", original)
    assert append(store.path, more).digest() == all_at_once.digest()


def test_only_like_features_are_appended(store, tmp_path, make_manifest, make_rows):
    other = write(tmp_path / "o", make_manifest(features={"weights": "cd"}), make_rows)
    with pytest.raises(DminError, match=r"features\.weights: \"cd\" here, \"ab12\" there"):
        append(store.path, other)
    half = write(tmp_path / "h", make_manifest(), make_rows, [0, 1])
    with pytest.raises(DminError, match="8 of 30 rows"):
        append(store.path, half)
    assert not list(store.path.glob("growth-*"))


def test_of_two_that_grow_a_store_one_is_refused(store, make_manifest):
    one, two = Store(store.path), Store(store.path)
    begin_revision(one, {"name": "one"}, 3)
    with pytest.raises(DminError, match=r"Another process has just extended "):
        begin_revision(two, {"name": "two"}, 3)
    assert Store(store.path, growing=True).manifest.dataset == {"name": "one"}


def test_a_damaged_growth_file_is_refused(store, more):
    append(store.path, more)
    file = store.path / "growth-0001.json"
    text = file.read_text()
    for place in range(0, len(text), 7):
        changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        file.write_text(changed)
        try:
            found = Store(store.path)
        except DminError:
            continue
        assert json.loads(changed) == json.loads(text) and found.complete
    file.rename(store.path / "growth-0002.json")
    with pytest.raises(DminError, match=r"0001.json is missing, but growth-0002.json exists"):
        Store(store.path)


def test_removed_rows_are_in_no_answer(store, make_manifest, make_rows):
    whole, ids = store.features("square"), store.ids
    gone = ["bild-é-4", "bild-é-29", "bild-é-11"]
    assert remove(store, gone).name.startswith("removed-")
    assert len(store) == 30, "an open store stays as it is"
    left = Store(store.path)
    kept = [row for row, id in enumerate(ids) if id not in gone]
    assert len(left) == 27 and left.removed == 3 and left.complete
    assert left.ids == [ids[row] for row in kept] and left.positions.tolist() == kept
    assert np.array_equal(left.features("square"), whole[kept])
    assert [m["label"] for m in left.metadata] == [row % 3 for row in kept]
    assert np.array_equal(left.norms("loss"), store.norms("loss")[kept])
    assert left.fingerprint != store.fingerprint
    with pytest.raises(DminError, match="no example 'bild-é-4'"):
        left.index("bild-é-4")
    with pytest.raises(DminError, match="no example 'bild-é-4'"):
        remove(left, ["bild-é-4"])
    remove(left, ["bild-é-0"])
    assert len(Store(store.path)) == 26
    # The same command goes on: nothing is missing, so nothing comes back.
    with StoreWriter(store.path, make_manifest()) as writer:
        assert writer.pending() == []


def test_compacting_leaves_out_what_was_removed(store, more, tmp_path):
    grown = append(store.path, more)
    remove(grown, ["bild-é-1", "bild-é-33"])
    left = Store(store.path)
    found = compact(left, tmp_path / "c")
    assert found.digest() == left.digest() and found.metadata == left.metadata
    assert found.manifest.num_examples == 37 and not found.manifest.revisions and not found.removals
    assert b"bild-\\u00e9-33" not in b"".join(f.read_bytes() for f in found.path.glob("*.h5"))
    assert convert(left, tmp_path / "b", "bfloat16").ids == left.ids
    remove(found, found.ids)
    with pytest.raises(DminError, match=r"Every row of .* was removed"):
        compact(Store(found.path), tmp_path / "d")


def test_merging_keeps_removals_and_growth(store, more, tmp_path):
    remove(append(store.path, more), ["bild-é-31"])
    found = merge([store.path], tmp_path / "m")
    assert found.digest() == Store(store.path).digest() and found.removed == 1


def test_a_damaged_removal_shows_nothing(store):
    file = remove(store, ["bild-é-4"])
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DminError, match=r"removed-.* is damaged .*remove the examples again"):
            Store(store.path)
    file.write_bytes(content)
    assert Store(store.path).removed == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("form", ["numpy", "safetensors", "parquet"])
def test_what_is_exported_is_imported(tmp_path, make_manifest, make_rows, dtype, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "s", make_manifest(dtype=dtype), make_rows)
    target = tmp_path / ("e.safetensors" if form == "safetensors" else "e.parquet")
    exported = export(source, tmp_path / "e" if form == "numpy" else target, form)
    found = import_store(exported, tmp_path / "t")
    assert found.manifest == source.manifest and found.metadata == source.metadata
    assert found.ids == source.ids
    for readout in source.layout.readouts:
        one, other = source.features(readout), found.features(readout)
        np.testing.assert_allclose(one, other, atol=0 if dtype != "int8" else 1e-6)
        assert np.array_equal(source.norms(readout), found.norms(readout))


def foreign(folder, form, rows):
    if form == "npy":
        np.save(folder / "x.npy", rows)
        return folder / "x.npy"
    if form == "safetensors":
        numpy = pytest.importorskip("safetensors.numpy")
        numpy.save_file({"sketches": rows}, folder / "x.safetensors")
        return folder / "x.safetensors"
    arrow = pytest.importorskip("pyarrow")
    columns = {"id": [f"p{i}" for i in range(len(rows))], "x": rows.reshape(len(rows), -1).tolist()}
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize("steps", [None, 3])
def test_sketches_from_elsewhere(tmp_path, form, steps):
    if form == "parquet" and steps:
        pytest.skip("lists are flat")
    shape = (11, 16) if steps is None else (11, steps, 16)
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 100
    rows[3] = 0
    found = import_store(foreign(tmp_path, form, rows), tmp_path / "t", "trak", dtype="float32")
    assert found.layout.row_shape == (1, steps or 1, 1, 16)
    back = found.features("loss") * found.norms("loss")[..., None]
    np.testing.assert_allclose(back.reshape(shape), rows, rtol=1e-5)
    assert found.ids == [f"p{i}" if form == "parquet" else f"{i}" for i in range(11)]
    assert found.manifest.features["sketch"]["family"] == "trak"


def test_what_cannot_be_imported(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    (tmp_path / "x.csv").write_text("1,2")
    (tmp_path / "x.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0{")
    for source, options, message in (
        ("x.npy", {}, "need sketch="),
        ("x.npy", {"sketch": "a", "ids": ["1"]}, "1 ids for 2 rows"),
        ("flat.npy", {"sketch": "a"}, r"one array \[n, k\]"),
        ("x.csv", {}, "ends in .npy"),
        ("nowhere.npy", {}, "cannot be imported"),
        ("x.safetensors", {}, "cannot be imported"),
    ):
        with pytest.raises(DminError, match=message):
            import_store(tmp_path / source, tmp_path / "t", **options)
    assert not os.path.exists(tmp_path / "t")
