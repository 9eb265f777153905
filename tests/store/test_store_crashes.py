"""Killed writers, damaged files, racing writers: what is sealed is right, or refused."""

import contextlib
import os
import random
import signal
import time

import numpy as np
import pytest
from fuzz import FUZZ, note

from dmin.runtime import files as files_module
from dmin.runtime.errors import DminError
from dmin.store import Store, StoreWriter, writer as writer_module

KILLS = 40 * FUZZ


def write(path, manifest, make_rows, blocks=None, report=None, **options):
    """Write what is pending of some blocks, reporting through a pipe what is sealed."""
    with StoreWriter(path, manifest, **options) as writer:
        for block in writer.pending():
            if blocks is None or block in blocks:
                writer.append(block, make_rows(manifest, block))
                if report is not None and block not in writer._collected:
                    os.write(report, bytes([block]))


def require_right(store, make_rows):
    """Compare every row present with what was meant."""
    present = sorted(set(range(store.manifest.num_blocks)) - set(store.missing_blocks))
    parts = [make_rows(store.manifest, block) for block in present]
    assert store.ids == [id for part in parts for id in part.ids]
    assert store.metadata == [entry for part in parts for entry in part.metadata]
    for readout in store.layout.readouts if parts else ():
        features = np.concatenate([part.features[readout] for part in parts])
        assert np.array_equal(store.features(readout), features)
        norms = np.concatenate([part.norms[readout] for part in parts])
        assert np.array_equal(store.norms(readout), norms)
        assert np.array_equal(store.losses(), np.concatenate([part.losses for part in parts]))


def test_killed_writers_lose_nothing_sealed(tmp_path, make_manifest, make_rows, fork):
    manifest = make_manifest(num_examples=80, dim=256)
    all_rows = {block: make_rows(manifest, block) for block in range(manifest.num_blocks)}

    def ready_rows(manifest, block):  # so that a writer spends its time writing
        return all_rows[block]

    started = time.monotonic()
    write(tmp_path / "whole", manifest, ready_rows, segment_bytes=1)
    seconds = time.monotonic() - started
    digest = Store(tmp_path / "whole").digest()
    generator = random.Random(0)
    kills, stores, partial = 0, 0, 0
    while kills < KILLS:
        stores += 1
        path = tmp_path / f"store-{stores}"
        sealed: set[int] = set()
        while len(sealed) < manifest.num_blocks and kills < KILLS:
            read, report = os.pipe()
            options = {"report": report, "segment_bytes": generator.choice([1, 10**6])}
            child = fork.Process(
                target=write, args=(path, manifest, ready_rows), kwargs=options, daemon=True
            )
            child.start()
            os.close(report)
            time.sleep(generator.uniform(0, seconds / 2))
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            with os.fdopen(read, "rb") as pipe:
                sealed |= set(pipe.read())
            if not (path / "manifest.json").exists():
                continue
            store = Store(path)
            missing = set(store.missing_blocks)
            assert not missing & sealed, "a sealed block is lost"
            sealed = set(range(manifest.num_blocks)) - missing
            partial += bool(sealed) and bool(missing)
            require_right(store, ready_rows)
        write(path, manifest, ready_rows)
        assert Store(path).digest() == digest
    print(f"{kills} kills, {stores} stores, {partial} found begun")
    note("writers killed by SIGKILL", "right", kills)
    assert partial >= 5, "the kills came too early or too late to show anything"


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_killed_within_a_commit(tmp_path, make_manifest, make_rows, fork, monkeypatch, moment):
    manifest = make_manifest()
    write(tmp_path, manifest, make_rows, blocks=[0, 1])

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(file, mode):
        if mode == "rb":
            return open(file, mode)
        with open(file, mode) as opened:
            opened.write(bytes(1000))
        die()

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(files_module, "open", half_written, raising=False)
        else:
            patch.setattr(os, moment, die)
        child = fork.Process(target=write, args=(tmp_path, manifest, make_rows, None))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    store = Store(tmp_path)
    assert len(store) == 8
    require_right(store, make_rows)
    write(tmp_path, manifest, make_rows)
    Store(tmp_path).require_complete()


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ValueError])
def test_leaving_by_an_exception_seals(tmp_path, make_manifest, make_rows, reason):
    with pytest.raises(reason), StoreWriter(tmp_path, make_manifest()) as writer:
        writer.append(3, make_rows(writer.manifest, 3))
        raise reason
    assert Store(tmp_path).ids == make_rows(make_manifest(), 3).ids


def test_the_first_error_is_the_one_reported(tmp_path, make_manifest, make_rows, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ValueError, match="first") as caught,
        StoreWriter(tmp_path, make_manifest()) as writer,
    ):
        writer.append(3, make_rows(writer.manifest, 3))
        monkeypatch.setattr(os, "fsync", full)
        raise ValueError("first")
    assert "4 rows (blocks 3) are not sealed" in caught.value.__notes__[0]


def test_interrupted_sealing_leaves_all_rows(tmp_path, make_manifest, make_rows, monkeypatch):
    original = os.fsync

    def interrupted(file):
        monkeypatch.setattr(os, "fsync", original)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, make_manifest()) as writer:
        writer.append(3, make_rows(writer.manifest, 3))
        monkeypatch.setattr(os, "fsync", interrupted)
        writer.seal()
    assert len(Store(tmp_path)) == 4 and not list(tmp_path.glob("*.tmp"))


def test_leftovers_are_not_read_and_removed_after_a_day(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    write(tmp_path, manifest, make_rows, blocks=[0])
    segment = next(tmp_path.glob("*.h5"))
    old, new = tmp_path / f"{segment.name}.1-a.tmp", tmp_path / f"{segment.name}.2-b.tmp"
    for leftover in (old, new):
        leftover.write_bytes(segment.read_bytes()[:100])
    os.utime(old, (time.time() - 90_000,) * 2)
    assert len(Store(tmp_path)) == 4
    write(tmp_path, manifest, make_rows)
    assert not old.exists() and new.exists()


@pytest.fixture
def sealed(tmp_path, make_manifest, make_rows):
    """A store of three segments; the second holds blocks 2, 3 and 6."""
    for blocks in ([0, 1], [2, 3, 6], [4, 5, 7]):
        write(tmp_path / "s", make_manifest(), make_rows, blocks)
    return tmp_path / "s"


def test_every_flipped_bit_is_found(sealed):
    segment = sorted(sealed.glob("*.h5"))[1]
    content = segment.read_bytes()
    generator = random.Random(0)
    places = [generator.randrange(len(content)) for _ in range(30 * FUZZ)]
    places += [generator.randrange(3000) for _ in range(30 * FUZZ)]  # mostly HDF5's own
    for place in [0, len(content) - 1, *places]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        segment.write_bytes(damaged)
        with pytest.raises(DminError, match=f"damaged segments: {segment.name} .the digest"):
            Store(sealed)
        note("bits anywhere in a segment", "refused")
    segment.write_bytes(content)
    Store(sealed).require_complete()


def test_truncated_segments_are_named_with_their_rows(sealed, make_manifest, make_rows):
    digest = Store(sealed).digest()
    segment = sorted(sealed.glob("*.h5"))[1]
    content = segment.read_bytes()
    for length in (0, 1, 100, 2048, len(content) // 2, len(content) - 1):
        segment.write_bytes(content[:length])
        message = (
            rf"{segment.name} .*begin at 8; no sound segment has the rows 8-15, 24-27 of 30\."
            r" Delete each of these files and run the same `dmin collect` command again"
        )
        for opening in (lambda: Store(sealed), lambda: StoreWriter(sealed, make_manifest())):
            with pytest.raises(DminError, match=message) as caught:
                opening()
            assert "\n" not in str(caught.value)
    with pytest.raises(DminError, match=rf"{segment.name} .HDF5 cannot read it"):
        segment.write_bytes(content[: len(content) // 2])
        Store(sealed, verify=False)
    segment.unlink()  # the remedy
    assert Store(sealed).missing_blocks == [2, 3, 6]
    write(sealed, make_manifest(), make_rows)
    assert Store(sealed).digest() == digest


def test_all_damaged_segments_are_named(sealed):
    segments = sorted(sealed.glob("*.h5"))
    for segment in segments[:2]:
        segment.write_bytes(b"x" + segment.read_bytes()[1:])
    with pytest.raises(DminError, match=rf"{segments[0].name}.*{segments[1].name}") as caught:
        Store(sealed)
    assert segments[2].name not in str(caught.value)


def test_unverified_opening_reads_no_content(sealed):
    segment = sorted(sealed.glob("*.h5"))[1]
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1  # of a value
    segment.write_bytes(content)
    assert len(Store(sealed, verify=False)) == 30


def test_segment_lost_while_reading(sealed):
    store = Store(sealed)
    next(sealed.glob("segment-00000002*")).unlink()
    with pytest.raises(DminError, match=r"Could not read .*segment-00000002"):
        store.features("loss")


def test_segments_of_another_store_are_refused(sealed, tmp_path, make_manifest, make_rows):
    write(tmp_path / "t", make_manifest(dataset={"name": "other"}), make_rows, [0])
    stranger = next((tmp_path / "t").glob("*.h5"))
    stranger.rename(sealed / stranger.name)
    with pytest.raises(DminError, match=rf"{stranger.name} was written for a store with manifest"):
        Store(sealed)


def test_edited_manifest_is_refused(sealed):
    manifest = sealed / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"block_size": 4', '"block_size": 2'))
    with pytest.raises(DminError, match=r"if manifest.json was edited, restore it"):
        Store(sealed)


def test_processes_share_the_work(tmp_path, make_manifest, make_rows, fork):
    manifest = make_manifest()
    write(tmp_path / "alone", manifest, make_rows)
    for attempt in range(10):  # both create the store: whichever comes first
        path = tmp_path / f"shared-{attempt}" / "s"
        gate = fork.Barrier(3)

        def work(rank, path=path, gate=gate):
            gate.wait()
            blocks = range(rank, manifest.num_blocks, 3)
            write(path, manifest, make_rows, blocks, segment_bytes=9000)

        workers = [fork.Process(target=work, args=(rank,)) for rank in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        store = Store(path)
        assert store.complete and store.duplicate_blocks == 0
        assert store.digest() == Store(tmp_path / "alone").digest()
        assert not list(path.glob("*.tmp"))


def test_of_two_creators_with_other_settings_one_is_refused(tmp_path, make_manifest, fork):
    for attempt in range(10):
        path = tmp_path / f"{attempt}"
        gate = fork.Barrier(2)

        def work(dim, path=path, gate=gate):
            gate.wait()
            with contextlib.suppress(DminError):
                StoreWriter(path, make_manifest(dim=dim))
                os._exit(7)

        workers = [fork.Process(target=work, args=(dim,)) for dim in (8, 16)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sorted(worker.exitcode for worker in workers) == [0, 7]
        assert Store(path).layout.dim == (8 if workers[0].exitcode == 7 else 16)


def test_the_first_of_two_manifests_stays(tmp_path, make_manifest, monkeypatch):
    original = writer_module.commit

    def overtaken(path, content, **options):
        monkeypatch.setattr(writer_module, "commit", original)
        StoreWriter(tmp_path, make_manifest(dim=16))
        return original(path, content, **options)

    monkeypatch.setattr(writer_module, "commit", overtaken)
    with pytest.raises(DminError, match=r"layout.dim: 8 here, 16 there"):
        StoreWriter(tmp_path, make_manifest(dim=8))
    assert Store(tmp_path).layout.dim == 16 and os.listdir(tmp_path) == ["manifest.json"]


def test_a_file_system_without_links(tmp_path, make_manifest, make_rows, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write(tmp_path, make_manifest(), make_rows)
    Store(tmp_path).require_complete()


def test_raced_blocks_count_once(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    with StoreWriter(tmp_path, manifest) as one, StoreWriter(tmp_path, manifest) as two:
        for writer, blocks in ((one, [0, 1, 5]), (two, [1, 2])):
            for block in blocks:
                rows = make_rows(manifest, block)
                if writer is two:
                    rows.losses += 1
                writer.append(block, rows)
    store = Store(tmp_path)
    assert store.duplicate_blocks == 1 and len(store) == 16
    assert store.ids == [id for b in (0, 1, 2, 5) for id in make_rows(manifest, b).ids]
    for start, block, added in ((0, 0, 0), (4, 1, 0), (8, 2, 1), (12, 5, 0)):
        want = make_rows(manifest, block).losses + np.float32(added)
        assert np.array_equal(store.losses()[start : start + 4], want)
