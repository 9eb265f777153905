"""A ranking as tidy rows: for files, for pandas, and shown in a notebook."""

from importlib import import_module
from typing import Any

import numpy as np

from dmin.runtime.escape import named_apart
from dmin.runtime.shown import Shown, table

CORE_COLUMNS = (
    *("method", "query", "rank", "id", "row", "score", "sketch_error", "total_error", "stability"),
    *("maximum", "score_of_passes", "percentile", "tier", "copy_of", "group", "examples"),
)
# What files call fields of a ranking; those of the second count from 1.
ERRORS = {"sketch_errors": "sketch_error", "total_errors": "total_error", "stability": "stability"}
COUNTED = {"tiers": "tier", "copy_of": "copy_of"}
_SHOWN = 5  # queries and examples that a notebook gets


class Tabular(Shown):
    """The tabular form of a :class:`~dmin.attribution.ranking.Ranking`."""

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``, a row for each query and rank, as ``ranking.csv`` has it.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return import_module("pandas").DataFrame(records(self))

    def facts(self) -> dict[str, Any]:
        """Return method, size and scale."""
        found: Any = self
        queries, k = found.scores.shape
        size = {"queries": queries, "k": k, "candidates": found.candidates}
        scale = f"{found.scores.min():.4g} … {found.scores.max():.4g}"
        return {"method": found.method, **size, "scores": scale}

    def _repr_html_(self) -> str:
        found: Any = self
        shown = range(min(_SHOWN, found.scores.shape[1]))
        rows = [
            (name, *(f"{found.train_ids[q][k]}: {found.scores[q, k]:.4g}" for k in shown))
            for q, name in enumerate(found.query_ids[:_SHOWN])
        ]
        return table([(repr(self), *(k + 1 for k in shown)), *rows])


def records(ranking: Any) -> list[dict[str, Any]]:
    """Return the ranking as tidy rows, one for each query and rank.

    Returns:
        Dicts with the same keys in the same order: query, rank (from 1), id, row, score; where they
        are known errors, stability, the maximum possible, percentile, tier (from 1) and the rank
        of the first example with the same pixels; group and the number of its examples where groups
        are ranked, the metadata of the training example, the metadata of the query under
        `query_<key>`, the timesteps, and the groups of parameters under `group_<name>`. A metadata
        key that would hide one of these becomes `metadata_<key>`.
    """
    times = ranking.timestep_names if ranking.contributions is not None else []
    query_keys = _keys(ranking.query_metadata)
    train_keys = _keys([example for row in ranking.train_metadata for example in row])
    groups = [f"group_{name}" for name in ranking.groups]
    taken = {*CORE_COLUMNS, *times, *groups, *(f"query_{key}" for key in query_keys)}
    columns = named_apart(train_keys, taken)
    records = []
    for query, rank in ranking.places():
        example, origin = ranking.train_metadata[query][rank], ranking.query_metadata[query]
        record: dict[str, Any] = {
            "query": ranking.query_ids[query],
            "rank": rank + 1,
            "id": ranking.train_ids[query][rank],
            "row": int(ranking.train_rows[query, rank]),
            "score": number(ranking.scores[query, rank]),
            **score_facts(ranking, query, rank),
            **_group(ranking, query, rank),
        }
        if "repeats" in train_keys:
            record["score_of_passes"] = score_of_passes(ranking, query, rank)
        record |= {column: example.get(key) for key, column in columns.items()}
        record |= {f"query_{key}": origin.get(key) for key in query_keys}
        if ranking.contributions is not None:
            parts = ranking.contributions[query, rank]
            record |= {name: number(part) for name, part in zip(times, parts, strict=True)}
        if ranking.group_contributions is not None:
            parts = ranking.group_contributions[query, rank]
            record |= {name: number(part) for name, part in zip(groups, parts, strict=True)}
        records.append(record)
    return records


def _group(ranking: Any, query: int, rank: int) -> dict[str, Any]:
    if ranking.group_by is None:
        return {}
    value = ranking.train_metadata[query][rank].get(ranking.group_by)
    size = (
        {} if ranking.group_sizes is None else {"examples": int(ranking.group_sizes[query, rank])}
    )
    return {"group": value, **size}


def score_of_passes(ranking: Any, query: int, rank: int) -> float | None:
    """Return the score times the example's repeats in an epoch, if known."""
    passes = ranking.train_metadata[query][rank].get("repeats", 1)
    score = ranking.scores[query, rank]
    return number(score * passes) if isinstance(passes, int | float) else None


def score_facts(ranking: Any, query: int, rank: int) -> dict[str, Any]:
    """Return further facts of a score; ranks and tiers count from 1."""
    known = {key: getattr(ranking, name) for name, key in ERRORS.items()}
    found: dict[str, Any] = {n: number(v[query, rank]) for n, v in known.items() if v is not None}
    if ranking.maximum is not None:
        found["maximum"] = number(ranking.maximum[query])
    if (percentile := ranking.percentile(query, rank)) is not None:
        found["percentile"] = round(percentile, 7)
    counted = {key: getattr(ranking, name) for name, key in COUNTED.items()}
    return found | {n: int(v[query, rank]) + 1 for n, v in counted.items() if v is not None}


def _keys(metadata: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for example in metadata for key in example))


def number(value: Any) -> float:
    """Return the shortest decimal that reads back as the same float32: .9, not .8999999762."""
    return float(str(np.float32(value)))
