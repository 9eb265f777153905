"""Import stores: files written by ``export``, and sketches computed by another program."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.store.encoding import DTYPE
from dmin.store.manifest import MANIFEST, UNREADABLE, Layout, Manifest
from dmin.store.reader import Store
from dmin.store.revisions import write_pending
from dmin.store.writer import Rows

BLOCK = 256
KINDS = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}


@dataclass
class Arrays:
    """The contents of a file; arrays stay on disk where the format allows it.

    Args:
        arrays: by the names that ``export`` gives; another program's file has one.
        ids: one per row, or None.
        metadata: one per row, or None.
        manifest: of an exported store; None for other files.
    """

    arrays: dict[str, np.ndarray]
    ids: Sequence[str] | None = None
    metadata: Sequence[dict[str, Any]] | None = None
    manifest: Manifest | None = None
    bfloat16: set[str] = field(default_factory=set)

    def rows(self, name: str, own: slice) -> np.ndarray:
        """Return some rows of an array as float32."""
        part = self.arrays[name][own]
        if name in self.bfloat16:
            return (part.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(part, dtype=np.float32)

    def block(self, part: range) -> Rows:
        """Return rows of an exported store as they were written."""
        assert self.manifest is not None and self.ids is not None and self.metadata is not None
        own, readouts = slice(part.start, part.stop), self.manifest.layout.readouts
        return Rows(
            list(self.ids[own]),
            list(self.metadata[own]),
            {name: self.rows(f"features/{name}", own) for name in readouts},
            {name: self.rows(f"norms/{name}", own) for name in readouts},
            self.rows("losses", own),
        )


def import_store(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    sketch: str | None = None,
    ids: Sequence[str] | None = None,
    dtype: str = DTYPE,
) -> Store:
    """Write a store from an exported store or from sketches of another program; it can resume.

    Sketches of another program are one array, ``[n, k]`` or ``[n, timestep, k]``. Rows are stored
    normalised, with their norms. So ``grad_dot`` uses the inner products of the given rows, and
    ``dmin`` their cosines.

    Args:
        source: a folder or file that ``export`` wrote; or an ``.npy``, ``.safetensors`` or
            ``.parquet`` file. A Parquet file has a column of lists, and ``id`` if it has ids.
        target: a new directory.
        sketch: only for another program's sketches: any text that says how they were made. It must
            be the same for the stores of queries and of training examples.
        ids: only for another program's sketches: one per row; row numbers if None.
        dtype: only for another program's sketches: how they are stored.

    Raises:
        DminError: the source cannot be read, or a setting is missing or not allowed.
    """
    found = read(Path(source))
    if found.manifest is None:
        return _foreign(found, Path(source), Path(target), sketch, ids, dtype)
    if sketch is not None or ids is not None:
        raise DminError(
            f"{source} is an export, which contains its sketch and ids: leave out sketch= and ids=."
        )
    assert found.ids is not None
    manifest = replace(found.manifest, num_examples=len(found.ids), revisions=())
    return write_pending(target, manifest, found.block)


def _foreign(
    found: Arrays,
    source: Path,
    target: Path,
    sketch: str | None,
    ids: Sequence[str] | None,
    dtype: str,
) -> Store:
    name, array = next(iter(found.arrays.items()))
    if len(found.arrays) > 1 or array.ndim not in (2, 3) or 0 in array.shape:
        shapes = {key: list(each.shape) for key, each in found.arrays.items()}
        raise DminError(
            f"{source} has the arrays {shapes}: sketches of other programs must be one array [n, "
            f"k] or [n, timestep, k]."
        )
    if not sketch:
        raise DminError(
            "Sketches of other programs need sketch=...: any name for how they were computed, the "
            "same for queries and training examples."
        )
    names = ids if ids is not None else found.ids
    names = [f"{row}" for row in range(len(array))] if names is None else list(names)
    if len(names) != len(array):
        raise DminError(f"There are {len(names)} ids for {len(array)} rows of {source}.")
    steps = array.shape[1] if array.ndim == 3 else 1
    layout = Layout(("loss",), 1, tuple(range(steps)), ("model",), array.shape[-1], dtype)
    features = {"imported": True, "sketch": {"family": sketch, "dim": array.shape[-1]}}
    manifest = Manifest(layout, features, {"name": source.name}, len(array), BLOCK)

    def block(part: range) -> Rows:
        own = slice(part.start, part.stop)
        rows = found.rows(name, own).reshape(len(part), 1, steps, 1, -1)
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(-1)).astype(np.float32)
        unit = rows / np.where(norms > 0, norms, 1)[..., None]
        metadata = list(found.metadata[own]) if found.metadata else [{}] * len(rows)
        losses = np.zeros(norms.shape[:3], np.float32)
        return Rows(names[own], metadata, {"loss": unit}, {"loss": norms}, losses)

    return write_pending(target, manifest, block)


def read(source: Path) -> Arrays:
    """Read a file or folder; its arrays are memory-mapped where possible.

    Raises:
        DminError: it does not exist or has an unknown format.
    """
    try:
        if source.is_dir():
            return _folder(source)
        if source.suffix == ".npy":
            return Arrays({"features": np.lib.format.open_memmap(source, mode="r")})
        if source.suffix == ".safetensors":
            return _safetensors(source)
        if source.suffix == ".parquet":
            return _parquet(source)
    except UNREADABLE as error:
        raise DminError(
            f"{source} cannot be imported ({' '.join(str(error).split())}): give a folder or file "
            f"that `dmin store export` wrote, or a .npy, .safetensors or .parquet file of "
            f"sketches."
        ) from error
    raise DminError(
        f"{source} cannot be imported: give a folder that `dmin store export` wrote, or a file "
        f"that ends in .npy, .safetensors or .parquet."
    )


def _folder(source: Path) -> Arrays:
    manifest = Manifest.from_json((source / MANIFEST).read_text("utf-8"), str(source / MANIFEST))
    names = ["losses"]
    for readout in manifest.layout.readouts:
        names += [f"features/{readout}", f"norms/{readout}"]
    files = {name: source / f"{name.replace('/', '-')}.npy" for name in names}
    arrays: dict[str, np.ndarray] = {
        name: np.lib.format.open_memmap(file, mode="r") for name, file in files.items()
    }
    rows = json.loads((source / "rows.json").read_text("utf-8"))
    return Arrays(arrays, [r["id"] for r in rows], [r["metadata"] for r in rows], manifest)


def _safetensors(source: Path) -> Arrays:
    with open(source, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > source.stat().st_size:
            raise ValueError(f"its header claims to have {length:,} bytes")
        header = json.loads(file.read(length))
    about = header.pop("__metadata__", {})
    arrays: dict[str, np.ndarray] = {}
    halves: set[str] = set()
    for name, entry in header.items():
        if entry["dtype"] not in KINDS:
            raise ValueError(f"{name} is {entry['dtype']}, not one of {', '.join(KINDS)}")
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        arrays[name] = np.memmap(source, KINDS[entry["dtype"]], "r", start, shape)
        if entry["dtype"] == "BF16":
            halves.add(name)
    if "manifest" not in about:
        return Arrays(arrays, bfloat16=halves)
    rows = json.loads(about["rows"])
    manifest = Manifest.from_json(about["manifest"], str(source))
    return Arrays(arrays, [r["id"] for r in rows], [r["metadata"] for r in rows], manifest)


def _parquet(source: Path) -> Arrays:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DminError("Parquet needs pyarrow: pip install pyarrow.") from error
    table = parquet.read_table(source)
    about = (table.schema.metadata or {}).get(b"dmin")
    manifest = None if about is None else Manifest.from_json(about.decode(), str(source))
    ids = table["id"].to_pylist() if "id" in table.column_names else None
    metadata = None
    if "metadata" in table.column_names:
        metadata = [json.loads(entry) for entry in table["metadata"].to_pylist()]
    arrays = {}
    for name in table.column_names:
        if name in ("id", "metadata"):
            continue
        column = table[name].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        if len(table) == 0 or len(flat) % len(table):
            raise ValueError(f"the lists of column {name!r} are not all of one length")
        arrays[name] = flat.reshape(len(table), -1)
        if manifest is not None:
            arrays[name] = arrays[name].reshape(_shape(name, len(table), manifest.layout))
    return Arrays(arrays, ids, metadata, manifest)


def _shape(name: str, rows: int, layout: Layout) -> tuple[int, ...]:
    rank = {"features": 4, "norms": 3}.get(name.partition("/")[0], 2)
    return rows, *layout.row_shape[:rank]
