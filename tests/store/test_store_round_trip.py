"""What is written is what is read, however it was cut."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from dmin.runtime.errors import DminError
from dmin.store import (
    Rows,
    Store,
    StoreWriter,
    check_comparable,
    mapped as mapped_module,
    rows as rows_module,
    writer as writer_module,
)
from dmin.store.catalog import NAME as CATALOG


def write(path, manifest, make_rows, blocks=None, **options):
    with StoreWriter(path, manifest, **options) as writer:
        for block in writer.pending() if blocks is None else blocks:
            writer.append(block, make_rows(manifest, block))
    return Store(path)


def expected(manifest, make_rows, blocks=None):
    """The whole dataset as one block's rows."""
    parts = [make_rows(manifest, block) for block in blocks or range(manifest.num_blocks)]
    readouts = manifest.layout.readouts
    return Rows(
        ids=[id for part in parts for id in part.ids],
        metadata=[entry for part in parts for entry in part.metadata],
        features={r: np.concatenate([part.features[r] for part in parts]) for r in readouts},
        norms={r: np.concatenate([part.norms[r] for part in parts]) for r in readouts},
        losses=np.concatenate([part.losses for part in parts]),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("segment_bytes", [1, 5000, 2**30])
def test_round_trip(tmp_path, make_manifest, make_rows, dtype, segment_bytes):
    manifest = make_manifest(dtype=dtype)
    store = write(tmp_path / "a" / "s", manifest, make_rows, segment_bytes=segment_bytes)
    rows = expected(manifest, make_rows)
    assert store.complete and len(store) == manifest.num_examples
    assert store.manifest == manifest
    assert store.ids == rows.ids
    assert store.metadata == rows.metadata
    assert [store.index(id) for id in rows.ids] == list(range(30))
    assert np.array_equal(store.losses(), rows.losses)
    for readout in manifest.layout.readouts:
        assert np.array_equal(store.norms(readout), rows.norms[readout])
        features = store.features(readout)
        assert features.dtype == np.float32
        assert np.array_equal(features, rows.features[readout])
        assert np.array_equal(store.features(readout, 3, 17), rows.features[readout][3:17])


def test_float16_takes_half_the_room_and_rounds(tmp_path, make_manifest, make_rows):
    manifest = make_manifest(dtype="float16", dim=4096)
    rows = make_rows(manifest, 0)
    rows.features["loss"] += np.float32(1e-5)
    with StoreWriter(tmp_path / "s", manifest) as writer:
        writer.append(0, rows)
    store = Store(tmp_path / "s")
    rounded = rows.features["loss"].astype(np.float16).astype(np.float32)
    assert np.array_equal(store.features("loss"), rounded)
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.h5"))
    assert size < 2 * 2 * rows.features["loss"].size * 1.1


@pytest.mark.parametrize("rows", [1, 7, 1024])
@pytest.mark.parametrize("order", [[6, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_blocks_come_in_dataset_order(tmp_path, make_manifest, make_rows, rows, order):
    manifest = make_manifest()
    store = write(tmp_path / "s", manifest, make_rows, order, segment_bytes=15_000)
    want = expected(manifest, make_rows, sorted(order))
    start = 0
    for block in store.blocks("square", rows):
        chosen = slice(start, start + len(block.features))
        assert block.start == start and len(block.features) <= rows
        assert np.array_equal(block.features, want.features["square"][chosen])
        assert np.array_equal(block.norms, want.norms["square"][chosen])
        start = chosen.stop
    assert start == len(store) == len(want.ids)
    assert store.ids == want.ids


@pytest.mark.parametrize("segment_bytes", [1, 5000, 2**30])
def test_chosen_rows(tmp_path, make_manifest, make_rows, segment_bytes):
    manifest = make_manifest()
    store = write(tmp_path / "s", manifest, make_rows, segment_bytes=segment_bytes)
    want = expected(manifest, make_rows).features["loss"]
    generator = np.random.default_rng(0)
    choices = [[0, 0, 2], [29, 0, 29, 3, 4, 5], [], [5, 4, 3], np.arange(30)[::-1]]
    for indices in [*choices, *(generator.integers(0, 30, 50) for _ in range(20))]:
        assert np.array_equal(store.rows("loss", indices), want[np.asarray(indices, dtype=int)])


def test_only_what_is_needed_is_read(tmp_path, make_manifest, make_rows, monkeypatch):
    store = write(tmp_path / "s", make_manifest(), make_rows, segment_bytes=1)
    opened = []
    original = rows_module.Mapped
    monkeypatch.setattr(
        rows_module, "Mapped", lambda path, name: opened.append(path.name) or original(path, name)
    )
    store.features("loss", 5, 7)
    assert [name[:16] for name in opened] == ["segment-00000001"]
    next(store.blocks("loss", 8))
    assert {name[:16] for name in opened} == {"segment-00000000", "segment-00000001"}


def test_rows_that_are_wanted_are_asked_for_at_once(
    tmp_path, make_manifest, make_rows, monkeypatch
):
    store = write(tmp_path / "s", make_manifest(), make_rows)
    asked = []
    monkeypatch.setattr(
        rows_module.Mapped, "prefetch", lambda self, start, stop: asked.append((start, stop))
    )
    store.rows("loss", [29, 11, 3, 10])
    monkeypatch.setattr(mapped_module, "NEAR", 1)
    store.rows("loss", [29, 11, 3, 10])
    assert asked == [(3, 30), (3, 4), (10, 12), (29, 30)]


def test_a_store_may_have_more_segments_than_files_may_be_open(tmp_path, make_manifest, make_rows):
    resource = pytest.importorskip("resource")
    manifest = make_manifest(num_examples=120, block_size=1)
    with StoreWriter(tmp_path, manifest, segment_bytes=1) as writer:
        for block in range(120):
            writer.append(block, make_rows(manifest, block))
    store = Store(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, before[1]))
        assert store.features("loss").shape[0] == 120
        assert sum(len(part) for part in store.mapped.runs("loss", 0, 120)) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_in_memory_is_not_asked_of_the_disk(
    tmp_path, make_manifest, make_rows, monkeypatch
):
    manifest = make_manifest(num_examples=40, block_size=40)
    with StoreWriter(tmp_path, manifest) as writer:
        writer.append(0, make_rows(manifest, 0))
    store = Store(tmp_path)
    asked, original = [], rows_module.Mapped.prefetch
    monkeypatch.setattr(
        rows_module.Mapped, "prefetch", lambda self, start, stop: asked.append((start, stop))
    )
    there = False
    monkeypatch.setattr(rows_module.Mapped, "in_memory", lambda self, row: there)
    store.mapped.addresses("loss", np.arange(3, 9)), list(store.mapped.runs("loss", 0, 10))
    assert asked == [(3, 9), (10, 20)]
    monkeypatch.setattr(rows_module.Mapped, "prefetch", original)  # the disk is asked indeed
    store.mapped.addresses("loss", np.arange(3, 9)), list(store.mapped.runs("loss", 0, 10))
    monkeypatch.setattr(rows_module.Mapped, "prefetch", lambda *_: asked.append(_))
    there = True
    store.mapped.addresses("loss", np.arange(3, 9)), list(store.mapped.runs("loss", 0, 10))
    assert len(asked) == 2


def test_threads_that_race_for_a_segment_map_it_once(
    tmp_path, make_manifest, make_rows, monkeypatch
):
    store = write(tmp_path / "s", make_manifest(), make_rows)
    original, gate = rows_module.Mapped, threading.Barrier(4)

    def together(path, name):
        gate.wait(30)
        return original(path, name)

    monkeypatch.setattr(rows_module, "Mapped", together)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.mapped.addresses("loss", np.arange(30)), range(4)))
    assert all(np.array_equal(found[0], other) for other in found)
    assert found[0][0] == next(store.mapped.runs("loss", 0, 1)).ctypes.data


def test_what_is_not_there_is_named(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows, [0, 1])
    with pytest.raises(DminError, match="no readout 'los': it has loss, square"):
        store.features("los")
    for row in (8, -1):
        with pytest.raises(DminError, match=f"no row {row}: it has 8"):
            store.rows("loss", [0, row])
    with pytest.raises(DminError, match=r"no example 'bild'.*'bild-é-0', 'bild-é-1'"):
        store.index("bild")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_digest_does_not_depend_on_the_cutting(tmp_path, make_manifest, make_rows, dtype):
    digests = set()
    for number, (block_size, segment_bytes) in enumerate([(4, 1), (4, 2**30), (7, 9000), (30, 1)]):
        manifest = make_manifest(block_size=block_size, dtype=dtype)
        store = write(tmp_path / f"{number}", manifest, make_rows, segment_bytes=segment_bytes)
        digests.add(store.digest())
    backwards = write(tmp_path / "b", make_manifest(dtype=dtype), make_rows, range(7, -1, -1))
    assert digests == {backwards.digest()}


@pytest.mark.parametrize("what", ["ids", "features", "norms", "losses"])
def test_digest_depends_on_the_content(tmp_path, make_manifest, make_rows, what):
    manifest = make_manifest()
    reference = write(tmp_path / "s", manifest, make_rows)

    def changed(manifest, block):
        rows = make_rows(manifest, block)
        if block == 5:
            if what == "ids":
                rows.ids[1] += "x"
            elif what == "losses":
                rows.losses[2, 1, 1] += 0.5
            else:
                getattr(rows, what)["square"][3, 0, 2, 1] += 0.5
        return rows

    assert write(tmp_path / "t", manifest, changed).digest() != reference.digest()


def test_equal_content_gives_equal_files(tmp_path, make_manifest, make_rows):
    contents = []
    for directory, blocks in (("s", [2, 5]), ("t", [5, 2])):
        write(tmp_path / directory, make_manifest(), make_rows, blocks)
        files = sorted(set((tmp_path / directory).iterdir()) - {tmp_path / directory / CATALOG})
        contents.append({file.name: file.read_bytes() for file in files})
        time.sleep(1.1)  # HDF5 keeps times in seconds
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


def test_appended_arrays_are_copied(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    rows = make_rows(manifest, 0)
    with StoreWriter(tmp_path / "s", manifest) as writer:
        writer.append(0, rows)
        rows.features["loss"][:] = 0
        rows.metadata[0]["label"] = "changed"
        rows.ids[0] = "changed"
    store = Store(tmp_path / "s")
    assert np.array_equal(store.features("loss"), make_rows(manifest, 0).features["loss"])
    assert store.metadata[0]["label"] == 0 and store.ids[0] == "bild-é-0"


def test_sealing_by_size_and_by_time(tmp_path, make_manifest, make_rows, monkeypatch):
    manifest = make_manifest()
    now = [1000.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])

    def sealed():
        return len(list((tmp_path / "s").glob("*.h5")))

    writer = StoreWriter(tmp_path / "s", manifest, segment_bytes=12_000, seal_seconds=60)
    bytes_a_block = 4 * (2 * 3 * (2 * 2 * (8 + 1) + 1)) * 4
    assert 3 * bytes_a_block < 12_000 <= 4 * bytes_a_block
    counts = []
    for block, waited in enumerate([0, 1, 1, 1, 100, 59, 2]):
        now[0] += waited
        writer.append(block, make_rows(manifest, block))
        counts.append(sealed())
    # Four blocks are large enough; the next three, too old.
    assert counts == [0, 0, 0, 1, 1, 1, 2]
    writer.append(7, make_rows(manifest, 7))
    assert writer.pending() == [7] and sealed() == 2
    writer.close()
    assert writer.pending() == [] and sealed() == 3


def test_incomplete_store_says_how_much_is_there(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows, [0, 7])
    assert store.missing_blocks == [1, 2, 3, 4, 5, 6] and not store.complete
    assert store.positions.tolist() == [0, 1, 2, 3, 28, 29]
    with pytest.raises(DminError, match=r"6 of 30 rows \(6 of 8 blocks.*same `dmin collect`"):
        store.require_complete()
    write(tmp_path / "s", make_manifest(), make_rows).require_complete()


def test_store_without_rows(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows, [])
    assert len(store) == 0 and store.ids == [] and list(store.blocks("loss")) == []
    assert store.features("loss").shape == (0, 2, 3, 2, 8)
    assert store.digest() == store.digest()


def test_store_can_be_pickled_and_holds_no_file_open(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows)
    copy = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.features("loss"), store.features("loss"))
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0


def test_merging_is_copying_segments(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    whole = write(tmp_path / "whole", manifest, make_rows)
    write(tmp_path / "a", manifest, make_rows, [0, 3, 5])
    write(tmp_path / "b", manifest, make_rows, [1, 2, 4, 6, 7])
    for segment in (tmp_path / "b").glob("*.h5"):
        segment.rename(tmp_path / "a" / segment.name)
    assert Store(tmp_path / "a").digest() == whole.digest()


def test_comparable_stores(tmp_path, make_manifest, make_rows):
    train = write(tmp_path / "train", make_manifest(), make_rows)
    query = make_manifest(
        dataset={"name": "queries"}, num_examples=3, block_size=1, dtype="float16"
    )
    check_comparable(write(tmp_path / "query", query, make_rows), train)
    assert query.feature_fingerprint == train.manifest.feature_fingerprint
    assert query.dataset_fingerprint != train.manifest.dataset_fingerprint
    sketch = {"kind": "oporp", "dim": 16}
    for name, changes, message in (
        ("k", {"features": {"weights": "ab12", "sketch": sketch}}, "sketch.dim: 16 here, 8 there"),
        ("t", {"timesteps": (1.0, 2.0, 3.0)}, "layout.timesteps"),
    ):
        other = write(tmp_path / name, make_manifest(**changes), make_rows, [0])
        assert other.manifest.feature_fingerprint != train.manifest.feature_fingerprint
        with pytest.raises(DminError, match=f"cannot be compared.*{message}"):
            check_comparable(other, train)


def test_import_is_light():
    code = "import dmin.store, sys; assert not {'torch', 'lightning', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
