"""Which blocks of a store a process computes: contiguous shards, and interleaved ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dmin.runtime.errors import DminError

_FILE = re.compile(r"shard-{0}-of-{0}\.rank-{0}-of-{0}(?:\.\w+)?\.json".format(r"([0-9]{1,9})"))


@dataclass(frozen=True, order=True)
class Shard:
    """One process's part of the work.

    A *shard* is a range of consecutive blocks, of any job that need not know of the others. The
    *ranks* of one job take the pending blocks of its shard in turn.

    Args:
        shard: number of the shard, from 0.
        shards: into how many the store is cut.
        rank: number of the process in its job, from 0.
        ranks: processes of the job.

    Raises:
        DminError: there is no such shard.
    """

    shard: int = 0
    shards: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        """Check the shard, which people set; the rank comes from whoever started the processes."""
        if self.shards < 1:
            raise DminError(f"shard.num={self.shards}: give the number of shards, 1 or more.")
        if not 0 <= self.shard < self.shards:
            raise DminError(
                f"shard.id={self.shard}, shard.num={self.shards}: shards are numbered from 0 to "
                f"{self.shards - 1}. Submit an array job with --array=0-{self.shards - 1}."
            )

    @property
    def name(self) -> str:
        """How the names of this process's files begin: ``shard-3-of-64.rank-0-of-2``."""
        return f"shard-{self.shard}-of-{self.shards}.rank-{self.rank}-of-{self.ranks}"

    @classmethod
    def named(cls, name: str) -> Shard | None:
        """Return the share of a worker's file; None if it has no such name, or there is none."""
        match = _FILE.fullmatch(name)
        shard, shards, rank, ranks = map(int, match.groups()) if match else (0, 0, 0, 0)
        return cls(shard, shards, rank, ranks) if shard < shards and rank < ranks else None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for its job."""
        return self.rank == 0

    @property
    def job(self) -> list[Shard]:
        """The shares of all processes of the job, in order of rank."""
        return [replace(self, rank=rank) for rank in range(self.ranks)]

    def range(self, units: int) -> range:
        """Return the shard's part of so many blocks (or rows): sizes differ by one at most."""
        first, last = (units * i // self.shards for i in (self.shard, self.shard + 1))
        return range(first, last)

    def pending(self, blocks: Sequence[int], units: int) -> list[int]:
        """Return those of the pending blocks, of so many in all, that belong to the shard."""
        mine = self.range(units)
        return [block for block in blocks if block in mine]

    def overlaps(self, other: Shard, units: int) -> bool:
        """Say whether two processes may do the same of so many blocks."""
        mine, theirs = self.range(units), other.range(units)
        together = max(mine.start, theirs.start) < min(mine.stop, theirs.stop)
        beside = (self.shard, self.shards, self.ranks) == (other.shard, other.shards, other.ranks)
        return together and not (beside and self.rank != other.rank)

    def __str__(self) -> str:
        """Name the share for people: ``shard 3 of 64, rank 0 of 2``; ``the whole``."""
        parts = [f"shard {self.shard} of {self.shards}"] if self.shards > 1 else []
        parts += [f"rank {self.rank} of {self.ranks}"] if self.ranks > 1 else []
        return ", ".join(parts) or "the whole"


WHOLE = Shard()  # all the work, by one process
