"""Reading a store, without loading it."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.shown import Shown
from dmin.store.amendments import read_forgotten, read_metadata, removed_rows, tombstone
from dmin.store.catalog import Catalog
from dmin.store.encoding import decode, word_sums
from dmin.store.manifest import Layout, Manifest, require_count
from dmin.store.rows import (
    MappedRows,
    Metadata,
    SmallArrays,
    last_complete,
    parsed,
    parsed_ids,
    places,
    require_distinct,
)
from dmin.store.segments import Segment, read_manifest, segment_names


class Block(NamedTuple):
    """Consecutive rows of a store, from row ``start`` on; features and norms are float32."""

    start: int
    features: np.ndarray
    norms: np.ndarray


class Store(Shown):
    """Read a store; rows are the examples present, in the order of the dataset.

    Segments are memory-mapped when their features are read, and must not be truncated while they
    are. A store may have thousands of segments, and may be pickled.

    Args:
        path: the directory.
        verify: compare the digest of every new or changed segment with its name, and every row
            that is read with its checksum, see :mod:`dmin.store.catalog`. Turn it off only to open
            a store a second time in the same run.
        growing: if examples are being appended, show the new revision as far as it is written;
            otherwise show the last complete revision.

    Raises:
        DminError: there is no store, or one of its files is damaged or from another store.
    """

    def __init__(
        self, path: str | os.PathLike[str], verify: bool = True, growing: bool = False
    ) -> None:
        """Read the manifest and find out where every row is."""
        self.path: Path = Path(path)
        # Listed before the manifest is read, so that the manifest knows the revision of each.
        names = segment_names(self.path) if self.path.is_dir() else []
        self.planned: Manifest = read_manifest(self.path)
        self._catalog = catalog = Catalog.of(self.path, self.planned, verify, names=names)
        blocks = np.concatenate([np.empty(0, np.int64), *catalog.blocks])
        self.manifest: Manifest = self.planned if growing else last_complete(self.planned, blocks)
        place, self._held = places(self.planned, blocks, self.manifest.num_examples)
        self.duplicate_blocks: int = len(blocks) - len(np.unique(blocks))
        missing = np.setdiff1d(np.arange(self.manifest.num_blocks), blocks)
        self.missing_blocks: list[int] = missing.tolist()
        removals, removed = removed_rows(self.path, self.manifest)
        self.removals: list[str] = removals
        self.forgotten: frozenset[str] = read_forgotten(self.path)
        place[removed := removed[removed < len(place)]] = -1
        self.removed: int = len(removed)
        self.positions: np.ndarray = np.flatnonzero(place >= 0)  # of the rows, in the dataset
        self._place = place[self.positions]  # of the rows, in the catalog
        files = [each.path for each in self.segments]
        self.mapped: MappedRows = MappedRows(files, self.layout, catalog["rows"], self._place)
        self._small: SmallArrays = SmallArrays(catalog, self._place)

    @property
    def segments(self) -> list[Segment]:
        """The sealed files, by name."""
        pairs = zip(self._catalog.names, self._catalog.blocks, strict=True)
        return [Segment(self.path / name, blocks) for name, blocks in pairs]

    def __len__(self) -> int:
        """Return the number of rows present."""
        return len(self.positions)

    def facts(self) -> dict[str, Any]:
        """Return its path, how much of it is complete, and the axes of its features."""
        of = "" if self.complete else f" of {self.manifest.num_examples:,}"
        return {
            "path": self.path,
            "examples": f"{len(self):,}{of}",
            "readouts": ", ".join(self.layout.readouts),
            "shape": tuple(self.layout.row_shape),
            "dtype": self.layout.dtype,
        }

    @property
    def layout(self) -> Layout:
        """The axes of the features."""
        return self.manifest.layout

    @property
    def fingerprint(self) -> str:
        """Equal if segments and removals are the same: whatever is derived from rows is valid."""
        end = self.manifest.num_blocks
        names = [each.path.name for each in self.segments if (each.blocks < end).any()]
        fields = {"manifest": self.manifest.fingerprint, "segments": names}
        return fingerprint({**fields, "removed": self.removals} if self.removals else fields)

    @property
    def complete(self) -> bool:
        """Whether every example of the dataset has a row, except those that were removed."""
        return not self.missing_blocks

    def require_complete(self) -> None:
        """Raise DminError unless the store is ``complete``."""
        if not self.complete:
            raise DminError(
                f"The store {self.path} holds {len(self)} of {self.manifest.num_examples} rows"
                f" ({len(self.missing_blocks)} of {self.manifest.num_blocks} blocks are missing):"
                " run the same `dmin collect` command again, it resumes where it stopped."
            )

    @cached_property
    def ids(self) -> list[str]:
        """The example ids, one for each row."""
        all_ids = self._all_ids()
        ids = [all_ids[place] for place in self._place.tolist()]
        return require_distinct(ids, self.path)

    @property
    def changed(self) -> bool:
        """Whether examples were appended or removed after the first collection."""
        return bool(self.manifest.revisions or self.removals or self.forgotten)

    def removed_among(self, ids: Iterable[str]) -> list[str]:
        """Return those of the ids that were removed from this store or from its sources."""
        held = set(self._held_ids()) if self.removed else set()
        gone = (id for id in ids if id not in self._row_of)
        return [id for id in gone if id in held or tombstone(id) in self.forgotten]

    def _all_ids(self) -> list[str]:
        return parsed_ids(self._catalog.lines("ids"), self.path)

    def _held_ids(self) -> list[str]:  # including removed ones, without those not yet complete
        return list(compress(self._all_ids(), self._held))

    @cached_property
    def metadata(self) -> Metadata:
        """The metadata (label, caption, file ...), one mapping per row."""
        kept = self._catalog.lines("metadata")
        return Metadata(kept, self._place, self._renewed[1], self.positions)

    @cached_property
    def _renewed(self) -> tuple[str, list[bytes]]:
        return read_metadata(self.path, self.manifest)

    @property
    def metadata_digest(self) -> str:
        """Digest of the metadata if they were renewed after collection; else empty."""
        return self._renewed[0]

    def collected_metadata(self) -> dict[str, dict[str, Any]]:
        """Return the metadata as collected, by id, including those of removed examples."""
        lines = compress(self._catalog.lines("metadata"), self._held)
        return {id: parsed(line) for id, line in zip(self._held_ids(), lines, strict=True)}

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
        wanted = self._wanted(readout, indices)
        scales = self.scales(readout)
        chosen = None if scales is None else scales[wanted]
        return decode(self.gather(readout, wanted), self.layout.dtype, chosen)

    def gather(self, readout: str, indices: np.ndarray) -> np.ndarray:
        """Return chosen rows as they are stored, ``[n, draw, T, group, dim]``.

        All are requested from the disk at once, then compared with their checksums.

        Raises:
            DminError: a row differs from what was sealed.
        """
        result = self.mapped.gather(readout, indices)
        sums = self.sums(readout)
        if sums is not None and (wrong := word_sums(result) != sums[indices]).any():
            raise self.corrupt(readout, int(np.asarray(indices)[np.argmax(wrong)]))
        return result

    def sums(self, readout: str) -> np.ndarray | None:
        """Return the checksums of the rows, uint32 ``[n]``, or None if nothing was verified."""
        return self._whole("sums", readout) if f"sums/{readout}" in self._catalog else None

    def corrupt(self, readout: str, row: int) -> DminError:
        """Return the error that says that a row differs from what was sealed."""
        file = self.mapped.files[self.mapped.segment[row]]
        return DminError(
            f"Row {row} ({readout!r} of example {self.ids[row]!r}) of {file} differs from what was "
            f"sealed and verified: a bit has flipped on disk or in memory. No score was computed "
            f"from it. Run `dmin store verify {self.path}`: if it lists the file, delete it, run "
            f"the same `dmin collect` command again; if not, test this machine's memory."
        )

    def scales(self, readout: str) -> np.ndarray | None:
        """Return the scales of int8 features, float32 ``[n, *layout.scale_shape]``, or None."""
        return None if self.layout.scale_shape is None else self._whole("scales", readout)

    def lengths(self, readout: str) -> np.ndarray:
        """Return ‖row‖₂ over group and dim of the features read back, float32 ``[n, draw, T]``."""
        return self._whole("lengths", readout)

    def inverse_lengths(self, readout: str) -> np.ndarray:
        """Return ``1 / max(lengths, 1e-12)``, float32 ``[n, draw, T]``."""
        return self._whole("inverse lengths", readout)

    def norms(self, readout: str) -> np.ndarray:
        """Return the gradients' norms before normalising, float32 ``[n, draw, T, group]``."""
        return self._whole("norms", readout)

    def losses(self) -> np.ndarray:
        """Return the losses, float32 ``[n, draw, T]``."""
        return self._whole("losses", None)

    def blocks(self, readout: str, rows: int = 1024) -> Iterator[Block]:
        """Yield the whole store, ``rows`` rows at a time, reading only what is yielded."""
        require_count("rows", rows)
        for start in range(0, len(self), rows):
            norms = self.norms(readout)[start : start + rows]
            yield Block(start, self.features(readout, start, start + rows), norms)

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
        if readout is None:
            return self._small[kind]
        self._require(readout)
        return self._small[f"{kind}/{readout}"]

    def _require(self, readout: str) -> None:
        if readout not in self.layout.readouts:
            has = ", ".join(self.layout.readouts)
            raise DminError(f"The store {self.path} has no readout {readout!r}: it has {has}.")

    def _wanted(self, readout: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        self._require(readout)
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise DminError(f"The store {self.path} has no row {outside}: it has {len(self)}.")
        return wanted
