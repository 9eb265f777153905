"""Retrieval by several machines: each writes its part to a folder, the last one merges them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmin.runtime.files import commit, naming
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.formatting import spans

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method, Ranking
    from dmin.attribution.search.selection import Groups, Selection
    from dmin.cli.workspace.built import Built


def joined(
    work: Built,
    part: Ranking | Groups | None,
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    selection: Selection,
    k: int,
) -> Ranking | None:
    """Leave this job's part of a ranking; return the whole if all parts are there.

    Nobody waits: whoever finds that all are there has the answer. That is the last, or in a tie
    the last two, with the same answer.

    Args:
        work: the configuration.
        part: the ranking of this shard; None if it had no example to rank.
        queries: the queries.
        train: all training examples.
        method: of the scores.
        selection: of the examples.
        k: number of results.

    Raises:
        DminError: the folder of the parts cannot be written.
    """
    from dmin.attribution import Ranking, merged, ranked_groups
    from dmin.attribution.ranking_json import dump_ranking, load_ranking
    from dmin.attribution.search.selection import Groups

    question = {
        **{part: work.resolved(part) for part in ("method", "retrieve", "index")},
        "stores": [s.store.fingerprint for s in (*getattr(queries, "sides", [queries]), train)]
        + getattr(queries, "ids", []),  # how a Pool is pooled
        **({"metadata": train.store.metadata_digest} if train.store.metadata_digest else {}),
    }
    folder = work.outputs / "rankings" / f"{work.cfg.name}-{fingerprint(question)}"
    mine, shards = work.share.shard, work.share.shards
    files = [folder / f"part-{shard}-of-{shards}" for shard in range(shards)]
    content = (
        dump_ranking(part) if isinstance(part, Ranking) else b"" if part is None else part.dump()
    )
    with naming("keep a part of the ranking in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        commit(files[mine], content)
    if missing := [shard for shard, file in enumerate(files) if not file.is_file()]:
        work.console.print(
            f"part {mine} is in {folder}; {shards - len(missing)} of {shards} parts are there. The "
            f"job that ranks the last one (missing: {spans(missing)}) shows the answer.",
            soft_wrap=True,
        )
        return None
    files = [file for file in files if file.stat().st_size]  # empty: it had nothing to rank
    if selection.group_by is None:
        return merged([load_ranking(file) for file in files], k, selection.min_score)
    tallies = [Groups.load(file) for file in files]
    return ranked_groups(queries, train, tallies, method, k, selection)
