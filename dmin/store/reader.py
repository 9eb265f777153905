"""Reading a store, without loading it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmin.errors import DminError
from dmin.fingerprint import differences, fingerprint
from dmin.store.encoding import STORED_AS, decode
from dmin.store.manifest import Layout, require_count
from dmin.store.mapped import Mapped, has
from dmin.store.segments import open_hdf5, open_segments, read_manifest

# Rows that are not asked for are read along when they are fewer bytes than this: one longer read
# is quicker than two short ones.
READ_THROUGH = 256 * 1024


class Block(NamedTuple):
    """Consecutive rows of a store, from row ``start`` on; features and norms are float32."""

    start: int
    features: np.ndarray
    norms: np.ndarray


class Store:
    """Read a store; rows are the examples present, in the order of the dataset.

    No file stays open between reads, so a store may have thousands of segments, and may be pickled.
    ``stored`` and ``gather`` leave segments mapped into memory: these must not be truncated
    meanwhile.

    Args:
        path: the directory.
        verify: recompute the digest of every segment; leave it on but for a second opening in the
            same run.

    Raises:
        DminError: there is no store, or a file of it is damaged or from another store.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        """Read the manifest and find out where every row is."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.segments = list(open_segments(self.path, self.manifest, verify).values())
        segment = np.full(self.manifest.num_examples, -1)
        offset = np.full(self.manifest.num_examples, -1)
        held = np.concatenate([np.empty(0, np.int64), *(each.blocks for each in self.segments)])
        present = np.unique(held)
        self.duplicate_blocks = len(held) - len(present)
        self.missing_blocks = np.setdiff1d(np.arange(self.manifest.num_blocks), present).tolist()
        # Two writers may have raced for a block: backwards, so that the first by name wins.
        for number, each in reversed(list(enumerate(self.segments))):
            segment[each.rows] = number
            offset[each.rows] = np.arange(len(each.rows))
        self.positions = np.flatnonzero(segment >= 0)  # of the rows, in the dataset
        self._segment, self._offset = segment[self.positions], offset[self.positions]
        apart = (np.diff(self._segment) != 0) | (np.diff(self._offset) != 1)
        self._runs = np.flatnonzero(apart) + 1  # rows that do not lie right behind the one before
        self._mapped: dict[tuple[int, str], Mapped] = {}
        self._small: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: they belong to this process."""
        return {**self.__dict__, "_mapped": {}}

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
        names = [each.path.name for each in self.segments]
        return fingerprint({"manifest": self.manifest.fingerprint, "segments": names})

    @property
    def complete(self) -> bool:
        """Whether every example of the dataset has its row."""
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
        ids = self._texts("ids")
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise DminError(
                f"The store {self.path} has more than one row of id {twice!r}: give every example"
                " of the dataset its own id, and collect into a new directory."
            )
        return ids

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """The metadata (label, caption, file ...), one mapping a row."""
        return self._texts("metadata")

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
        stored = self._gather("features", readout, indices, STORED_AS[self.layout.dtype])
        scales = self.scales(readout)
        chosen = None if scales is None else scales[np.asarray(indices, dtype=np.int64)]
        return decode(stored, self.layout.dtype, chosen)

    def stored(self, readout: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the features of rows ``start:stop`` as they are stored and where they lie.

        The pages that follow are asked for meanwhile.

        Yields:
            Arrays ``[n, draw, T, group, dim]`` of ``STORED_AS[layout.dtype]``, in order.
        """
        after = min(2 * stop - start, len(self))
        for first, last in self._together(stop, after):
            self._map(readout, first).prefetch(self._offset[first], self._offset[last - 1] + 1)
        for first, last in self._together(start, stop):
            offset = self._offset[first]
            yield self._map(readout, first).array[offset : offset + last - first]

    def gather(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return chosen rows as they are stored, ``[n, draw, T, group, dim]``: quick where few."""
        result = np.empty(
            (len(indices), *self.layout.row_shape), dtype=STORED_AS[self.layout.dtype]
        )
        for place, row in enumerate(indices):
            result[place] = self._map(readout, row).array[self._offset[row]]
        return result

    def scales(self, readout: str) -> np.ndarray | None:
        """Return what int8 features are to be multiplied by, float32 ``[n, draw, T]``."""
        return self._whole("scales", readout) if self.layout.dtype == "int8" else None

    def lengths(self, readout: str) -> np.ndarray:
        """Return ‖row‖₂ over group and dim of the features read back, float32 ``[n, draw, T]``."""
        name = f"lengths/{readout}"
        if name not in self._small and not all(has(s.path, name) for s in self.segments):
            blocks = [np.square(b.features).sum((3, 4)) for b in self.blocks(readout)]
            self._small[name] = np.sqrt(np.concatenate(blocks))
        return self._whole("lengths", readout)

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
            norms = self._gather("norms", readout, chosen)
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
        name = f"{kind}/{readout}"
        if name not in self._small:
            self._small[name] = self._gather(kind, readout, range(len(self)))
        return self._small[name]

    def _together(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the spans of rows within ``start:stop`` that lie together in one segment."""
        inside = slice(*np.searchsorted(self._runs, [start, stop], side="right").tolist())
        cuts = [start, *(cut for cut in self._runs[inside].tolist() if cut < stop), stop]
        return ((first, last) for first, last in pairwise(cuts) if first < last)

    def _map(self, readout: str, row: int) -> Mapped:
        key = int(self._segment[row]), readout
        if key not in self._mapped:
            self._mapped[key] = Mapped(self.segments[key[0]].path, f"features/{readout}")
        return self._mapped[key]

    def _gather(
        self,
        kind: str,
        readout: str | None,
        indices: Sequence[int] | np.ndarray,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """Read rows: sorted by place in the files, in long runs, put in order in memory."""
        if readout is not None and readout not in self.layout.readouts:
            known = ", ".join(self.layout.readouts)
            raise DminError(f"The store {self.path} has no readout {readout!r}: it has {known}.")
        rank = {"features": 4, "norms": 3}.get(kind, 2)
        name = kind if readout is None else f"{kind}/{readout}"
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise DminError(f"The store {self.path} has no row {outside}: it has {len(self)}.")
        shape = self.layout.row_shape[:rank]
        result = np.empty((len(wanted), *shape), dtype=dtype)
        through = max(1, READ_THROUGH // (4 * int(np.prod(shape))))
        segment, offset = self._segment[wanted], self._offset[wanted]
        order = np.lexsort((offset, segment))
        for one in np.split(order, np.flatnonzero(np.diff(segment[order])) + 1):
            if not len(one):
                continue
            with open_hdf5(self.segments[segment[one[0]]].path) as file:
                for run in np.split(one, np.flatnonzero(np.diff(offset[one]) > through) + 1):
                    first, last = offset[run[0]], offset[run[-1]]
                    read = file[name][first : last + 1]
                    result[_as_slice(run)] = read[_as_slice(offset[run] - first)]
        return result

    def _texts(self, name: str) -> list[Any]:
        texts = []
        for segment in self.segments:
            with open_hdf5(segment.path) as file:
                texts.append(json.loads(file[name][:].tobytes()))
        return [texts[s][o] for s, o in zip(self._segment, self._offset, strict=True)]


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
