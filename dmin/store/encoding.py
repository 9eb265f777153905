"""How features are stored: as floats of 32 or 16 bits, or as bytes with a scale."""

import math
from typing import Any, NamedTuple

import numpy as np

# What a feature takes in the file. numpy has no bfloat16: its bits are kept.
STORED_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("|i1"),
}
# The largest size of a value; int8 has a scale of its own for every row, draw and timestep.
LARGEST: dict[str, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
    "int8": float(np.finfo(np.float32).max),
}


class Encoded(NamedTuple):
    """Features as they are stored."""

    values: np.ndarray  # [n, draw, T, group, dim] of STORED_AS[dtype]
    scales: np.ndarray | None  # float32 [n, draw, T], of int8 only
    lengths: np.ndarray  # float32 [n, draw, T], ‖row‖₂ over group and dim of what is read back


def encode(features: np.ndarray, dtype: str) -> Encoded:
    """Round float32 features ``[n, draw, T, group, dim]`` to the nearest that can be stored.

    int8 keeps ``x ≈ s·b`` with ``s = max|x| / 127`` over group and dim, so no value is off by more
    than ``s / 2``.
    """
    scales = None
    if dtype == "int8":
        scales = np.abs(features).max((3, 4), initial=0) / np.float32(127)
        values = np.rint(features / np.where(scales > 0, scales, 1)[..., None, None])
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
    return wide if scales is None else wide * scales[..., None, None]


def word_sums(values: np.ndarray) -> np.ndarray:
    """Return the stored numbers of each row, taken as whole numbers, added up modulo 2³².

    A bit flipped anywhere changes the sum by a power of two: it is always found.

    Args:
        values: ``[n, ...]`` as stored.

    Returns:
        uint32 ``[n]``.
    """
    flat = np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
    return np.add.reduce(flat.view(f"<u{flat.itemsize}"), axis=1, dtype=np.uint32)
