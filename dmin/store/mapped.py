"""Arrays of sealed segments, used where they lie: in the page cache, without a copy."""

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmin.store.segments import open_hdf5, os_failure

NEAR = 64 << 10  # bytes: one longer read is quicker than two short ones


class Mapped:
    """One dataset of a segment as an array in memory that the operating system fills when read.

    Pages are private: writing to the array would change nothing in the file.

    Args:
        path: a sealed segment.
        name: of the dataset.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._advise: Callable[[int, int], None] = lambda start, length: None
        with open_hdf5(path) as file:
            dataset = file[name]
            offset = dataset.id.get_offset()
            if offset is None or offset % dataset.dtype.itemsize:  # not ours: chunked, or unaligned
                self.array: np.ndarray = dataset[:]
                return
            shape, dtype = dataset.shape, dataset.dtype
        try:
            with open(path, "rb") as raw:
                pages = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise os_failure("read", path, error) from error
        self.array = np.frombuffer(pages, dtype, int(np.prod(shape)), offset).reshape(shape)
        self._offset = offset
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise = lambda start, length: pages.madvise(mmap.MADV_WILLNEED, start, length)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the operating system to read rows ``start:stop`` from the disk meanwhile."""
        row = self.array.nbytes // max(1, len(self.array))
        if hasattr(self, "_offset"):
            first = (self._offset + start * row) // mmap.PAGESIZE * mmap.PAGESIZE
            self._advise(first, self._offset + stop * row - first)

    def prefetch_rows(self, rows: np.ndarray) -> None:
        """Ask for chosen rows, ascending; what lies near each other is asked for together."""
        near = max(1, NEAR // max(1, self.array[:1].nbytes))
        apart = np.flatnonzero(np.diff(rows) > near)
        starts = rows[np.concatenate([[0], apart + 1])]
        stops = rows[np.concatenate([apart, [-1]])] + 1
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.prefetch(start, stop)
