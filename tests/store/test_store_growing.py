"""While a store grows, and after a grower died, readers have what it was when complete."""

import time

import numpy as np
import pytest

from dmin.runtime.errors import DminError
from dmin.store import Store, StoreWriter, export as export_module
from dmin.store.maintenance import compact, info
from dmin.store.removal import remove
from dmin.store.revisions import append, begin_revision


def write(path, manifest, make_rows, first=0):
    with StoreWriter(path, manifest, segment_bytes=1) as writer:
        for block in writer.pending():
            rows = make_rows(manifest, block)
            rows.ids = [f"{first}-{id}" for id in rows.ids]
            writer.append(block, rows)
    return Store(path)


@pytest.fixture
def store(tmp_path, make_manifest, make_rows):
    return write(tmp_path / "s", make_manifest(), make_rows)


@pytest.fixture
def more(tmp_path, make_manifest, make_rows):
    manifest = make_manifest(num_examples=13, dataset={"name": "more"})
    return write(tmp_path / "more", manifest, make_rows, first=1)


@pytest.fixture
def dead(store, more, monkeypatch):
    """A grower that died after its second block."""
    original, calls = StoreWriter.append, []

    def dies(self, block, rows):
        calls.append(block)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(self, block, rows)

    monkeypatch.setattr(StoreWriter, "append", dies)
    with pytest.raises(OSError, match="No space"):
        append(store.path, more)
    monkeypatch.setattr(StoreWriter, "append", original)
    return store


def test_a_store_whose_grower_died_is_what_it_was(dead, more, tmp_path):
    found = Store(dead.path)
    assert found.complete and len(found) == 30 and found.digest() == dead.digest()
    assert found.fingerprint == dead.fingerprint and found.manifest == dead.manifest
    assert found.metadata == dead.metadata and info(found)["growing"] == 13
    assert compact(found, tmp_path / "c").digest() == dead.digest()
    half = Store(dead.path, growing=True)
    assert not half.complete and len(half) == 38
    with pytest.raises(DminError, match="38 of 43 rows"):
        begin_revision(half, {"name": "other"}, 3)
    whole = append(dead.path, more)
    assert len(whole) == 43 and Store(dead.path).digest() == whole.digest()


def test_what_is_removed_meanwhile_stays_so_and_what_comes_is_not_taken_for_removed(dead, more):
    remove(Store(dead.path), ["0-bild-é-4"])
    left = Store(dead.path)
    assert len(left) == 29 and left.removed == 1
    assert left.removed_among(["0-bild-é-4", "1-bild-é-0"]) == ["0-bild-é-4"]
    assert set(left.collected_metadata()) == set(dead.ids)
    assert len(append(dead.path, more)) == 42


def test_what_was_appended_is_not_appended_again(store, more):
    whole = append(store.path, more)
    files = sorted(store.path.iterdir())
    assert append(store.path, more).digest() == whole.digest()
    assert sorted(store.path.iterdir()) == files
    remove(whole, [more.ids[0]])
    with pytest.raises(DminError, match="12 of the examples"):
        append(store.path, more)


def test_every_answer_while_a_store_grows_is_of_a_complete_state(store, more, fork):
    states = [store.digest()]

    def grow():
        with pytest.MonkeyPatch.context() as patch:
            original = StoreWriter.append
            patch.setattr(StoreWriter, "append", lambda *args: time.sleep(0.1) or original(*args))
            append(store.path, more)

    process = fork.Process(target=grow)
    process.start()
    seen = []
    while process.is_alive():
        found = Store(store.path)
        found.require_complete()
        seen.append((len(found), found.digest()))
    process.join()
    assert process.exitcode == 0
    states.append(Store(store.path).digest())
    assert {digest for _, digest in seen} <= set(states) and len(seen) > 1
    assert {size for size, _ in seen} <= {30, 43}
    assert np.array_equal(store.features("loss"), Store(store.path).features("loss", 0, 30))


@pytest.mark.parametrize("form", ["numpy", "safetensors"])
def test_an_export_is_there_whole_or_not_at_all(store, tmp_path, monkeypatch, form):
    def full(file, parts, dtype):
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "_write", full)
        with pytest.raises(DminError, match=r"Could not export to .*disk is full"):
            export_module.export(store, tmp_path / "e", form)
    assert set(tmp_path.iterdir()) == before, "what was begun does not keep the disk full"
    write_part = export_module._write

    def second(file, parts, dtype):
        """Another process exports to the same path meanwhile."""
        monkeypatch.setattr(export_module, "_write", write_part)
        export_module.export(store, tmp_path / "e", form)
        write_part(file, parts, dtype)

    monkeypatch.setattr(export_module, "_write", second)
    if form == "numpy":
        with pytest.raises(DminError, match="Could not export to"):
            export_module.export(store, tmp_path / "e", form)
    else:
        export_module.export(store, tmp_path / "e", form)
    again = export_module.export(store, tmp_path / "f", form)
    for file in again.iterdir() if again.is_dir() else [again]:
        other = tmp_path / "e" / file.name if again.is_dir() else tmp_path / "e"
        assert other.read_bytes() == file.read_bytes()
