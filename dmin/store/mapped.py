"""Memory-mapped arrays of sealed segments, used without a copy."""

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dmin.runtime.files import naming
from dmin.store.segments import dataset, open_hdf5

NEAR = 64 << 10  # bytes between rows, up to which one long read is faster than two short ones


class Mapped:
    """One HDF5 dataset of a segment as a memory-mapped array.

    The mapping is private: writing to the array does not change the file. No file stays open,
    because a store may have more segments than a process may open files.

    Args:
        path: a sealed segment.
        name: of the dataset.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._offset = path, -1
        self._advise: Callable[[int, int], Any] = lambda start, length: None
        with open_hdf5(path) as file:
            found = dataset(file, name)
            offset = found.id.get_offset()
            if offset is None or offset % found.dtype.itemsize:  # not dmin's: chunked or unaligned
                self.array: np.ndarray = found[:]
                return
            shape, dtype = found.shape, found.dtype
        with naming("read", path), open(path, "rb") as raw:
            pages, self._advise = _pages(raw.fileno())
        self._offset = offset
        self.array = np.frombuffer(pages, dtype, int(np.prod(shape)), offset).reshape(shape)

    def in_memory(self, row: int) -> bool:
        """Return whether a row is in the page cache, judged by its first page."""
        if self._offset < 0:
            return True
        with contextlib.suppress(OSError, AttributeError):  # it would block, or is not supported
            file = os.open(self._path, os.O_RDONLY)
            try:
                place = self._offset + row * self.array[:1].nbytes
                return bool(os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT))
            finally:
                os.close(file)
        return False

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the operating system to read rows ``start:stop`` in the background."""
        row = self.array[:1].nbytes
        first = (self._offset + int(start) * row) // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise(first, self._offset + int(stop) * row - first)

    def prefetch_rows(self, rows: np.ndarray) -> None:
        """Do the same for chosen rows, ascending; rows near each other become one request."""
        near = max(1, NEAR // max(1, self.array[:1].nbytes))
        apart = np.flatnonzero(np.diff(rows) > near)
        starts = rows[np.concatenate([[0], apart + 1])]
        stops = rows[np.concatenate([apart, [-1]])] + 1
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.prefetch(start, stop)


def _pages(file: int) -> tuple[Any, Callable[[int, int], Any]]:
    """Map a file; return its bytes and a function that prefetches a range of them.

    Python's ``mmap`` keeps its file open, and most systems allow a thousand open files.
    """
    libc, size = _libc(), os.fstat(file).st_size
    if libc is None:
        pages = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        return pages, lambda start, length: None
    kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    address = libc.mmap(None, size, *kind, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    whole = (ctypes.c_char * size).from_address(address)
    # Arrays that use the mapping keep it alive; it is unmapped when the last of them is freed.
    weakref.finalize(whole, libc.munmap, address, size)

    def advise(start: int, length: int) -> None:
        libc.madvise(address + start, length, mmap.MADV_WILLNEED)

    return whole, advise


@cache
def _libc() -> Any:
    """Return the C library with its mmap functions declared; None where there are none."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        libc.mmap.restype = pointer
        libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_int64)
        libc.munmap.argtypes = (pointer, size)
        libc.madvise.argtypes = (pointer, size, number)
    except (AttributeError, OSError, TypeError):
        return None
    return libc if hasattr(mmap, "MADV_WILLNEED") else None
