"""Damaged files of every kind: right, made again or refused in a paragraph; never anything else.

`make fuzz` flips every bit of heads and manifests; `make test` takes a sample of them. Whatever is
tried is tried in a process of its own, which a library may crash and an alarm ends if it hangs.
"""

import json
import shutil
import signal
import warnings
from collections import Counter

import numpy as np
import pytest
from fuzz import FUZZ, note

from dmin.runtime.errors import DminError
from dmin.store import Store, StoreWriter
from dmin.store.export import export
from dmin.store.interchange import import_store
from dmin.store.removal import carry_removals, remove
from dmin.store.revisions import append, renew_metadata

SAMPLE, SECONDS = 20, 20
HEAD = 2048  # bytes, in which HDF5 says where everything lies


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def store(place, make_manifest, make_rows):
    """A store that grew, whose metadata were renewed, of which something was removed, twice."""
    if (place / "s").is_dir():
        return Store(place / "s")
    small = {"draws": 1, "timesteps": (5.0, 9.0), "num_examples": 6, "block_size": 3, "dim": 4}
    for name, first in (("gone", 20), ("s", 0), ("more", 10)):
        manifest = make_manifest(**small, dtype="int8", dataset={"name": name})
        with StoreWriter(place / name, manifest, segment_bytes=1) as writer:
            for block in writer.pending():
                rows = make_rows(manifest, block)
                rows.ids = [f"{first}-{id}" for id in rows.ids]
                writer.append(block, rows)
    gone = Store(place / "gone")
    remove(gone, gone.ids[:2])
    carry_removals(Store(gone.path), place / "s")
    found = append(place / "s", place / "more")
    renew_metadata(found, [{"label": row} for row in range(len(found))])
    remove(found, found.ids[4:6])
    return Store(found.path)


def state(found):
    return (
        found.digest(),
        found.ids,
        list(found.metadata),
        found.fingerprint,
        sorted(found.forgotten),
    )


def outcome(work, expected):
    """Return what comes of a damage: right, refused, or what must not be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "right" if work() == expected else "WRONG"
    except DminError as error:
        return "refused" if len(str(error)) > 30 and "\n" not in str(error) else f"BARE {error}"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {error}"


def tried(fork, cases, attempt):
    """Return the outcomes of all cases, from processes that may die of them."""
    found = {}
    while len(found) < len(cases):
        begun = len(found)
        ours, theirs = fork.Pipe(duplex=False)

        def work(begun=begun, theirs=theirs):
            for case in cases[begun:]:
                signal.alarm(SECONDS)
                theirs.send(attempt(case))

        process = fork.Process(target=work)
        process.start()
        theirs.close()
        while True:
            try:
                found[cases[len(found)]] = ours.recv()
            except (EOFError, IndexError):
                break
        process.join()
        if process.exitcode:
            found[cases[len(found)]] = f"CRASHED {process.exitcode}"
    return found


def bits(size, count=SAMPLE):
    """Return every bit of so many bytes, or a seeded sample."""
    generator = np.random.default_rng(size)
    chosen = generator.choice(8 * size, min(count, 8 * size), replace=False)
    return range(8 * size) if FUZZ > 1 else sorted(chosen.tolist())


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def only(name, found, allowed):
    for outcome, count in Counter(found.values()).items():
        note(name, outcome.lower(), count)
    wrong = {case: what for case, what in found.items() if what not in allowed}
    assert not wrong, f"{len(wrong)} of {len(found)}: {dict(list(wrong.items())[:5])}"


KINDS = ["manifest.json", "growth-*", "removed-*", "forgotten-*", "metadata.jsonl", "catalog.kept"]


@pytest.mark.parametrize("kind", [*KINDS, "segment-*"])
def test_bits_and_lengths_of_every_kind_of_file(store, fork, kind):
    file = sorted(store.path.glob(kind))[0]
    content, expected = file.read_bytes(), state(store)
    changes = [flipped(content, bit) for bit in bits(min(len(content), HEAD))]
    generator = np.random.default_rng(7)
    changes += [flipped(content, b) for b in generator.integers(0, 8 * len(content), 8 * FUZZ**2)]
    changes += [content[:length] for length in (0, 1, len(content) // 2, len(content) - 1)]
    changes += [content + b"\0", b"\0" * len(content), b"[" * 100_000, b"null", b"[]", b"{}"]

    def attempt(number):
        file.write_bytes(changes[number])
        return outcome(lambda: state(Store(store.path)), expected)

    try:
        found = tried(fork, list(range(len(changes))), attempt)
    finally:
        file.write_bytes(content)
    allowed = {"right", "refused"} if kind in ("catalog.kept", *KINDS[:2]) else {"refused"}
    only(f"bits and lengths: {kind}", found, allowed)
    assert kind != "catalog.kept" or set(found.values()) == {"right"}


def leaves(node, path=()):
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            yield from leaves(child, (*path, key))
    yield path


@pytest.mark.parametrize("kind", ["manifest.json", "growth-*"])
def test_values_of_other_types(store, fork, kind):
    file = sorted(store.path.glob(kind))[0]
    content, expected = file.read_bytes(), state(store)
    values = [None, -1, 0, 1e9, 10**30, "x", "", [], {}, [[1]], True, float("nan")]
    cases = [
        (place, n) for place in leaves(json.loads(content)) if place for n in range(len(values))
    ]
    cases = cases if FUZZ > 1 else cases[:: max(1, len(cases) // (2 * SAMPLE))]

    def attempt(case):
        document = json.loads(content)
        *way, last = case[0]
        node = document
        for key in way:
            node = node[key]
        node[last] = values[case[1]]
        file.write_text(json.dumps(document))
        return outcome(lambda: state(Store(store.path)), expected)

    try:
        found = tried(fork, cases, attempt)
        only(f"values of other types: {kind}", found, {"right", "refused"})
    finally:
        file.write_bytes(content)


def test_segments_that_are_damaged_after_they_were_opened(store, fork):
    expected = state(store)
    file = store.segments[0].path
    content = file.read_bytes()
    generator = np.random.default_rng(3)
    payload = generator.integers(0, 8 * len(content), 2000 if FUZZ > 1 else SAMPLE).tolist()
    cases = sorted({*bits(min(HEAD, len(content))), *payload})

    def attempt(bit):
        file.write_bytes(flipped(content, bit))
        store.mapped._maps.clear()
        return outcome(lambda: state(store), expected)

    try:
        found = tried(fork, cases, attempt)
        only("bits of a segment that is open", found, {"right", "refused"})
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("form", ["safetensors", "parquet", "numpy"])
def test_files_to_import(store, fork, tmp_path, form):
    pytest.importorskip("pyarrow")
    source = export(store, tmp_path / ("e" if form == "numpy" else f"e.{form}"), form)
    file = source / "features-loss.npy" if form == "numpy" else source
    content = file.read_bytes()

    def imported():
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        return import_store(source, tmp_path / "t").digest()

    expected = imported()
    changes = [flipped(content, bit) for bit in bits(min(len(content), 600))]
    changes += [flipped(content, bit) for bit in range(70, 74)]  # a NumPy head that is cut short
    changes += [content[:length] for length in (0, 1, 9, len(content) // 2, len(content) - 1)]
    changes += [b"\x80\x04cposix\nsystem\n(S'false'\ntR.", b"\0" * 100, b"PK\x03\x04" + content]

    def attempt(number):
        file.write_bytes(changes[number])
        return outcome(imported, expected)

    found = tried(fork, list(range(len(changes))), attempt)
    # What has no digest says what it says.
    found = {n: "changed" if it == "WRONG" else it for n, it in found.items()}
    only(f"imports: {form}", found, {"right", "refused", "changed"})
