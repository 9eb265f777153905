"""Predict the cost of a collection: disk space first, time and memory after two passes."""

import os
import shutil
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from dmin.collect.collector import Collector
from dmin.collect.encodings_cache import Encoded
from dmin.collect.peak_memory import peak_bytes
from dmin.diffusion.inputs import NoisedBatch
from dmin.runtime.errors import DminError
from dmin.runtime.formatting import byte_size, span
from dmin.store import StoreWriter


class Cost(NamedTuple):
    """The predicted cost of collecting the whole dataset on this device."""

    examples: int
    seconds: float  # in one process, loading and encoding not counted
    store_bytes: int
    encoding_bytes: int  # on disk meanwhile
    extra_bytes: int
    extra_meaning: str


def row_bytes(collector: Collector, dtype: str) -> int:
    """Return the bytes of one example in a store: rows, scales, norms and losses.

    Args:
        collector: that defines the axes of the rows.
        dtype: of the rows, as in :class:`~dmin.collect.options.CollectOptions`.
    """
    layout = collector.layout(dtype)
    shape, scales = layout.row_shape, layout.scale_shape
    smaller = prod(shape[:3]) + (0 if scales is None else prod(scales))
    per_readout = layout.row_bytes + 4 * smaller
    return len(collector.readouts) * per_readout + 4 * prod(shape[:2])


def encoding_bytes(encoded: Sequence[Encoded], examples: int) -> float:
    """Return the bytes of one example's encodings, as a mean over some."""
    tensors = [x for x0, condition in encoded for x in (x0, *condition.values())]
    return sum(x.nbytes for x in tensors) / examples


def rows_left(collector: Collector, store: StoreWriter) -> dict[str, tuple[Path, int]]:
    """Return the bytes that a store will still take, by all of its writers."""
    manifest = store.manifest
    examples = sum(len(manifest.block_rows(block)) for block in store.pending())
    return {"rows": (store.path, examples * row_bytes(collector, manifest.layout.dtype))}


def require_space(needs: Mapping[str, tuple[Path, int]]) -> str:
    """Check that the disks have space for what will be written; return a description.

    Args:
        needs: name -> its folder, which may not exist yet, and its bytes.

    Raises:
        DminError: a disk is too small; folder, needed and free space and a remedy are named.
    """
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for what, (folder, size) in needs.items():
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        disks.setdefault(os.stat(place).st_dev, []).append((what, place, size))
    told = []
    for parts in disks.values():
        place, needed = parts[0][1], sum(size for *_, size in parts)
        disk = shutil.disk_usage(place)
        shares = " and ".join(f"{byte_size(size)} of {what}" for what, _, size in parts)
        if disk.total and disk.free < needed:  # some file systems say nothing of themselves
            raise DminError(
                f"{place} has {byte_size(disk.free)} free, and {byte_size(needed)} are needed "
                f"there: {shares}. Free some space, use a folder on another disk (collect.path "
                f"or paths.outputs for rows, collect.encodings for encodings), or store less for "
                f"each example: collect.dtype=int8, a lower sketch.dim or timesteps.num."
            )
        told.append(f"{shares} (free: {byte_size(disk.free)})")
    return ", ".join(told)


class Forecast:
    """Times passes until one repeats an earlier kind, without checks and first calls.

    Args:
        pairs: of example, timestep and draw to be computed.
        device: that computes them.
    """

    def __init__(self, pairs: int, device: torch.device) -> None:
        self.pairs = pairs
        self.device = device
        self.text: str | None = None  # what all passes take, once it is known
        self._kinds: set[Hashable] = set()

    @contextmanager
    def timed(self, batch: NoisedBatch) -> Iterator[None]:
        """Time a pass, waiting for the GPU until the rate is known."""
        kind: Hashable = (len(batch.t), *batch.x0.shape[1:])
        if self.text is not None or kind not in self._kinds:
            yield
            self._kinds.add(kind)
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        seconds = (time.perf_counter() - start) * self.pairs / len(batch.t)
        memory = byte_size(peak_bytes(self.device))
        of = "GPU memory" if self.device.type == "cuda" else "memory"
        self.text = f"about {span(seconds)} by the time of a pass; {memory} of {of} so far"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
