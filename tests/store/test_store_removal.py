"""What was removed is nowhere once a store was compacted, and never comes back unasked."""

import json
import os

import numpy as np
import pytest

from dmin.cli import main
from dmin.runtime.errors import DminError
from dmin.store import Rows, Store, StoreWriter
from dmin.store.export import export
from dmin.store.maintenance import compact, convert, fold, merge
from dmin.store.removal import known_copies, remove
from dmin.store.revisions import append, renew_metadata

GONE = ("secret-face-7", "secret-face-11")


@pytest.fixture
def write(tmp_path, make_manifest, make_rows):
    """A function that writes a store; two of its examples have names to look for."""
    sketch = {"family": "block_cyclic", "dim": 8, "block": 4, "seed": 0, "folds": 4}

    def made(name, first=0, count=14, **changes):
        features = {"weights": "ab12", "sketch": sketch, "loss": {"process": "p"}}
        manifest = make_manifest(features=features, num_examples=count, **changes)
        whole = make_manifest(features=features, num_examples=99, block_size=1)
        with StoreWriter(tmp_path / name, manifest, segment_bytes=3000) as writer:
            for block in writer.pending():
                parts = [make_rows(whole, first + row) for row in manifest.block_rows(block)]
                numbers = [first + row for row in manifest.block_rows(block)]

                def both(kind, parts=parts):
                    names = getattr(parts[0], kind)
                    return {r: np.concatenate([getattr(p, kind)[r] for p in parts]) for r in names}

                rows = Rows(
                    [f"secret-face-{n}" for n in numbers],
                    [{"caption": f"portrait of {n}"} for n in numbers],
                    *(both("features"), both("norms")),
                    np.concatenate([part.losses for part in parts]),
                )
                writer.append(block, rows)
        return Store(tmp_path / name)

    return made


def traces(store, ids):
    """What must be found nowhere: ids, captions, and the bytes of rows as they are stored."""
    found = []
    for id in ids:
        row = store.index(id)
        stored = [store.gather(r, np.array([row])).tobytes() for r in store.layout.readouts]
        norms = store.norms("loss")[row].tobytes()
        caption = json.dumps(store.metadata[row]["caption"]).encode()
        found += [json.dumps(id).encode(), f"{id}\n".encode(), caption, norms, *stored]
    return found


def below(*folders):
    for folder in folders:
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file():
                yield path, path.read_bytes()


def holders(marks, *folders):
    return [path for path, content in below(*folders) if any(mark in content for mark in marks)]


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("made", ["compact", "fold", "convert", "twice", "merged"])
def test_nothing_is_left_of_it(made, grown, write, tmp_path):
    store = write("s")
    if grown:
        store = append(store.path, write("more", first=50, count=5))
    renew_metadata(store, [{"caption": f"new of {id}"} for id in store.ids])
    store = Store(store.path)
    marks = [*traces(store, GONE), b'portrait of 7"', b'new of secret-face-11"']
    assert holders(marks, store.path)
    remove(store, GONE)
    path = store.path if made != "merged" else merge([store.path], tmp_path / "m").path
    target = tmp_path / "t"
    if made == "fold":
        fold(Store(path), target, 4)
    elif made == "convert":
        convert(Store(path), target, "float16")
    else:
        compact(Store(path), target)
    if made == "twice":
        target = compact(convert(Store(target), tmp_path / "h", "int8"), tmp_path / "u").path
    found = Store(target)
    assert len(found) == len(store) - 2 and found.complete and found.metadata[:]
    assert found.removed_among([*GONE, "secret-face-1", "other"]) == list(GONE)
    assert holders(marks, target) == []


def test_indices_and_encodings_go_at_once(write, tmp_path):
    store = write("s")
    cache, key = tmp_path / "s.encodings", store.manifest.encodings_key
    elsewhere, other = tmp_path / "kept", "0" * 16
    for place in (cache / key, elsewhere / key, elsewhere / other):
        place.mkdir(parents=True)
        for block in range(4):
            (place / f"block-{block:08d}-00ff.safetensors").write_bytes(b"%d" % block)
    index = store.path / "index-loss-unit-256.npz"
    index.write_bytes(b"codes of all rows")
    remove(store, GONE, encodings=elsewhere)  # in blocks 1 and 2, of 4 examples each
    assert not index.exists()
    left = [b"0", b"3"]
    assert sorted(content for _, content in below(cache, elsewhere / key)) == sorted(2 * left)
    assert len(list(below(elsewhere / other))) == 4, "another store's"


def test_encodings_of_what_it_grew_by_go_too(write, tmp_path):
    store = append(write("s").path, write("more", first=50, count=5))
    kept = tmp_path / "s.more.encodings" / "k" / "block-00000000-00ff.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")
    remove(store, ["secret-face-3"])
    assert kept.exists()
    remove(Store(store.path), ["secret-face-52"])
    assert not kept.exists()


def test_appending_takes_nothing_back_unasked(write, tmp_path):
    store = write("s")
    remove(store, GONE)
    found = compact(Store(store.path), tmp_path / "c")
    again = write("again", first=7, count=1)
    for path in (store.path, found.path):
        with pytest.raises(
            DminError, match=r"were removed from .* 'secret-face-7': .* restore=true"
        ):
            append(path, again)
        assert len(Store(path)) == 12
    back = append(found.path, again, restore=True)
    assert back.complete and back.ids[-1] == "secret-face-7" and len(back) == 13
    back = append(store.path, again, restore=True)
    assert len(back) == 13 and back.removed_among(GONE) == ["secret-face-11"]
    assert np.array_equal(back.features("loss")[-1], store.features("loss")[7])
    # What was removed from one that is put behind another is not taken by that one either.
    more = write("more", first=50, count=5)
    remove(more, ["secret-face-52"])
    joined = append(write("first").path, Store(more.path))
    assert len(joined) == 18 and joined.removed_among(["secret-face-52"])
    with pytest.raises(DminError, match=r"'secret-face-52': .* restore=true"):
        append(joined.path, write("x", first=52, count=1))


def test_merging_brings_nothing_back(write, tmp_path):
    store = write("s")
    merged = merge([store.path], tmp_path / "m")
    remove(store, GONE)
    assert merge([store.path], merged.path).ids == Store(store.path).ids
    found = compact(merge([store.path], tmp_path / "n"), tmp_path / "c")
    assert merge([found.path], tmp_path / "o").removed_among(GONE) == list(GONE)


def test_a_stopped_compaction_is_not_collected_into(write, tmp_path, monkeypatch):
    store = write("s")
    remove(store, GONE)
    original, calls = StoreWriter.append, []

    def dies(self, block, rows):
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, block, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            compact(Store(store.path), tmp_path / "c")
    with pytest.raises(DminError, match="is the target of an unfinished grow or compact"):
        StoreWriter(tmp_path / "c", store.manifest)
    found = compact(Store(store.path), tmp_path / "c")
    assert found.digest() == Store(store.path).digest()
    # Whole, it is one of the dataset, also as that still is.
    assert StoreWriter(found.path, store.manifest).pending() == []


def test_a_damaged_list_of_removals_is_refused(write, tmp_path):
    store = write("s")
    remove(store, GONE)
    (file,) = compact(Store(store.path), tmp_path / "c").path.glob("forgotten-*.json")
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DminError, match=r"forgotten-.* is damaged"):
            Store(file.parent)


def test_what_it_says(write, tmp_path, capsys):
    store = write("s")
    convert(store, tmp_path / "half", "int8")
    compact(Store(tmp_path / "half"), tmp_path / "half2")
    assert main(["store", "export", str(store.path), str(tmp_path / "e"), "format=numpy"]) == 0
    export(store, tmp_path / "deleted", "numpy")
    os.rename(tmp_path / "deleted", tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["store", "remove", str(store.path), *GONE]) == 0
    said = capsys.readouterr().out
    assert "2 removed, 12 rows are left" in said
    assert f"run `dmin store compact {store.path} NEW`, then delete {store.path}" in said
    copies = [tmp_path / name for name in ("half", "e", "half2")]
    assert known_copies(store.path) == copies
    assert (
        f"exports of the store ({', '.join(map(str, copies))}; dmin cannot know of others)" in said
    )
    assert "rankings, pages" in said
