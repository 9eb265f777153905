"""How features are stored: as floats of 32 or 16 bits, or as bytes with scales."""

import math
from typing import Any, NamedTuple

import numpy as np

DTYPE = "float16"  # the default of a store
# The NumPy type of a feature in the file. NumPy has no bfloat16: its bits are stored as uint16.
STORED_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("|i1"),
    "int8_parts": np.dtype("|i1"),
}
PART = 32, 256  # fewest and most dimensions that share a scale
# The largest absolute value; int8 has its own scales for every row, draw and timestep.
LARGEST: dict[str, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
    "int8": float(np.finfo(np.float32).max),
    "int8_parts": float(np.finfo(np.float32).max),
}


class Encoded(NamedTuple):
    """Features as they are stored."""

    values: np.ndarray  # [n, draw, T, group, dim] of STORED_AS[dtype]
    scales: np.ndarray | None  # float32 [n, draw, T], of int8_parts [n, draw, T, parts]
    lengths: np.ndarray  # float32 [n, draw, T], ‖row‖₂ over group and dim of what is read back


def scale_shape(width: int, dtype: str) -> tuple[int, ...] | None:
    """Return the shape of the scales of a row of ``width`` dimensions; None if it has none.

    With one scale per row, one outlier coarsens the whole row; with a scale per part, its part.
    """
    if dtype == "int8":
        return ()
    parts = (part for part in range(PART[1], PART[0] - 1, -1) if width % part == 0)
    return (width // next(parts, width),) if dtype == "int8_parts" else None


def encode(features: np.ndarray, dtype: str) -> Encoded:
    """Round float32 features ``[n, draw, T, group, dim]`` to the nearest values of a dtype.

    int8 stores ``x ≈ s·b`` with ``s = max|x| / 127`` over group and dim, so no error exceeds
    ``s / 2``; int8_parts has such an s for every part of a row, see :func:`scale_shape`.
    """
    scales, shape = None, features.shape
    parts = scale_shape(shape[3] * shape[4], dtype)
    if parts is not None:
        count = math.prod(parts)
        cut = features.reshape(*shape[:3], count, shape[3] * shape[4] // count)
        scales = np.abs(cut).max(4, initial=0) / np.float32(127)
        values = np.rint(cut / np.where(scales > 0, scales, 1)[..., None]).reshape(shape)
        scales = scales.reshape(*shape[:3], *parts)
    elif dtype == "bfloat16":
        bits = np.ascontiguousarray(features, np.float32).view(np.uint32)
        values = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
    else:
        values = features
    stored = np.array(values, dtype=STORED_AS[dtype], order="C")
    wide = decode(stored, dtype, scales)
    squares = np.einsum("...gk,...gk->...", wide, wide, dtype=np.float64)
    return Encoded(stored, scales, np.sqrt(squares).astype(np.float32))


def decode(values: np.ndarray, dtype: str, scales: np.ndarray | None = None) -> np.ndarray:
    """Return stored features as float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    wide = values.astype(np.float32, copy=False)
    if scales is None or not wide.size:
        return wide
    scales = scales.reshape(*wide.shape[:3], -1, 1)
    cut = wide.reshape(*scales.shape[:4], -1)
    found: np.ndarray = (cut * scales).reshape(wide.shape)
    return found


def word_sums(values: np.ndarray) -> np.ndarray:
    """Return a checksum of each row: its values, read as unsigned integers, added modulo 2³².

    One flipped bit changes the sum by a power of two, so it is always detected.

    Args:
        values: ``[n, ...]`` as stored.

    Returns:
        uint32 ``[n]``.
    """
    flat = np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
    return np.add.reduce(flat.view(f"<u{flat.itemsize}"), axis=1, dtype=np.uint32)
