"""Writing a store: append blocks, seal them, resume, alone or with other processes."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, naming, os_failure
from dmin.runtime.formatting import spans
from dmin.store.amendments import is_moved, metadata_text
from dmin.store.comparison import manifest_differences, metadata_remedy
from dmin.store.encoding import LARGEST, encode
from dmin.store.manifest import Layout, Manifest
from dmin.store.ranking_loss import RankingLoss
from dmin.store.segments import (
    MANIFEST,
    Content,
    Segment,
    encode_segment,
    open_segments,
    read_manifest,
    segment_name,
)

STALE_SECONDS = 24 * 3600.0
SEGMENT_BYTES, SEAL_SECONDS = 64 << 20, 60.0


@dataclass
class Rows:
    """The n rows of one block, in dataset order.

    Args:
        ids: the example ids, ``[n]``, unique in the dataset.
        metadata: JSON, one mapping per example.
        features: readout -> ``[n, draw, T, group, dim]``; stored as ``layout.dtype``.
        norms: readout -> ``[n, draw, T, group]``, the gradient norms before normalising.
        losses: ``[n, draw, T]``.
    """

    ids: list[str]
    metadata: list[dict[str, Any]]
    features: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    losses: np.ndarray


class StoreWriter:
    """Create a store, or resume one, and append blocks to it.

    Use it in a ``with`` statement: the blocks appended are sealed however it ends, by Ctrl-C too.
    Several processes may write into one store. Distribute the blocks by their number
    (``block % processes == rank``), not by their index in ``pending()``, which gets shorter.

    Args:
        path: the directory; it and its parents are made if missing.
        manifest: of the store.
        segment_bytes: seal when the unsealed blocks have this many bytes.
        seal_seconds: seal at the first append this long after the first unsealed one. It limits
            the work that is lost if the process is killed.
        verify: compare the digests of existing segments with their names.

    Raises:
        DminError: the directory cannot be written, is not a store, has a store made with other
            settings or of another dataset, or has damaged segments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        seal_seconds: float = SEAL_SECONDS,
        verify: bool = True,
    ) -> None:
        """Write or check the manifest, and find out which blocks exist."""
        self.path: Path = Path(path)
        self.segment_bytes = segment_bytes
        self.seal_seconds = seal_seconds
        self.verify = verify
        self._collected: dict[int, Content] = {}
        self._bytes, self._first_append = 0, 0.0
        self._ids: set[str] = set()
        self._segments: dict[str, Segment] = {}
        self._sealed: set[int] = set()
        self._closed, self._loss = False, RankingLoss(manifest.layout.dtype)
        with naming("make a store in", self.path):
            self._create(manifest)
        # From here on the store's own manifest: equal values may differ as text, as 1 and 1.0.
        self.manifest: Manifest = read_manifest(self.path)
        _require_same(self.path, manifest, self.manifest)
        self._remove_stale()
        moved = is_moved(self.path, self.manifest)
        if self.pending() and moved and self.manifest.fingerprint != manifest.fingerprint:
            raise DminError(
                f"{self.path} is the target of an unfinished grow or compact: run "
                "that command again to continue (collect.grow=true, `dmin store append` or "
                "`compact`)."
            )

    def __enter__(self) -> "StoreWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Seal the blocks appended: they are valid, whatever failed afterwards."""
        try:
            self.close()
        except DminError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error matters most to the user

    def pending(self) -> list[int]:
        """Return the blocks that no process has sealed yet, ascending."""
        self._segments = open_segments(self.path, self.manifest, self.verify, self._segments)
        self._sealed = {int(b) for each in self._segments.values() for b in each.blocks}
        return [block for block in range(self.manifest.num_blocks) if block not in self._sealed]

    def append(self, block: int, rows: Rows) -> None:
        """Take the rows of one block, and seal if the unsealed blocks are large or old enough.

        Args:
            block: number of the block, see ``Manifest.block_rows``.
            rows: all its rows; they are copied.

        Raises:
            DminError: the block exists already; a row is invalid (then the block is not taken); or
                sealing failed (then the rows are kept in memory).
        """
        if self._closed:
            raise DminError(f"The writer of {self.path} is closed: open it again to append.")
        if block in self._sealed or block in self._collected:
            raise DminError(
                f"Block {block} of {self.path} is already written: append blocks of `pending()`."
            )
        count = len(self.manifest.block_rows(block))
        content = Content(
            _checked_texts(rows, count, self._ids),
            _checked_arrays(rows, count, self.manifest.layout),
        )
        for readout in self.manifest.layout.readouts[:1]:  # none if only losses are stored
            self._loss.add(readout, rows.features, content.arrays)
        if not self._collected:
            self._first_append = time.monotonic()
        self._collected[block] = content
        self._ids.update(rows.ids)
        self._bytes += sum(array.nbytes for array in content.arrays.values())
        waited = time.monotonic() - self._first_append
        if self._bytes >= self.segment_bytes or waited >= self.seal_seconds:
            self.seal()

    def seal(self) -> None:
        """Write the unsealed blocks, if any, as one segment.

        Raises:
            DminError: it could not be written. No file remains of it, the blocks are kept in
                memory, and earlier segments stay valid.
        """
        if not self._collected:
            return
        blocks = sorted(self._collected)
        content = encode_segment(self.manifest, self._collected)
        try:
            commit(self.path / segment_name(blocks[0], content), content)
        except OSError as error:
            count = sum(len(each.texts["ids"]) for each in self._collected.values())
            raise DminError(
                f"{os_failure('write a segment into', self.path, error)} {count} rows (blocks"
                f" {spans(blocks)}) are not sealed; the segments sealed before stay valid."
            ) from error
        self._sealed.update(blocks)
        self._collected.clear()
        self._bytes = 0

    def close(self) -> None:
        """Seal the unsealed blocks; the writer takes no more."""
        self.seal()
        self._loss.warn()
        self._closed = True

    def _create(self, manifest: Manifest) -> None:
        """Make the directory and the manifest, unless one exists: the first process wins."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Heartbeats stay where a store was deleted while it was collected.
        there = [name for name in os.listdir(self.path) if name != "progress"]
        strangers = [name for name in there if not name.endswith(".tmp")]
        if (file := self.path / MANIFEST).exists():  # after listing: another may just have made it
            return
        if strangers:
            raise DminError(
                f"{self.path} is not empty and not a store (it has {strangers[0]!r}, but no"
                f" {MANIFEST}): choose an empty or new directory."
            )
        text = manifest.to_json().encode()
        try:
            commit(file, text, overwrite=False)
        except FileExistsError:
            return
        except OSError:  # a file system without links, or an error that will occur again
            commit(file, text)

    def _remove_stale(self) -> None:
        """Remove temporary files of killed writers, when they are too old to be in use."""
        for leftover in self.path.glob("*.tmp"):
            with contextlib.suppress(OSError):  # for example, its writer has just renamed it
                if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                    leftover.unlink()


def _require_same(path: Path, here: Manifest, there: Manifest) -> None:
    """Raise DminError unless a store can be resumed with this manifest."""
    changed = is_moved(path, there) or bool(list(path.glob("removed-*.json")))
    lines_of = manifest_differences(here, there, counted=not changed)
    said = [f"{what} ({'; '.join(lines)})" for what, lines in lines_of.items()]
    if said:
        raise DminError(
            f"{path} holds a store that this command cannot continue: {', and '.join(said)} "
            "('here' is this command, 'there' the store). Nothing was changed: use the store's "
            f"settings, or choose another directory.{metadata_remedy(here, there, path)}"
        )


def _checked_texts(rows: Rows, count: int, taken: set[str]) -> dict[str, list[str]]:
    """Return ids and metadata as JSON, one line per row, or raise DminError."""
    for name, entries in (("ids", rows.ids), ("metadata", rows.metadata)):
        if len(entries) != count:
            raise DminError(
                f"There are {len(entries)} {name} for a block of {count} rows: give one for each "
                f"row."
            )
    seen: set[str] = set()
    metadata = []
    for id, entry in zip(rows.ids, rows.metadata, strict=True):
        if not isinstance(id, str):
            raise DminError(f"The id {id!r} is a {type(id).__name__}: ids must be text.")
        if id in seen or id in taken:
            raise DminError(f"Two examples have the id {id!r}: give every example its own id.")
        seen.add(id)
        metadata.append(metadata_text(id, entry))
    return {"ids": [json.dumps(id) for id in rows.ids], "metadata": metadata}


def _checked_arrays(rows: Rows, count: int, layout: Layout) -> dict[str, np.ndarray]:
    """Return copies of the arrays by their HDF5 dataset's name, or raise DminError."""
    for name, arrays in (("features", rows.features), ("norms", rows.norms)):
        if set(arrays) != set(layout.readouts):
            raise DminError(
                f"The {name} have the readouts {sorted(arrays)}, the store's layout has"
                f" {sorted(layout.readouts)}: give exactly these."
            )
    shape = (count, *layout.row_shape)
    given: dict[str, tuple[np.ndarray, tuple[int, ...], str]] = {
        "losses": (rows.losses, shape[:3], "float32")
    }
    for readout in layout.readouts:
        given[f"features/{readout}"] = (rows.features[readout], shape, layout.dtype)
        given[f"norms/{readout}"] = (rows.norms[readout], shape[:4], "float32")
    stored = {}
    for name, (values, expected, dtype) in given.items():
        with np.errstate(over="ignore"):  # an overflow is refused below, with the example's id
            array = np.asarray(values, dtype=np.float32)
        if array.shape != expected:
            raise DminError(
                f"The array {name} of a block has the shape {array.shape}; the store's layout needs"
                f" {expected} (rows, draw, timestep, group, dim)."
            )
        _require_storable(name, array, dtype, rows.ids, layout)
        kind, _, readout = name.partition("/")
        if kind == "features":
            encoded = encode(array, dtype)
            stored[name], stored[f"lengths/{readout}"] = encoded.values, encoded.lengths
            if encoded.scales is not None:
                stored[f"scales/{readout}"] = encoded.scales
        else:
            stored[name] = np.array(array, order="C")
    return stored


def _require_storable(
    name: str, array: np.ndarray, dtype: str, ids: list[str], layout: Layout
) -> None:
    """Raise DminError, naming the example, unless all values are finite and fit the dtype."""
    most = LARGEST[dtype]
    if np.abs(array).max() <= most:  # false for NaN as well
        return
    place = tuple(np.argwhere(~(np.abs(array) <= most))[0])
    raise DminError(
        f"The array {name} holds {array[place]} for example {ids[place[0]]!r} at timestep"
        f" {layout.timesteps[place[2]]} (draw {place[1]}): only finite values up to {most:.6g} can"
        f" be stored as {dtype}. Look at this example, run the model in float32 if it runs in"
        " half precision, or leave the example out of the dataset."
    )
