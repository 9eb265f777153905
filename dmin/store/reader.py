"""Reading a store, without loading it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.store.catalog import Catalog
from dmin.store.encoding import STORED_AS, decode, word_sums
from dmin.store.manifest import Layout, require_count
from dmin.store.mapped import Mapped
from dmin.store.segments import Segment, read_manifest, removed_rows


class Block(NamedTuple):
    """Consecutive rows of a store, from row ``start`` on; features and norms are float32."""

    start: int
    features: np.ndarray
    norms: np.ndarray


class Store:
    """Read a store; rows are the examples present, in the order of the dataset.

    Segments are mapped into memory when their features are read: these must not be truncated
    meanwhile. A store may have thousands of them, and may be pickled.

    Args:
        path: the directory.
        verify: compare the digest of every segment that is new or changed with its name, and every
            row with the sum noted then whenever it is read, see :mod:`dmin.store.catalog`. Leave
            it on but for a second opening in the same run.

    Raises:
        DminError: there is no store, or a file of it is damaged or from another store.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        """Read the manifest and find out where every row is."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._catalog = catalog = Catalog.of(self.path, self.manifest, verify)
        blocks = np.concatenate([np.empty(0, np.int64), *catalog.blocks])
        starts, counts = self.manifest.spans(blocks)
        held = _ranges(starts, counts)
        # Two writers may have raced for a block: backwards, so that the first by name wins.
        place = np.full(self.manifest.num_examples, -1)
        place[held[::-1]] = np.arange(len(held))[::-1]
        self.duplicate_blocks = len(blocks) - len(np.unique(blocks))
        self.missing_blocks = np.setdiff1d(np.arange(self.manifest.num_blocks), blocks).tolist()
        self.removals, removed = removed_rows(self.path, self.manifest)
        place[removed] = -1
        self.removed = len(removed)
        self.positions = np.flatnonzero(place >= 0)  # of the rows, in the dataset
        self._place = place[self.positions]  # of the rows, in the catalog
        rows = catalog["rows"]
        begins = np.cumsum(rows) - rows
        self._segment = np.repeat(np.arange(len(rows)), rows)[self._place]
        self._offset = self._place - begins[self._segment]
        apart = (np.diff(self._segment) != 0) | (np.diff(self._offset) != 1)
        self._runs = np.flatnonzero(apart) + 1  # rows that do not lie right behind the one before
        self._mapped: dict[tuple[int, str], Mapped] = {}
        self._small: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: they belong to this process."""
        return {**self.__dict__, "_mapped": {}}

    @property
    def segments(self) -> list[Segment]:
        """The sealed files, by name."""
        catalog = self._catalog
        pairs = zip(catalog.names, catalog.blocks, strict=True)
        return [Segment(self.path / name, blocks) for name, blocks in pairs]

    def __len__(self) -> int:
        """Return the number of rows present."""
        return len(self.positions)

    @property
    def layout(self) -> Layout:
        """The axes of the features."""
        return self.manifest.layout

    @property
    def fingerprint(self) -> str:
        """Equal for stores of the same segments: what was derived from the rows is not stale."""
        fields = {"manifest": self.manifest.fingerprint, "segments": self._catalog.names}
        return fingerprint({**fields, "removed": self.removals} if self.removals else fields)

    @property
    def complete(self) -> bool:
        """Whether every example of the dataset has its row, or had it until it was removed."""
        return not self.missing_blocks

    def require_complete(self) -> None:
        """Raise DminError unless every example of the dataset has its row."""
        if not self.complete:
            raise DminError(
                f"The store {self.path} holds {len(self)} of {self.manifest.num_examples} rows"
                f" ({len(self.missing_blocks)} of {self.manifest.num_blocks} blocks are missing):"
                " run the same `dmin collect` command again, it resumes where it stopped."
            )

    @cached_property
    def ids(self) -> list[str]:
        """The example ids, one a row."""
        lines = self._catalog.lines("ids")
        all_ids: list[str] = json.loads(b"[" + b",".join(lines) + b"]")
        ids = [all_ids[place] for place in self._place.tolist()]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise DminError(
                f"The store {self.path} has more than one row of id {twice!r}: give every example"
                " of the dataset its own id, and collect into a new directory."
            )
        return ids

    def held_ids(self, before: int | None = None) -> set[str]:
        """Return the ids of all examples that are there, those removed included.

        Args:
            before: only of those at positions below this one.
        """
        lines = self._catalog.lines("ids")
        all_ids: list[str] = json.loads(b"[" + b",".join(lines) + b"]")
        if before is None:
            return set(all_ids)
        starts, counts = self.manifest.spans(
            np.concatenate([[], *self._catalog.blocks]).astype(int)
        )
        early = _ranges(starts, counts) < before
        return {all_ids[place] for place in np.flatnonzero(early)}

    @cached_property
    def metadata(self) -> "Metadata":
        """The metadata (label, caption, file ...), one mapping a row."""
        return Metadata(self._catalog.lines("metadata"), self._place)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.ids)}

    def index(self, id: str) -> int:
        """Return the row of an example id, or raise DminError."""
        if id not in self._row_of:
            raise DminError(
                f"The store {self.path} has no example {id!r} among its {len(self)} rows; ids look"
                f" like {', '.join(map(repr, self.ids[:3])) or 'nothing yet'}."
            )
        return self._row_of[id]

    def features(self, readout: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the features of rows ``start:stop``, float32 ``[n, draw, T, group, dim]``."""
        return self.rows(readout, range(len(self))[start:stop])

    def rows(self, readout: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the features of chosen rows.

        Args:
            readout: one of ``layout.readouts``.
            indices: rows in any order, duplicates allowed, ``[n]``.

        Returns:
            float32 ``[n, draw, T, group, dim]``, in the order of ``indices``.

        Raises:
            DminError: there is no such readout or row.
        """
        wanted = self._wanted(readout, indices)
        scales = self.scales(readout)
        chosen = None if scales is None else scales[wanted]
        return decode(self.gather(readout, wanted), self.layout.dtype, chosen)

    def stored(self, readout: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the features of rows ``start:stop`` as they are stored and where they lie.

        As many that follow are asked of the disk meanwhile. Whoever multiplies them holds them
        against ``sums`` on the way, see :meth:`check`.

        Yields:
            Arrays ``[n, draw, T, group, dim]`` of ``STORED_AS[layout.dtype]``, in order.
        """
        after = min(2 * stop - start, len(self))
        if self._on_disk(readout, np.arange(stop, after)):
            for first, last in self._together(stop, after):
                offsets = self._offset[first], self._offset[last - 1] + 1
                self._map(readout, first).prefetch(*offsets)
        for first, last in self._together(start, stop):
            offset = self._offset[first]
            yield self._map(readout, first).array[offset : offset + last - first]

    def gather(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return chosen rows as they are stored, ``[n, draw, T, group, dim]``.

        All are asked of the disk at once, and then held against their sums.

        Raises:
            DminError: a row is not what was sealed.
        """
        dtype = STORED_AS[self.layout.dtype]
        result = np.empty((len(indices), *self.layout.row_shape), dtype=dtype)
        segments = self._segment[indices]
        for segment in np.unique(segments).tolist():
            mine = np.flatnonzero(segments == segment)
            mine = mine[np.argsort(self._offset[indices[mine]])]
            offsets, mapped = self._offset[indices[mine]], self._map_segment(readout, segment)
            mapped.prefetch_rows(offsets)
            result[_as_slice(mine)] = mapped.array[_as_slice(offsets)]
        self.check(readout, indices, result)
        return result

    def addresses(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return where chosen rows lie in memory, uint64 ``[n]``; while the store is there.

        All are asked of the disk at once. Whoever reads them holds them against ``sums``.
        """
        segments = self._segment[indices]
        chosen, which = np.unique(segments, return_inverse=True)
        maps = [self._map_segment(readout, int(segment)) for segment in chosen]
        begins = np.array([each.array.ctypes.data for each in maps], dtype=np.uint64)
        rows = self._offset[indices].astype(np.uint64) * np.uint64(self.layout.row_bytes)
        for number, each in enumerate(maps if self._on_disk(readout, indices) else ()):
            each.prefetch_rows(np.sort(self._offset[indices[which == number]]))
        return begins[which] + rows

    def sums(self, readout: str) -> np.ndarray | None:
        """Return the sums of the words of the rows, or None if nothing was verified."""
        return self._whole("sums", readout) if f"sums/{readout}" in self._catalog else None

    def check(self, readout: str, indices: np.ndarray, stored: np.ndarray) -> None:
        """Hold rows that were read against what was sealed.

        Raises:
            DminError: names the file, the row and what to do.
        """
        sums = self.sums(readout)
        if sums is not None and (wrong := word_sums(stored) != sums[indices]).any():
            raise self.corrupt(readout, int(np.asarray(indices)[np.argmax(wrong)]))

    def corrupt(self, readout: str, row: int) -> DminError:
        """Return the error that says that a row is not what was sealed."""
        file = self.path / self._catalog.names[self._segment[row]]
        return DminError(
            f"Row {row} ({readout!r} of example {self.ids[row]!r}) of {file} is not what was sealed"
            f" and verified: a bit has flipped on the disk or in memory. No score was computed from"
            f" it. Run `dmin store verify {self.path}`: if it names the file, delete that and run"
            f" the same `dmin collect` command again; if it does not, test this machine's memory."
        )

    def scales(self, readout: str) -> np.ndarray | None:
        """Return what int8 features are to be multiplied by, float32 ``[n, draw, T]``."""
        return self._whole("scales", readout) if self.layout.dtype == "int8" else None

    def lengths(self, readout: str) -> np.ndarray:
        """Return ‖row‖₂ over group and dim of the features read back, float32 ``[n, draw, T]``."""
        return self._whole("lengths", readout)

    def inverse_lengths(self, readout: str) -> np.ndarray:
        """Return ``1 / lengths``, of rows of zeros a large number, float32 ``[n, draw, T]``."""
        name = f"inverse lengths/{readout}"
        if name not in self._small:
            self._small[name] = 1 / np.maximum(self.lengths(readout), np.float32(1e-12))
        return self._small[name]

    def norms(self, readout: str) -> np.ndarray:
        """Return the norms the gradients had before scaling, float32 ``[n, draw, T, group]``."""
        return self._whole("norms", readout)

    def losses(self) -> np.ndarray:
        """Return the losses, float32 ``[n, draw, T]``."""
        return self._whole("losses", None)

    def blocks(self, readout: str, rows: int = 1024) -> Iterator[Block]:
        """Yield the whole store, ``rows`` rows at a time, reading only what is yielded."""
        require_count("rows", rows)
        for start in range(0, len(self), rows):
            chosen = range(start, min(start + rows, len(self)))
            norms = self.norms(readout)[start : start + rows]
            yield Block(start, self.rows(readout, chosen), norms)

    def digest(self) -> str:
        """Return 16 hexadecimal digits of ids, features, norms and losses in dataset order.

        It does not depend on how rows are cut into blocks and segments, so that stores made with
        different process counts can be compared.
        """
        digest = hashlib.sha256(json.dumps([self.ids, self.layout.readouts]).encode())
        for readout in self.layout.readouts:
            for block in self.blocks(readout):
                digest.update(block.features.data)
            digest.update(self.norms(readout).data)
        digest.update(self.losses().data)
        return digest.hexdigest()[:16]

    def _whole(self, kind: str, readout: str | None) -> np.ndarray:
        """Return a small array of all rows; it stays in memory."""
        name = kind if readout is None else f"{kind}/{readout}"
        if name not in self._small:
            if readout is not None:
                self._require(readout)
            whole, n = self._catalog[name], len(self._place)
            in_order = n == len(whole) and bool((self._place == np.arange(n)).all())
            self._small[name] = whole if in_order else whole[self._place]
        return self._small[name]

    def _require(self, readout: str) -> None:
        if readout not in self.layout.readouts:
            known = ", ".join(self.layout.readouts)
            raise DminError(f"The store {self.path} has no readout {readout!r}: it has {known}.")

    def _wanted(self, readout: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        self._require(readout)
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise DminError(f"The store {self.path} has no row {outside}: it has {len(self)}.")
        return wanted

    def _together(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the spans of rows within ``start:stop`` that lie together in one segment."""
        inside = slice(*np.searchsorted(self._runs, [start, stop], side="right").tolist())
        cuts = [start, *(cut for cut in self._runs[inside].tolist() if cut < stop), stop]
        return ((first, last) for first, last in pairwise(cuts) if first < last)

    def _on_disk(self, readout: str, rows: np.ndarray) -> bool:
        """Return whether some of the rows are not in memory, as far as eight of them tell.

        To ask for what is there already takes a tenth of the time that reading it does.
        """
        some = rows[:: max(1, len(rows) // 8)].tolist()
        return not all(self._map(readout, row).in_memory(self._offset[row]) for row in some)

    def _map(self, readout: str, row: int) -> Mapped:
        return self._map_segment(readout, int(self._segment[row]))

    def _map_segment(self, readout: str, segment: int) -> Mapped:
        if (segment, readout) not in self._mapped:
            path = self.path / self._catalog.names[segment]
            # Threads that race for it must end up with one: another would be unmapped again, and
            # its addresses lead nowhere.
            return self._mapped.setdefault((segment, readout), Mapped(path, f"features/{readout}"))
        return self._mapped[segment, readout]


class Metadata(Sequence[dict[str, Any]]):
    """The metadata of the rows, read from JSON when asked for."""

    def __init__(self, lines: list[bytes], place: np.ndarray) -> None:
        self._lines = lines
        self._place = place

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._place)

    @overload
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, row: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, row: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the metadata of a row, or of several."""
        if isinstance(row, slice):
            return [json.loads(self._lines[place]) for place in self._place[row].tolist()]
        found: dict[str, Any] = json.loads(self._lines[self._place[row]])
        return found

    def __eq__(self, other: object) -> bool:
        """Compare with another sequence of mappings."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:  # as every sequence that may be compared with a list
        raise TypeError("metadata cannot be hashed")


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return ``start … start + count − 1`` of all pairs, one after the other."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Return consecutive indices as a slice, which copies several times quicker."""
    consecutive = (np.diff(indices) == 1).all()
    return slice(indices[0], indices[-1] + 1) if consecutive else indices


def check_comparable(query_store: Store, train_store: Store) -> None:
    """Raise DminError unless rows of the two stores may be multiplied with each other."""
    query, train = query_store.manifest, train_store.manifest
    lines = differences(query.comparable(), train.comparable())
    if lines:
        raise DminError(
            f"The query store {query_store.path} and the training store {train_store.path} cannot"
            f" be compared: {'; '.join(lines)}, where here"
            " is the query store and there is the training store. Collect both with the same model"
            " weights, loss, noise, schedule and sketch."
        )
