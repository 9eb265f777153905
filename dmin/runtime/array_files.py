"""Cache files of arrays under one digest, which is verified before anything is parsed.

A file begins with a line of its kind and the digest of all that follows: the length of
a JSON header, the header (names, types and shapes of the arrays, and what they were computed
from), and the raw arrays. A damaged file is treated as missing, with a warning.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmin.runtime.errors import DminWarning
from dmin.runtime.files import commit

MAGIC = b"dmin keeps this to save time, 1: "
START, ALIGNED = 128, 64  # bytes: of the first line, and what arrays begin at multiples of
CHUNK = 16 << 20  # bytes that are digested by one thread


class ArrayFile(NamedTuple):
    """What a file holds.

    Args:
        about: what the arrays are of, JSON.
        arrays: by name.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def has(self, shapes: Mapping[str, tuple[Any, tuple[int, ...]]]) -> bool:
        """Return whether there are arrays of these types and shapes, and no others."""
        found = {name: (array.dtype, array.shape) for name, array in self.arrays.items()}
        return found == {name: (np.dtype(kind), shape) for name, (kind, shape) in shapes.items()}


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that :func:`read_arrays` reads, whole or not at all.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    commit(path, packed(about, arrays), durable=False)


def read_arrays(path: Path) -> ArrayFile | None:
    """Return what a file holds; None if it is not there, or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        return unpacked(np.fromfile(path, np.uint8))
    except (OSError, ValueError) as error:
        warn_damaged(path, str(error))
        return None


def packed(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> memoryview:
    """Return the bytes of such a file."""
    shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    head = json.dumps({"about": about, "arrays": shapes}).encode()
    content = bytearray(START) + len(head).to_bytes(8, "little") + head
    for array in arrays.values():
        content += bytes(-len(content) % ALIGNED)
        content += np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    line = MAGIC + _digest(memoryview(content)[START:])
    content[:START] = line.ljust(START - 1) + b"\n"
    return memoryview(content)


def unpacked(content: np.ndarray) -> ArrayFile:
    """Return what bytes (uint8) that :func:`packed` returned hold; arrays are views of them.

    Raises:
        ValueError: they are others.
    """
    first = content[:START].tobytes()
    if first != (MAGIC + _digest(content[START:].data)).ljust(START - 1) + b"\n":
        raise ValueError("its digest does not match its bytes")
    try:
        place = START + 8 + int.from_bytes(content[START : START + 8].tobytes(), "little")
        head = json.loads(content[START + 8 : place].tobytes())
        arrays = {}
        for name, (kind, shape) in head["arrays"].items():
            place += -place % ALIGNED
            end = place + np.dtype(kind).itemsize * prod(shape)
            if min(shape, default=0) < 0:
                raise ValueError(f"{name} is of shape {shape}")
            arrays[name] = content[place:end].view(kind).reshape(shape)
            place = end
        return ArrayFile(dict(head["about"]), arrays)
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header is not valid: {error!r}") from error


def warn_damaged(path: Path, why: str) -> None:
    """Say that a file is of no use."""
    warnings.warn(f"{path} is damaged ({why}): it is rebuilt.", DminWarning, stacklevel=2)


def _digest(content: memoryview) -> bytes:
    """Return the SHA-256 of the SHA-256 of chunks, which threads look at side by side, in hex."""
    chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
    with ThreadPoolExecutor(min(8, len(chunks) or 1)) as pool:
        parts = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
        return hashlib.sha256(b"".join(parts)).hexdigest().encode()
