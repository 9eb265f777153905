"""The rows of a store, read on demand: features from mapped segments, metadata from JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from dmin.runtime.errors import DminError
from dmin.store.catalog import Catalog
from dmin.store.encoding import STORED_AS
from dmin.store.manifest import Layout, Manifest
from dmin.store.mapped import Mapped


class MappedRows:
    """The features of the rows as stored, in segments that are mapped when first needed.

    Args:
        files: the segments, ``[s]``.
        layout: axes of the features.
        counts: number of rows in each segment, ``[s]``.
        place: position of each row among the rows of all segments, ``[n]``.
    """

    def __init__(
        self, files: list[Path], layout: Layout, counts: np.ndarray, place: np.ndarray
    ) -> None:
        self.files = files
        self.layout = layout
        self.segment = segment = np.repeat(np.arange(len(files)), counts)[place]
        self.offset = offset = place - (np.cumsum(counts) - counts)[segment]
        apart = (np.diff(segment) != 0) | (np.diff(offset) != 1)
        self._cuts = np.flatnonzero(apart) + 1  # rows that do not directly follow the previous one
        self._maps: dict[tuple[int, str], Mapped] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the maps, which belong to this process."""
        return {**self.__dict__, "_maps": {}}

    def runs(self, readout: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the features of rows ``start:stop`` as stored, without a copy.

        The same number of rows after ``stop`` is prefetched. The caller must compare the rows
        with the store's ``sums``, as ``Store.gather`` does.

        Yields:
            Arrays ``[n, draw, T, group, dim]`` of ``STORED_AS[layout.dtype]``, in order.
        """
        after = min(2 * stop - start, len(self.segment))
        if self._on_disk(readout, np.arange(stop, after)):
            for first, last in self._together(stop, after):
                offsets = self.offset[first], self.offset[last - 1] + 1
                self._of(readout, self.segment[first]).prefetch(*offsets)
        for first, last in self._together(start, stop):
            offset = self.offset[first]
            array = self._of(readout, self.segment[first]).array
            yield array[offset : offset + last - first]

    def gather(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return a copy of chosen rows, ``[n, draw, T, group, dim]``.

        All are requested from the disk at once. ``Store.gather`` also compares their checksums.
        """
        result = np.empty((len(indices), *self.layout.row_shape), STORED_AS[self.layout.dtype])
        segments = self.segment[indices]
        for segment in np.unique(segments):
            mine = np.flatnonzero(segments == segment)
            mine = mine[np.argsort(self.offset[indices[mine]])]
            offsets, mapped = self.offset[indices[mine]], self._of(readout, segment)
            mapped.prefetch_rows(offsets)
            result[_as_slice(mine)] = mapped.array[_as_slice(offsets)]
        return result

    def addresses(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return the memory addresses of chosen rows, uint64 ``[n]``, valid while this object is.

        All are requested from the disk at once. The caller must compare the rows with the store's
        ``sums``.
        """
        chosen, which = np.unique(self.segment[indices], return_inverse=True)
        maps = [self._of(readout, segment) for segment in chosen]
        begins = np.array([each.array.ctypes.data for each in maps], dtype=np.uint64)
        rows = self.offset[indices].astype(np.uint64) * np.uint64(self.layout.row_bytes)
        for number, each in enumerate(maps if self._on_disk(readout, indices) else ()):
            each.prefetch_rows(np.sort(self.offset[indices[which == number]]))
        return begins[which] + rows

    def _together(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the spans of rows within ``start:stop`` that are contiguous in one segment."""
        inside = slice(*np.searchsorted(self._cuts, [start, stop], side="right").tolist())
        cuts = [start, *(cut for cut in self._cuts[inside].tolist() if cut < stop), stop]
        return ((first, last) for first, last in pairwise(cuts) if first < last)

    def _on_disk(self, readout: str, rows: np.ndarray) -> bool:
        """Return whether some of the rows are not in the page cache, judged by about eight.

        To prefetch rows that are cached already takes a tenth of the time of reading them.
        """
        some = rows[:: max(1, len(rows) // 8)].tolist()
        return not all(
            self._of(readout, self.segment[row]).in_memory(self.offset[row]) for row in some
        )

    def _of(self, readout: str, segment: int) -> Mapped:
        key = int(segment), readout
        if key not in self._maps:
            # Threads that race must all use one map: a second one would be unmapped again, and its
            # addresses become invalid.
            mapped = Mapped(self.files[segment], f"features/{readout}")
            return self._maps.setdefault(key, mapped)
        return self._maps[key]


class SmallArrays(dict[str, np.ndarray]):
    """The small arrays (norms, losses ...) of the rows by name, read when first used.

    Args:
        catalog: of the store.
        place: position of each row in the catalog, ``[n]``.
    """

    def __init__(self, catalog: Catalog, place: np.ndarray) -> None:
        super().__init__()
        self._catalog, self._place = catalog, place

    def __missing__(self, name: str) -> np.ndarray:
        """Read an array when it is first used."""
        kind, _, readout = name.partition("/")
        if kind == "inverse lengths":
            found = 1 / np.maximum(self[f"lengths/{readout}"], np.float32(1e-12))
        else:
            found, n = self._catalog[name], len(self._place)
            if n != len(found) or (self._place != np.arange(n)).any():
                found = found[self._place]
        return self.setdefault(name, found)


class Metadata(Sequence[dict[str, Any]]):
    """The metadata of the rows, parsed from JSON when accessed.

    Args:
        lines: the catalog's lines of JSON.
        place: which of them belongs to each row, ``[n]``.
        renewed: lines that replace them, by dataset position; ``null``: not replaced.
        positions: dataset position of each row, ``[n]``.
    """

    def __init__(
        self, lines: list[bytes], place: np.ndarray, renewed: list[bytes], positions: np.ndarray
    ) -> None:
        self._lines, self._place = [*lines, *renewed], place
        later = np.zeros(positions[-1] + 1 if len(positions) else 0, dtype=bool)
        later[: len(renewed)] = [line != b"null" for line in renewed[: len(later)]]
        self._place = np.where(later[positions], len(lines) + positions, place)

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
            return [parsed(self._lines[place]) for place in self._place[row].tolist()]
        return parsed(self._lines[self._place[row]])

    def __eq__(self, other: object) -> bool:
        """Compare with another sequence of mappings."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:  # like every mutable sequence
        raise TypeError("metadata cannot be hashed")


def parsed(line: bytes) -> dict[str, Any]:
    """Return the metadata of an example from its line of JSON.

    Raises:
        DminError: the line is not a JSON mapping.
    """
    try:
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise DminError(
        f"The store has metadata that are not a JSON mapping ({line[:60]!r}): they were not "
        f"written by"
        " dmin. Run `dmin store metadata` to renew them, or collect again."
    )


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Return consecutive indices as a slice, which NumPy copies several times faster."""
    consecutive = (np.diff(indices) == 1).all()
    return slice(indices[0], indices[-1] + 1) if consecutive else indices


def parsed_ids(lines: list[bytes], path: Path) -> list[str]:
    """Return ids from their lines of JSON.

    Raises:
        DminError: a line is not a JSON string.
    """
    try:
        found: list[str] = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines) and all(isinstance(id, str) for id in found):
            return found
    except (ValueError, RecursionError):
        pass
    raise DminError(
        f"The store {path} has ids that are not text: it was not written by dmin. Collect it again."
    )


def require_distinct(ids: list[str], path: Path) -> list[str]:
    """Return the ids of rows; raise DminError if two are the same."""
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DminError(
            f"The store {path} has more than one row of id {twice!r}: give every example of the"
            " dataset its own id, and collect into a new directory."
        )
    return ids


def last_complete(manifest: Manifest, blocks: np.ndarray) -> Manifest:
    """Return the last complete revision; the given manifest if no revision is complete.

    Args:
        manifest: of the last revision.
        blocks: the blocks that are written.
    """
    for state in reversed(manifest.states):
        if len(np.setdiff1d(np.arange(state.num_blocks), blocks)) == 0:
            return state
    return manifest


def places(manifest: Manifest, blocks: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each example's row in a catalog.

    Args:
        manifest: of the store.
        blocks: its blocks in the order of the catalog, ``[b]``.
        end: number of examples, counted from the start of the dataset.

    Returns:
        For each example the number of its row in the catalog, or −1, ``[end]``; and for each row
        of the catalog whether it belongs to these examples, bool.
    """
    starts, counts = manifest.spans(blocks)
    held = ranges(starts, counts)  # dataset positions of the catalog's rows
    # Two writers may both have written a block: assigned backwards, so that the first by name wins.
    place = np.full(manifest.num_examples, -1)
    place[held[::-1]] = np.arange(len(held))[::-1]
    return place[:end], held < end


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the concatenation of ``start … start + count − 1`` for all pairs."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
