"""The catalog of a store: what every reader needs beside the features, checked once.

Opening a store of a thousand segments must neither open a thousand files nor read all their bytes.
So the first opening compares the digest of every segment with its name, and keeps what it read
on the way in ``catalog.npz``: where rows lie, ids, metadata, norms, losses, lengths, and the sum of
the words of every row. Later openings only look whether the files are still the same (size, inode,
times of change), and every row is held against its sum whenever it is read. So a bit that flips
after the first opening is found before it is scored, and one outside the features is not looked at.

A catalog is made anew where it is missing, damaged or of other files; it may be deleted.
"""

import contextlib
import json
import os
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import h5py
import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import os_failure, replacing
from dmin.store.encoding import decode, word_sums
from dmin.store.manifest import Layout, Manifest
from dmin.store.mapped import Mapped
from dmin.store.segments import damaged, require_own, segment_names, wrong_bytes

NAME, SCHEMA = "catalog.npz", 1
# A file that changed this shortly before it was looked at may change again within one tick of the
# file system's clock, unseen: it is read again.
SETTLED_NS = 2 * 10**9
# What numpy and zipfile raise when a file is not what it was; contents have check sums.
UNREADABLE = OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile, struct.error
CHUNK = 8 << 20  # bytes of features looked at at a time


class Entry(NamedTuple):
    """One segment: the file it was, and what it holds of every array."""

    stat: np.ndarray  # int64 [5]: size, inode, times of change and modification, of being looked at
    blocks: np.ndarray  # int64
    arrays: dict[str, np.ndarray]  # one entry a row
    texts: dict[str, bytes]  # a line of JSON a row


class Catalog:
    """What is known of the sealed segments of a store, segment after segment by name.

    Args:
        arrays: by name; others are loaded from the source when first asked for.
        source: the file.
    """

    def __init__(self, arrays: dict[str, np.ndarray], source: Path) -> None:
        self._arrays = arrays
        self.source = source
        self.kinds: list[str] = json.loads(str(self["about"]))["arrays"]
        self.names = [str(name) for name in self["names"]]
        self.stats, ends = self["stats"], self["ends"]
        self.blocks = np.split(self["blocks"], ends[:-1]) if len(ends) else []

    def __getstate__(self) -> dict[str, Any]:
        """Take everything along: the file may not be there where this is unpickled."""
        return {**self.__dict__, "_arrays": {name: self[name] for name in self.kinds}}

    def __contains__(self, name: str) -> bool:
        """Return whether there is such an array."""
        return name in self.kinds

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array of all rows held, segment after segment."""
        if name not in self._arrays:
            try:
                with np.load(self.source) as file:
                    # Names are digests: a catalog of the same names holds the same.
                    if "names" in self._arrays and file["names"].tolist() != self.names:
                        raise ValueError("it is now one of other segments")
                    self._arrays[name] = file[name]
            except UNREADABLE as error:
                raise DminError(
                    f"{self.source} is damaged or was made anew meanwhile ({error}): delete it, it"
                    " is made again from the segments."
                ) from error
        return self._arrays[name]

    def lines(self, name: str) -> list[bytes]:
        """Return a line of JSON for every row held."""
        return self[name].tobytes().split(b"\n") if len(self[name]) else []

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield what is known of each segment."""
        rows = self["rows"]
        cuts = np.cumsum(rows)[:-1]
        kinds = [n for n in self.kinds if "/" in n or n == "losses"]
        parts = {name: np.split(self[name], cuts) for name in kinds}
        texts = {name: self.lines(name) for name in ("ids", "metadata")}
        start = 0
        for number, name in enumerate(self.names):
            stop = start + int(rows[number])
            lines = {kind: b"\n".join(each[start:stop]) for kind, each in texts.items()}
            arrays = {kind: part[number] for kind, part in parts.items()}
            yield name, Entry(self.stats[number], self.blocks[number], arrays, lines)
            start = stop

    @classmethod
    def of(
        cls, path: Path, manifest: Manifest, verify: bool = True, afresh: bool = False
    ) -> "Catalog":
        """Return the catalog of a store, kept or made anew as far as segments are new.

        Args:
            path: the store.
            manifest: the store's.
            verify: compare the digests of segments that are not in the catalog with their names;
                without, what is read is not held against anything later either.
            afresh: read all segments again.

        Raises:
            DminError: segments are damaged (all are named), or were written for another manifest.
        """
        try:
            names = segment_names(path)
            kept = None if afresh else cls._kept(path, manifest)
            stats = [_stat(path / name) for name in names]
        except OSError as error:
            raise os_failure("read", Path(error.filename or path), error) from error
        if kept is not None and kept.names == names and _same(kept.stats, stats).all():
            return kept
        known: dict[str, Entry] = {}
        if kept is not None:
            now = dict(zip(names, stats, strict=True))
            for name, entry in kept.entries():
                if name in now and _same(entry.stat[None], [now[name]]).all():
                    known[name] = entry
        entries = _read_all(path, manifest, names, known, verify)
        arrays = _joined(entries, manifest)
        if verify and names:
            _save(path / NAME, arrays)
        return cls(arrays, path / NAME)

    @classmethod
    def _kept(cls, path: Path, manifest: Manifest) -> "Catalog | None":
        """Return the catalog kept with a store, if there is a sound one of its manifest."""
        try:
            with np.load(path / NAME) as file:
                about = json.loads(str(file["about"]))
                whole = sorted(file) == about["arrays"]  # a missing one must not go unnoticed
            if whole and about["schema"] == SCHEMA and about["manifest"] in manifest.fingerprints:
                return cls({}, path / NAME)
        except (*UNREADABLE, DminError):
            pass  # it is only kept to save time
        return None


def _stat(path: Path) -> np.ndarray:
    found = os.stat(path)
    times = found.st_ctime_ns, found.st_mtime_ns, time.time_ns()
    return np.array([found.st_size, found.st_ino, *times], dtype=np.int64)


def _same(before: np.ndarray, now: Sequence[np.ndarray]) -> np.ndarray:
    """Return which files are those that were looked at before, bool ``[n]``."""
    if not len(now):
        return np.ones(0, dtype=bool)
    equal = (before[:, :4] == np.stack(now)[:, :4]).all(1)
    return equal & (before[:, 4] - before[:, 2:4].max(1) > SETTLED_NS)


def _read_all(
    path: Path, manifest: Manifest, names: list[str], known: dict[str, Entry], verify: bool
) -> dict[str, Entry]:
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(
                lambda name: known.get(name) or _read(path / name, manifest, verify), names
            )
            entries = dict(zip(names, found, strict=True))
    except OSError as error:
        raise os_failure("read", Path(error.filename or path), error) from error
    sound = {name: each for name, each in entries.items() if isinstance(each, Entry)}
    if len(sound) < len(entries):
        damage = {name: each for name, each in entries.items() if isinstance(each, str)}
        raise damaged(path, manifest, damage, [each.blocks for each in sound.values()])
    return sound


def _read(path: Path, manifest: Manifest, verify: bool) -> Entry | str:
    """Return what a segment holds, or what is wrong with it."""
    stat = _stat(path)
    if wrong := wrong_bytes(path, verify):
        return wrong
    layout = manifest.layout
    scaled = ["scales"] if layout.dtype == "int8" else []
    try:
        with h5py.File(path, "r", locking=False) as file:
            written_for, blocks = file.attrs["manifest"], file["blocks"][:]
            arrays = {"losses": file["losses"][:]}
            for kind in ("norms", "lengths", *scaled):
                for readout in layout.readouts:
                    if f"{kind}/{readout}" in file:  # those of older versions lack lengths
                        arrays[f"{kind}/{readout}"] = file[f"{kind}/{readout}"][:]
            texts = {name: file[name][:].tobytes()[1:-1] for name in ("ids", "metadata")}
    except (OSError, KeyError, RuntimeError) as error:
        return f"HDF5 cannot read it: {error}"
    require_own(path, written_for, manifest)
    for readout in layout.readouts:
        _look_at(path, readout, arrays, layout.dtype, verify)
    # Lines of JSON hold no raw line breaks: these separate the rows.
    return Entry(stat, blocks, arrays, {k: v.replace(b",\n", b"\n") for k, v in texts.items()})


def _look_at(
    path: Path, readout: str, arrays: dict[str, np.ndarray], dtype: str, verify: bool
) -> None:
    """Add the sums of the words of each row; and the lengths, where a segment has none."""
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
            lengths.append(np.sqrt(np.square(wide).sum((3, 4))))
        arrays[f"lengths/{readout}"] = np.concatenate(lengths)


def _joined(entries: dict[str, Entry], manifest: Manifest) -> dict[str, np.ndarray]:
    each = list(entries.values())
    arrays = {
        "names": np.array(list(entries), dtype=str),
        "stats": np.array([one.stat for one in each], dtype=np.int64).reshape(-1, 5),
        "rows": np.array([len(one.arrays["losses"]) for one in each], dtype=np.int64),
        "ends": np.cumsum([len(one.blocks) for one in each], dtype=np.int64),
        "blocks": np.concatenate([np.empty(0, np.int64), *(one.blocks for one in each)]),
    }
    for name, empty in _empty(manifest.layout).items():
        if all(name in one.arrays for one in each):
            arrays[name] = np.concatenate([empty, *(one.arrays[name] for one in each)])
    for name in ("ids", "metadata"):
        joined = b"\n".join(one.texts[name] for one in each)
        arrays[name] = np.frombuffer(joined, dtype=np.uint8)
    about: dict[str, Any] = {"schema": SCHEMA, "manifest": manifest.fingerprint}
    about["arrays"] = sorted([*arrays, "about"])
    return {**arrays, "about": np.array(json.dumps(about))}


def _empty(layout: Layout) -> dict[str, np.ndarray]:
    """Return every array as it is without any row."""
    draws, steps, groups, _ = layout.row_shape
    found: dict[str, np.ndarray] = {"losses": np.empty((0, draws, steps), np.float32)}
    for readout in layout.readouts:
        found[f"norms/{readout}"] = np.empty((0, draws, steps, groups), np.float32)
        found[f"lengths/{readout}"] = found["losses"]
        found[f"sums/{readout}"] = np.empty(0, np.uint32)
        if layout.dtype == "int8":
            found[f"scales/{readout}"] = found["losses"]
    return found


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep a catalog where that is possible; where not, the next opening reads all again."""
    with contextlib.suppress(OSError), replacing(path, durable=False) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
