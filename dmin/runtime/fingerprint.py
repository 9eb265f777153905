"""Fingerprints: a short hash of a set of settings, and a readable list of differences."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the fields as canonical JSON.

    Args:
        fields: JSON values (nested mappings and sequences allowed); key order does not matter.

    Returns:
        The same 16 characters for equal fields, on every machine.

    Raises:
        TypeError: a value is not JSON.
        ValueError: a value is NaN or infinite.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def array_digest(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of shapes, dtypes and bytes, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """List the fields in which two mappings differ, nested ones by their dotted name.

    Returns:
        Lines such as ``sketch.dim: 4096 here, 1024 there``; empty when nothing differs.
    """
    lines = []
    for key in sorted({*expected, *found}):
        name = f"{prefix}{key}"
        if key not in found:
            lines.append(f"{name}: {_short(expected[key])} here, absent there")
        elif key not in expected:
            lines.append(f"{name}: absent here, {_short(found[key])} there")
        elif isinstance(expected[key], Mapping) and isinstance(found[key], Mapping):
            lines += differences(expected[key], found[key], f"{name}.")
        elif _plain(expected[key]) != _plain(found[key]):
            lines.append(f"{name}: {_short(expected[key])} here, {_short(found[key])} there")
    return lines


def _plain(value: Any) -> Any:
    """JSON has no tuples: compare a manifest read from disk with one made in memory."""
    return json.loads(json.dumps(value))


def _short(value: Any, width: int = 80) -> str:
    text = json.dumps(_plain(value))
    return text if len(text) <= width else f"{text[: width - 1]}…"
