"""Stores for other programs: NumPy arrays, safetensors, Parquet; a few rows in memory at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.escape import named_apart, write_csv
from dmin.runtime.files import naming
from dmin.store.manifest import MANIFEST
from dmin.store.reader import Store
from dmin.store.removal import note_copy

ROWS = 256
# The NumPy and safetensors type of exported features; dtypes not listed are exported as float32.
EXPORTED = {"float16": ("<f2", "F16")}
OTHERWISE = ("<f4", "F32")
Stream = tuple[str, tuple[int, ...], Iterator[np.ndarray]]


def export(store: Store, target: str | os.PathLike[str], form: str) -> Path:
    """Write a store for other programs.

    ========== =========================================================================
    numpy      a directory of ``features-<readout>.npy`` ``[n, draw, T, group, k]``, norms,
               losses, ``rows.json`` (ids and metadata) and the manifest
    safetensors one file with the same arrays; ids, metadata and manifest as its metadata
    parquet    one file, one row per example: id, metadata as JSON, flat lists (needs pyarrow)
    ========== =========================================================================

    Args:
        store: the store to export; float16 stays float16, other dtypes become float32.
        target: a path that does not exist.
        form: ``numpy``, ``safetensors`` or ``parquet``.

    Raises:
        DminError: the form is unknown, the target exists, or it could not be written.
    """
    target = Path(target)
    if form not in FORMS:
        raise DminError(f"A store cannot be exported as {form!r}: use {' or '.join(FORMS)}.")
    if target.exists():
        raise DminError(f"{target} is there already: choose another path, or delete it.")
    with naming("export to", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as folder:
            partial = Path(folder, target.name)  # of this process alone
            FORMS[form](store, partial)
            partial.rename(target)
        note_copy(store, target)
    return target


def save_rows(
    store: Store, order: np.ndarray, columns: Mapping[str, Sequence[str]], path: Path
) -> None:
    """Write rows of a store as CSV: rank, id, the given columns, and metadata.

    Args:
        store: the store.
        order: row numbers, the first rank first, ``[n]``.
        columns: by header, one text per row of the store.
        path: the file.
    """
    metadata = dict.fromkeys(name for each in store.metadata for name in each)
    names = named_apart(metadata, ("rank", "id", *columns))
    lines = []
    for rank, row in enumerate(order.tolist(), 1):
        found = {name: texts[row] for name, texts in columns.items()}
        told = {names[name]: value for name, value in store.metadata[row].items()}
        lines.append({"rank": rank, "id": store.ids[row], **found, **told})
    write_csv(path, lines)


def _numpy(store: Store, path: Path) -> None:
    path.mkdir(exist_ok=True)
    for name, (dtype, shape, parts) in _arrays(store).items():
        with open(path / f"{name.replace('/', '-')}.npy", "wb") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _write(file, parts, dtype)
    (path / "rows.json").write_text(_rows(store), "utf-8")
    (path / MANIFEST).write_text(store.manifest.to_json(), "utf-8")


def _safetensors(store: Store, path: Path) -> None:
    """Write 8 bytes with the header's length, a JSON header, and the arrays one after the other."""
    arrays = _arrays(store)
    about = {"rows": _rows(store), "manifest": store.manifest.to_json()}
    header: dict[str, Any] = {"__metadata__": about}
    start = 0
    for name, (dtype, shape, _) in arrays.items():
        stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        kind = dict([*EXPORTED.values(), OTHERWISE])[dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, _, parts in arrays.values():
            _write(file, parts, dtype)


def _parquet(store: Store, path: Path) -> None:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DminError(
            "Parquet needs pyarrow: pip install pyarrow, or export as numpy or safetensors."
        ) from error
    arrays = _arrays(store)
    fields = [("id", arrow.string()), ("metadata", arrow.string())]
    for name, (dtype, shape, _) in arrays.items():
        kind = arrow.from_numpy_dtype(np.dtype(dtype))
        fields.append((name, arrow.list_(kind, int(np.prod(shape[1:])))))
    schema = arrow.schema(fields, metadata={"dmin": store.manifest.to_json()})
    streams = {name: parts for name, (_, _, parts) in arrays.items()}
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(store), ROWS):
            rows = slice(start, start + ROWS)
            columns = [store.ids[rows], [json.dumps(each) for each in store.metadata[rows]]]
            for name, parts in streams.items():
                part = next(parts).astype(arrays[name][0])
                flat = arrow.array(part.ravel())
                kind = schema.field(name).type
                columns.append(arrow.FixedSizeListArray.from_arrays(flat, type=kind))
            writer.write_table(arrow.table(dict(zip(schema.names, columns, strict=True)), schema))


FORMS: dict[str, Callable[[Store, Path], None]] = {
    "numpy": _numpy,
    "safetensors": _safetensors,
    "parquet": _parquet,
}


def _arrays(store: Store) -> dict[str, Stream]:
    """Return the dtype of every array, its shape, and its rows in parts of ``ROWS``."""
    layout, n = store.layout, len(store)
    dtype = EXPORTED.get(layout.dtype, OTHERWISE)[0]
    found: dict[str, Stream] = {}
    for name in layout.readouts:
        parts = (block.features for block in store.blocks(name, ROWS))
        found[f"features/{name}"] = dtype, (n, *layout.row_shape), parts
        norms = _parts(store.norms(name))
        found[f"norms/{name}"] = OTHERWISE[0], (n, *layout.row_shape[:3]), norms
    found["losses"] = OTHERWISE[0], (n, *layout.row_shape[:2]), _parts(store.losses())
    return found


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + ROWS] for start in range(0, len(array), ROWS))


def _write(file: BinaryIO, parts: Iterator[np.ndarray], dtype: str) -> None:
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype=dtype).data)


def _rows(store: Store) -> str:
    pairs = zip(store.ids, store.metadata, strict=True)
    return json.dumps([{"id": id, "metadata": entry} for id, entry in pairs])
