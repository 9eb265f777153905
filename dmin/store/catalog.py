"""The catalog of a store: all that readers need besides the features, verified once.

Opening a store of a thousand segments must neither open a thousand files nor read all their bytes.
So the first opening compares the digest of every segment with its name, and caches in
``catalog.kept`` the positions of rows, ids, metadata, norms, losses, lengths, and a checksum of
every row (the sum of its words). Later openings only check that the files are unchanged (size,
inode, times of change), and every row is compared with its checksum whenever it is read. So a bit
that flips after the first opening is found before a score is computed from it; one outside the
features is never read again.

A catalog is one file with a digest (:mod:`dmin.runtime.array_files`), rebuilt if it
is missing, damaged or out of date; it may be deleted.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmin.runtime.array_files import ArrayFile, read_arrays, warn_damaged, write_arrays
from dmin.runtime.files import os_failure
from dmin.store.encoding import STORED_AS, decode, word_sums
from dmin.store.manifest import Layout, Manifest
from dmin.store.mapped import Mapped
from dmin.store.segments import Damaged, dataset, opened_segment, read_segments, segment_names

NAME, SCHEMA = "catalog.kept", 2
TEXTS = "ids", "metadata"
# A file that changed less than this before it was examined is read again: another change within one
# tick of the file system's clock would not show in its times.
SETTLED_NS = 2 * 10**9
CHUNK = 8 << 20  # bytes of features processed at a time


class Entry(NamedTuple):
    """One segment: how its file is identified, and its part of every array."""

    stat: np.ndarray  # int64 [5]: size, inode; times of change, of modification, of examination
    blocks: np.ndarray  # int64
    arrays: dict[str, np.ndarray]  # one entry per row
    texts: dict[str, bytes]  # one line of JSON per row


class Catalog:
    """Everything but the features of the sealed segments of a store, in the order of their names.

    Args:
        names: of the segments.
        arrays: by name, the rows of all segments one after the other.
    """

    def __init__(self, names: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.names = names
        self._arrays = arrays
        ends = arrays["ends"]
        self.stats: np.ndarray = arrays["stats"]
        self.blocks: list[np.ndarray] = np.split(arrays["blocks"], ends[:-1]) if len(ends) else []

    def __contains__(self, name: str) -> bool:
        """Return whether there is such an array."""
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array of all rows, segment after segment."""
        return self._arrays[name]

    def lines(self, name: str) -> list[bytes]:
        """Return one line of JSON for every row, segment after segment."""
        return self[name].tobytes().split(b"\n") if len(self[name]) else []

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield the name and the entry of each segment."""
        rows = self["rows"]
        cuts = np.cumsum(rows)[:-1]
        kinds = [n for n in self._arrays if "/" in n or n == "losses"]
        parts = {name: np.split(self[name], cuts) for name in kinds}
        texts = {name: self.lines(name) for name in TEXTS}
        start = 0
        for number, name in enumerate(self.names):
            stop = start + int(rows[number])
            lines = {kind: b"\n".join(each[start:stop]) for kind, each in texts.items()}
            arrays = {kind: part[number] for kind, part in parts.items()}
            yield name, Entry(self.stats[number], self.blocks[number], arrays, lines)
            start = stop

    @classmethod
    def of(
        cls,
        path: Path,
        manifest: Manifest,
        verify: bool = True,
        afresh: bool = False,
        names: list[str] | None = None,
    ) -> "Catalog":
        """Return the catalog of a store, from its cache; new segments are read and added.

        Args:
            path: the store.
            manifest: the store's.
            verify: compare the digests of segments that are not in the catalog with their names;
                if False, rows read later are not compared with checksums either.
            afresh: read all segments again.
            names: of the segments; None: all in the directory.

        Raises:
            DminError: segments are damaged (all are named), or were written for another manifest.
        """
        try:
            names = segment_names(path) if names is None else names
            before = None if afresh else cls._kept(path, manifest)
            stats = [_stat(path / name) for name in names]
        except OSError as error:
            raise os_failure("read", Path(error.filename or path), error) from error
        if before is not None and before.names == names and _same(before.stats, stats).all():
            return before
        known: dict[str, Entry] = {}
        if before is not None:
            now = dict(zip(names, stats, strict=True))
            for name, entry in before.entries():
                if name in now and _same(entry.stat[None], [now[name]]).all():
                    known[name] = entry
        entries = read_segments(
            path, manifest, names, known, lambda file: _read(file, manifest, verify)
        )
        arrays = _joined(entries, manifest)
        if verify and names:  # if it cannot be written, the next opening reads all again
            about = {"schema": SCHEMA, "manifest": manifest.fingerprint, "names": names}
            with contextlib.suppress(OSError):
                write_arrays(path / NAME, about, arrays)
        return cls(names, arrays)

    @classmethod
    def _kept(cls, path: Path, manifest: Manifest) -> "Catalog | None":
        """Return the cached catalog of a store, or None if it is missing, damaged or another's."""
        found = read_arrays(path / NAME)
        if found is None or found.about.get("schema") != SCHEMA:
            return None
        if found.about.get("manifest") not in manifest.fingerprints:
            return None
        if not _fits(found, manifest):
            warn_damaged(path / NAME, "its arrays are not those of this store")
            return None
        return cls(found.about["names"], found.arrays)


def _fits(found: ArrayFile, manifest: Manifest) -> bool:
    """Return whether every array of a catalog has the rows and shape that its blocks require."""
    arrays = found.arrays
    try:
        blocks, rows, ends = (arrays[name] for name in ("blocks", "rows", "ends"))
        count, held = len(found.about["names"]), int(rows.sum())
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (each.dtype, (held, *each.shape[1:]))
            for name, each in _empty(manifest.layout).items()
        }
        expected |= {name: (np.int64, (count,)) for name in ("rows", "ends")}
        expected |= {"stats": (np.int64, (count, 5)), "blocks": (np.int64, (int(ends[-1]),))}
        expected |= {name: (np.uint8, arrays[name].shape) for name in TEXTS}
        parts = np.split(manifest.spans(blocks)[1], ends[:-1])
        return (
            found.has(expected)
            and [int(part.sum()) for part in parts] == rows.tolist()
            and all(_line_count(arrays[name].tobytes()) == held for name in TEXTS)
        )
    except (KeyError, IndexError, TypeError, ValueError):
        return False


def _line_count(text: bytes) -> int:
    return text.count(b"\n") + 1 if text else 0


def _stat(path: Path) -> np.ndarray:
    found = os.stat(path)
    times = found.st_ctime_ns, found.st_mtime_ns, time.time_ns()
    return np.array([found.st_size, found.st_ino, *times], dtype=np.int64)


def _same(before: np.ndarray, now: Sequence[np.ndarray]) -> np.ndarray:
    """Return which files are unchanged since they were examined, bool ``[n]``."""
    if not len(now):
        return np.ones(0, dtype=bool)
    equal = (before[:, :4] == np.stack(now)[:, :4]).all(1)
    return equal & (before[:, 4] - before[:, 2:4].max(1) > SETTLED_NS)


def _read(path: Path, manifest: Manifest, verify: bool) -> Entry:
    """Read the catalog's entry of a segment."""
    stat, layout = _stat(path), manifest.layout
    with opened_segment(path, manifest, verify) as (file, blocks):
        held = int(manifest.spans(blocks)[1].sum())
        arrays = {}
        for name, empty in _empty(layout).items():
            # Segments of older versions lack lengths; no segment has sums.
            if name in file or not name.startswith(("lengths/", "sums/")):
                arrays[name] = dataset(file, name, empty.dtype, (held, *empty.shape[1:]))[:]
        kind, shape = STORED_AS[layout.dtype], (held, *layout.row_shape)
        for readout in layout.readouts:
            dataset(file, f"features/{readout}", kind, shape)
        texts = {name: dataset(file, name)[:].tobytes()[1:-1] for name in TEXTS}
    # A line of JSON has no raw line break, so line breaks separate the rows.
    texts = {name: text.replace(b",\n", b"\n") for name, text in texts.items()}
    if any(_line_count(text) != held for text in texts.values()):
        raise Damaged("it does not have one id and one line of metadata per row")
    for readout in layout.readouts:
        _look_at(path, readout, arrays, layout.dtype, verify)
    return Entry(stat, blocks, arrays, texts)


def _look_at(
    path: Path, readout: str, arrays: dict[str, np.ndarray], dtype: str, verify: bool
) -> None:
    """Add the checksums of the rows, and their lengths where a segment lacks them."""
    features = Mapped(path, f"features/{readout}").array
    step = max(1, CHUNK // max(1, features[:1].nbytes))
    parts = [slice(start, start + step) for start in range(0, len(features), step)]
    if verify:
        arrays[f"sums/{readout}"] = np.concatenate([word_sums(features[part]) for part in parts])
    if f"lengths/{readout}" not in arrays:
        scales = arrays.get(f"scales/{readout}")
        lengths = []
        for part in parts:
            wide = decode(features[part], dtype, None if scales is None else scales[part])
            lengths.append(np.sqrt(np.square(wide).sum((3, 4), dtype=np.float64)))
        arrays[f"lengths/{readout}"] = np.concatenate(lengths).astype(np.float32)


def _joined(entries: dict[str, Entry], manifest: Manifest) -> dict[str, np.ndarray]:
    each = list(entries.values())
    arrays = {
        "stats": np.array([one.stat for one in each], dtype=np.int64).reshape(-1, 5),
        "rows": np.array([len(one.arrays["losses"]) for one in each], dtype=np.int64),
        "ends": np.cumsum([len(one.blocks) for one in each], dtype=np.int64),
        "blocks": np.concatenate([np.empty(0, np.int64), *(one.blocks for one in each)]),
    }
    for name, empty in _empty(manifest.layout).items():
        if all(name in one.arrays for one in each):
            arrays[name] = np.concatenate([empty, *(one.arrays[name] for one in each)])
    for name in TEXTS:
        joined = b"\n".join(one.texts[name] for one in each)
        arrays[name] = np.frombuffer(joined, dtype=np.uint8)
    return arrays


def _empty(layout: Layout) -> dict[str, np.ndarray]:
    """Return every array with zero rows."""
    draws, steps, groups, _ = layout.row_shape
    found: dict[str, np.ndarray] = {"losses": np.empty((0, draws, steps), np.float32)}
    for readout in layout.readouts:
        found[f"norms/{readout}"] = np.empty((0, draws, steps, groups), np.float32)
        found[f"lengths/{readout}"] = found["losses"]
        found[f"sums/{readout}"] = np.empty(0, np.uint32)
        if layout.scale_shape is not None:
            found[f"scales/{readout}"] = np.empty((0, *layout.scale_shape), np.float32)
    return found
