"""Retrieval by several machines: each leaves its part in a folder, the last makes the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmin.runtime.files import commit, os_failure
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.formatting import spans
from dmin.workers.shard import Shard

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method, Ranking
    from dmin.attribution.search.selection import Groups, Selection
    from dmin.cli.workspace.built import Built


class Parts:
    """The parts of one answer, in a folder that all machines see.

    Nobody waits: whoever finds that all are there has the answer. That is the last, or in a tie
    the last two, with the same answer.

    Args:
        folder: of this question; its name carries a fingerprint of all that the answer depends on.
        share: of this process.
    """

    def __init__(self, folder: Path, share: Shard) -> None:
        self.folder, self.share = folder, share

    def save(self, part: bytes) -> None:
        """Leave this process's part; empty where it had nothing to rank.

        Raises:
            DminError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            commit(self._file(self.share.shard), part)
        except OSError as error:
            raise os_failure("keep a part of the ranking in", self.folder, error) from error

    def missing(self) -> list[int]:
        """Return the shards whose part is not there."""
        return [i for i in range(self.share.shards) if not self._file(i).is_file()]

    def files(self) -> list[Path]:
        """Return the parts that have anything."""
        files = [self._file(shard) for shard in range(self.share.shards)]
        return [file for file in files if file.stat().st_size]

    def told(self) -> str:
        """Say what is there and what is not."""
        missing = self.missing()
        there = self.share.shards - len(missing)
        return (
            f"part {self.share.shard} is in {self.folder}; {there} of {self.share.shards} parts "
            f"are there. Whoever makes the last (now missing: {spans(missing)}) shows the answer."
        )

    def _file(self, shard: int) -> Path:
        return self.folder / f"part-{shard}-of-{self.share.shards}"


def joined(
    work: Built,
    part: Ranking | Groups | None,
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    selection: Selection,
) -> Ranking | None:
    """Leave this job's part of a ranking; return the whole if all parts are there.

    Args:
        work: the configuration.
        part: what this shard found; None if it had no example to rank.
        queries: the queries.
        train: all training examples.
        method: how they were scored.
        selection: how they were chosen.
    """
    from dmin.attribution import Ranking, merged, ranked_groups
    from dmin.attribution.ranking_files import dump_ranking, load_ranking
    from dmin.attribution.search.selection import Groups

    question = {
        **work.resolved("method", "retrieve", "index"),
        "stores": [queries.store.fingerprint, train.store.fingerprint],
    }
    folder = work.outputs / "rankings" / f"{work.cfg.name}-{fingerprint(question)}"
    parts = Parts(folder, work.share)
    if isinstance(part, Ranking):
        parts.save(dump_ranking(part))
    else:
        parts.save(b"" if part is None else part.dump())
    if parts.missing():
        work.console.print(parts.told(), soft_wrap=True)
        return None
    k, files = work.cfg.retrieve.k, parts.files()
    if selection.group_by is None:
        return merged([load_ranking(file) for file in files], k, selection.min_score)
    tallies = [Groups.load(file) for file in files]
    return ranked_groups(queries, train, tallies, method, k, selection)
