"""Options of :meth:`dmin.collect.GradientCollector.collect`."""

from dataclasses import dataclass
from pathlib import Path

from dmin.runtime.errors import DminError
from dmin.store.encoding import DTYPE
from dmin.store.writer import SEAL_SECONDS, SEGMENT_BYTES


@dataclass(frozen=True)
class CollectOptions:
    """Options of collecting a dataset into a store. None of them changes what a row means.

    Args:
        block_size: examples per block, the unit of work.
        dtype: of the stored rows: ``float32``, ``float16``, ``bfloat16``, ``int8`` (with a scale
            for each row and timestep) or ``int8_parts`` (for each 256 dimensions of one).
        segment_bytes: rows are sealed into a file when they take this many bytes.
        seal_seconds: or after this time, which limits the loss by a kill.
        workers: processes that load examples.
        encodings: folder of the cached encodings; ``<path>.encodings`` if None.
        keep_encodings: keep them for other stores of the same data; otherwise those of the shard
            are deleted when its rows are sealed.
        shard: number of the shard to collect.
        shards: number of shards of the dataset. Other shards may be collected at any time, on any
            machine that shares the folder: all write into one store.
        as_queries: the examples are queries, whose loss differs in some models
            (``query_guidance``).
        wait: seconds to wait for another process that works on the same blocks.

    Raises:
        DminError: a number is out of range. ``dtype`` is checked by the store, the shard by the
            job.
    """

    block_size: int = 32
    dtype: str = DTYPE
    segment_bytes: int = SEGMENT_BYTES
    seal_seconds: float = SEAL_SECONDS
    workers: int = 0
    encodings: str | Path | None = None
    keep_encodings: bool = False
    shard: int = 0
    shards: int = 1
    as_queries: bool = False
    wait: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"block_size": 1, "segment_bytes": 1, "seal_seconds": 0, "workers": 0, "wait": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise DminError(f"collect.{name}={getattr(self, name)}: give {bound} or more.")
