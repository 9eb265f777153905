"""What is kept of an opening: it saves reading, and never hides that something changed."""

import json
import pickle
import random

import numpy as np
import pytest
from fuzz import FUZZ, note

from dmin.runtime.array_files import read_arrays, write_arrays
from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Store, StoreWriter, catalog as catalog_module
from dmin.store.catalog import NAME
from dmin.store.encoding import word_sums


@pytest.fixture(params=["float32", "float16", "bfloat16", "int8"])
def manifest(request, make_manifest):
    return make_manifest(dtype=request.param)


@pytest.fixture
def path(tmp_path, manifest, make_rows):
    with StoreWriter(tmp_path / "s", manifest, segment_bytes=1) as writer:
        for block in writer.pending():
            writer.append(block, make_rows(manifest, block))
    return tmp_path / "s"


@pytest.fixture
def settled(monkeypatch):
    """Files need not be old to be known again."""
    monkeypatch.setattr(catalog_module, "SETTLED_NS", -1)


@pytest.fixture
def read(monkeypatch):
    """The segments that are read whole."""
    names, original = [], catalog_module._read
    monkeypatch.setattr(
        catalog_module,
        "_read",
        lambda path, *rest: names.append(path.name) or original(path, *rest),
    )
    return names


def test_a_second_opening_reads_no_segment(path, read, settled):
    first = Store(path)
    assert len(read) == 8
    read.clear()
    second = Store(path)
    assert not read and second.digest() == first.digest() and second.ids == first.ids
    assert second.metadata == first.metadata and second.fingerprint == first.fingerprint
    for kind in ("norms", "lengths", "sums", "scales"):
        one, other = (getattr(store, kind)("square") for store in (first, second))
        assert np.array_equal(one, other)


def test_files_that_have_just_changed_are_read_again(path, read):
    Store(path)
    Store(path)
    assert len(read) == 16


def test_only_new_segments_are_read(path, read, settled, manifest, make_rows):
    whole = Store(path).digest()
    lost = sorted(path.glob("*.h5"))[3]
    lost.unlink()
    read.clear()
    assert Store(path).missing_blocks == [3] and not read
    with StoreWriter(path, manifest) as writer:
        writer.append(3, make_rows(manifest, 3))
    assert Store(path).digest() == whole and read == [lost.name]


def test_a_changed_segment_is_read_again(path, settled):
    Store(path)
    segment = sorted(path.glob("*.h5"))[3]
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    with pytest.raises(DminError, match=f"damaged segments: {segment.name}"):
        Store(path)


def test_a_damaged_catalog_is_made_again_with_a_remark(path, settled):
    store = Store(path)
    whole, content = store.digest(), (path / NAME).read_bytes()
    generator = random.Random(0)
    lengths = [0, 10, len(content) // 2, len(content) - 1]
    for number in range(40 * FUZZ + len(lengths)):
        damaged = bytearray(content)
        if number < len(lengths):
            damaged = damaged[: lengths[number]]
        else:
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (path / NAME).write_bytes(damaged)
        with pytest.warns(DminWarning, match=r"catalog\.kept is damaged .*it is rebuilt"):
            found = Store(path)
        assert found.digest() == whole and found.metadata == store.metadata
        assert np.array_equal(found.lengths("loss"), store.lengths("loss"))
        assert (path / NAME).stat().st_size == len(content)
        note("bits and lengths: catalog.kept, anywhere", "made again")


@pytest.mark.parametrize(
    "change",
    [
        lambda about, arrays: arrays.update({"sums/loss": arrays["sums/loss"][:-1]}),
        lambda about, arrays: arrays.update({"losses": arrays["losses"].astype(np.float64)}),
        lambda about, arrays: arrays.update({"blocks": arrays["blocks"][::-1] + 1}),
        lambda about, arrays: arrays.update({"rows": arrays["rows"][::-1].copy()}),
        lambda about, arrays: arrays.update({"ends": arrays["ends"] + 1}),
        lambda about, arrays: arrays.update({"ids": arrays["ids"][:-20]}),
        lambda about, arrays: arrays.pop("norms/loss"),
        lambda about, arrays: arrays.pop("stats"),
        lambda about, arrays: about.pop("names"),
    ],
)
def test_the_arrays_of_a_catalog_are_held_to_the_store(path, settled, change):
    store = Store(path)
    about, arrays = read_arrays(path / NAME)
    change(about, arrays)
    write_arrays(path / NAME, about, arrays)
    with pytest.warns(DminWarning, match="its arrays are not those of this store"):
        assert Store(path).digest() == store.digest()


def test_a_catalog_that_cannot_be_kept_changes_nothing(path, monkeypatch):
    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(catalog_module.os, "rename", refused)
    assert Store(path).digest() == Store(path).digest()
    assert not (path / NAME).exists() and not list(path.glob("*.tmp"))


def test_a_bit_that_flips_after_opening_is_found_when_it_is_read(path):
    store = Store(path)
    generator = random.Random(1)
    for _ in range(20 * FUZZ):
        row = generator.randrange(30)
        segment = store.mapped.files[store.mapped.segment[row]]
        content = segment.read_bytes()
        stored = store.mapped.gather("square", np.array([row])).tobytes()
        damaged = bytearray(content)
        damaged[content.index(stored) + generator.randrange(len(stored))] ^= (
            1 << generator.randrange(8)
        )
        store.mapped._maps.clear()
        segment.write_bytes(damaged)
        message = rf"Row {row} \('square' of example 'bild-é-{row}'\) of .*{segment.name} differs"
        with pytest.raises(DminError, match=message) as caught:
            store.features("square")
        assert "dmin store verify" in str(caught.value)
        note("bits of rows after they were read once", "refused")
        store.mapped._maps.clear()
        segment.write_bytes(content)
    assert store.features("square").shape[0] == 30


def test_sums_find_every_flipped_bit():
    values = np.random.default_rng(0).integers(0, 2**16, (1, 5, 3)).astype("<u2")
    before = word_sums(values)
    for place in range(15):
        for bit in range(16):
            damaged = values.copy()
            damaged.ravel()[place] ^= 1 << bit
            assert word_sums(damaged) != before


def test_a_store_takes_its_catalog_along(path, settled):
    Store(path)
    copy = pickle.dumps(Store(path))
    (path / NAME).unlink()
    assert pickle.loads(copy).ids == Store(path).ids


def test_metadata_is_read_when_asked_for(path, monkeypatch):
    store = Store(path)
    parsed, original = [], json.loads
    monkeypatch.setattr(
        "dmin.store.reader.json.loads", lambda text: parsed.append(text) or original(text)
    )
    assert store.metadata[7]["label"] == 1 and len(parsed) == 1
    assert [entry["label"] for entry in store.metadata[3:6]] == [0, 1, 2] and len(parsed) == 4
