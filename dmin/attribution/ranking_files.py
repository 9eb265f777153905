"""A ranking in files: CSV, Parquet, and beside them its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dmin.attribution.ranking import Ranking
from dmin.attribution.ranking_json import document, number, plain, score_facts, score_of_passes
from dmin.runtime.escape import named_apart, write_csv

CORE_COLUMNS = (
    *("method", "query", "rank", "id", "row", "score", "sketch_error", "total_error", "stability"),
    *("maximum", "score_of_passes", "percentile", "tier", "copy_of", "group", "examples"),
)


def records(ranking: Ranking) -> list[dict[str, Any]]:
    """Lay the ranking out as tidy rows, one for each query and rank.

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


def _group(ranking: Ranking, query: int, rank: int) -> dict[str, Any]:
    if ranking.group_by is None:
        return {}
    value = ranking.train_metadata[query][rank].get(ranking.group_by)
    size = (
        {} if ranking.group_sizes is None else {"examples": int(ranking.group_sizes[query, rank])}
    )
    return {"group": value, **size}


def save_ranking(ranking: Ranking | Sequence[Ranking], folder: str | Path) -> Path:
    """Write `ranking.csv` (one line for each query and rank) and `ranking.json`.

    With pyarrow installed, `ranking.parquet` holds the lines as well, their types kept.

    Args:
        ranking: the answer, or those of several methods to the same queries: then each line says
            its method.
        folder: made if it is not there.

    Returns:
        The folder.
    """
    rankings = [ranking] if isinstance(ranking, Ranking) else list(ranking)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {**({"method": each.method} if len(rankings) > 1 else {}), **line}
        for each in rankings
        for line in records(each)
    ]
    cells = ({key: _cell(value) for key, value in line.items()} for line in lines)
    write_csv(folder / "ranking.csv", cells)
    _save_parquet(lines, folder / "ranking.parquet")
    text = json.dumps(document(rankings), ensure_ascii=False, indent=1, default=plain)
    (folder / "ranking.json").write_text(text + "\n", encoding="utf-8")
    return folder


def _keys(metadata: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for example in metadata for key in example))


def _cell(value: Any) -> Any:
    nested = isinstance(value, dict | list | tuple)
    return json.dumps(value, ensure_ascii=False, default=plain) if nested else value


def _save_parquet(records: list[dict[str, Any]], path: Path) -> None:
    """Write the lines with their types, if pyarrow is there; mixed columns become text."""
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        return
    columns = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [_cell(record.get(name)) for record in records]
        if len({type(value) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    parquet.write_table(pyarrow.table(columns), path)
