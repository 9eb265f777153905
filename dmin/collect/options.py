"""Options of :meth:`dmin.collect.GradientCollector.collect`."""

from dataclasses import dataclass
from pathlib import Path

from dmin.runtime.errors import DminError
from dmin.store.encoding import DTYPE
from dmin.store.writer import SEAL_SECONDS, SEGMENT_BYTES


@dataclass(frozen=True)
class CollectOptions:
    """How a dataset is collected into a store. None of it changes what a row means.

    Args:
        block_size: examples a block, the unit of work.
        dtype: of the stored rows: ``float32``, ``float16``, ``bfloat16``, ``int8`` (with a
            scale for each row and timestep) or ``int8_parts`` (for each 256 dimensions of one).
        segment_bytes: rows are sealed into a file when they take this many bytes …
        seal_seconds: … or when this much time has passed: the most that a kill can cost.
        workers: processes that load examples.
        encodings: folder for the encodings; ``<path>.encodings`` if none.
        keep_encodings: leave them there for other stores of the same data; otherwise those of
            the shard are deleted when its rows are sealed.
        shard: do only this one of …
        shards: … so many parts of the dataset. Others may do the others at any time, and
            anywhere this folder is seen: all write into the one store.
        as_queries: the examples are queries, which some models differentiate another way
            (``query_guidance``); it makes no difference for the others.
        wait: seconds to let another process finish that is at work on the same blocks.

    Raises:
        DminError: a number is out of range. The store checks ``dtype``, and a job its shard.
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
