"""A ranking in files: CSV, JSON and Parquet."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmin.attribution.ranking import Ranking
from dmin.runtime.errors import DminError
from dmin.runtime.escape import write_csv

SCHEMA = 1
CORE_COLUMNS = ("query", "rank", "id", "row", "score", "error", "stability", "group", "examples")


def records(ranking: Ranking) -> list[dict[str, Any]]:
    """Lay the ranking out as tidy rows, one for each query and rank.

    Returns:
        Dicts with the same keys in the same order: query, rank (from 1), id, row, score, error and
        stability where they are known, group and the number of its examples where groups are
        ranked, the metadata of the training example, the metadata of the query under
        `query_<key>`, the timesteps, and the groups of parameters under `group_<name>`. A metadata
        key that would hide one of these becomes `metadata_<key>`.
    """
    times = ranking.timestep_names if ranking.contributions is not None else []
    query_keys = _keys(ranking.query_metadata)
    train_keys = _keys([example for row in ranking.train_metadata for example in row])
    groups = [f"group_{name}" for name in ranking.groups]
    taken = {*CORE_COLUMNS, *times, *groups, *(f"query_{key}" for key in query_keys)}
    columns = {key: f"metadata_{key}" if key in taken else key for key in train_keys}
    records = []
    for query, rank in ranking.places():
        example, origin = ranking.train_metadata[query][rank], ranking.query_metadata[query]
        record: dict[str, Any] = {
            "query": ranking.query_ids[query],
            "rank": rank + 1,
            "id": ranking.train_ids[query][rank],
            "row": int(ranking.train_rows[query, rank]),
            "score": _number(ranking.scores[query, rank]),
            **_confidence(ranking, query, rank),
            **_group(ranking, query, rank),
        }
        record |= {column: example.get(key) for key, column in columns.items()}
        record |= {f"query_{key}": origin.get(key) for key in query_keys}
        if ranking.contributions is not None:
            parts = ranking.contributions[query, rank]
            record |= {name: _number(part) for name, part in zip(times, parts, strict=True)}
        if ranking.group_contributions is not None:
            parts = ranking.group_contributions[query, rank]
            record |= {name: _number(part) for name, part in zip(groups, parts, strict=True)}
        records.append(record)
    return records


def _confidence(ranking: Ranking, query: int, rank: int) -> dict[str, float]:
    known = {"error": ranking.errors, "stability": ranking.stability}
    return {n: _number(v[query, rank]) for n, v in known.items() if v is not None}


def _group(ranking: Ranking, query: int, rank: int) -> dict[str, Any]:
    if ranking.group_by is None:
        return {}
    value = ranking.train_metadata[query][rank].get(ranking.group_by)
    size = (
        {} if ranking.group_sizes is None else {"examples": int(ranking.group_sizes[query, rank])}
    )
    return {"group": value, **size}


def save_ranking(ranking: Ranking, folder: str | Path) -> Path:
    """Write `ranking.csv` (one line for each query and rank) and `ranking.json`.

    With pyarrow installed, `ranking.parquet` holds the lines as well, their types kept.

    Args:
        ranking: the answer.
        folder: made if it is not there.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = records(ranking)
    cells = ({key: _cell(value) for key, value in line.items()} for line in lines)
    write_csv(folder / "ranking.csv", cells)
    _save_parquet(lines, folder / "ranking.parquet")
    text = json.dumps(document(ranking), ensure_ascii=False, indent=1, default=_plain)
    (folder / "ranking.json").write_text(text + "\n", encoding="utf-8")
    return folder


def document(ranking: Ranking) -> dict[str, Any]:
    """Return all of it as JSON values, as `load_ranking` reads them."""

    def example(query: int, rank: int) -> dict[str, Any]:
        found = {
            "id": ranking.train_ids[query][rank],
            "row": int(ranking.train_rows[query, rank]),
            "score": _number(ranking.scores[query, rank]),
            **_confidence(ranking, query, rank),
            "metadata": ranking.train_metadata[query][rank],
        }
        if ranking.group_sizes is not None:
            found["examples"] = int(ranking.group_sizes[query, rank])
        if ranking.contributions is not None:
            found["contributions"] = [_number(c) for c in ranking.contributions[query, rank]]
        if ranking.group_contributions is not None:
            parts = ranking.group_contributions[query, rank]
            found["group_contributions"] = [_number(part) for part in parts]
        return found

    queries, k = ranking.scores.shape
    return {
        "schema": SCHEMA,
        "method": ranking.method,
        "order": ranking.order,
        "min_score": ranking.min_score,
        "group_by": ranking.group_by,
        "notes": ranking.notes,
        "timesteps": list(ranking.timesteps),
        "groups": list(ranking.groups),
        "queries": [
            {
                "id": ranking.query_ids[query],
                "metadata": ranking.query_metadata[query],
                "examples": [example(query, rank) for rank in range(k)],
            }
            for query in range(queries)
        ],
    }


def dump_ranking(ranking: Ranking) -> bytes:
    """Return all of it as JSON, for :func:`load_ranking` of a file with that content."""
    return json.dumps(document(ranking)).encode()


def load_ranking(path: str | Path) -> Ranking:
    """Read a ranking back.

    Args:
        path: a `ranking.json`, or the folder that `save_ranking` wrote.

    Raises:
        DminError: there is no such file, or it holds no ranking of this version.
    """
    path = Path(path)
    path = path / "ranking.json" if path.is_dir() else path
    remedy = "name a ranking.json, or the folder that holds one"
    if not path.is_file():
        raise DminError(f"No ranking at {path}: {remedy}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise DminError(
                f"{path} holds a ranking of schema {content['schema']}, this dmin reads "
                f"{SCHEMA}: rank again, or read it with the dmin that wrote it."
            )
        queries = content["queries"]
        found = [query["examples"] for query in queries]
        return Ranking(
            method=content["method"],
            order=content.get("order", "proponents"),
            min_score=content.get("min_score"),
            notes=content.get("notes", {}),
            timesteps=tuple(content["timesteps"]),
            query_ids=[query["id"] for query in queries],
            query_metadata=[query["metadata"] for query in queries],
            train_rows=np.array([[e["row"] for e in row] for row in found], np.int64),
            train_ids=[[e["id"] for e in row] for row in found],
            train_metadata=[[e["metadata"] for e in row] for row in found],
            scores=np.array([[e["score"] for e in row] for row in found], np.float32),
            contributions=_parts(found, "contributions"),
            groups=tuple(content.get("groups", ())),
            group_contributions=_parts(found, "group_contributions"),
            errors=_parts(found, "error"),
            stability=_parts(found, "stability"),
            group_by=content.get("group_by"),
            group_sizes=_parts(found, "examples"),
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DminError(f"{path} is not a ranking ({error!r}): {remedy}.") from error


def _parts(found: list[list[dict[str, Any]]], name: str) -> np.ndarray | None:
    """Return what the examples of a saved ranking say under a name, [Q, K, …], or None."""
    if name not in found[0][0]:
        return None
    return np.array([[example[name] for example in row] for row in found], np.float32)


def _number(value: Any) -> float:
    """Take the shortest decimal that reads back as the same float32: .9, not .8999999762."""
    return float(str(np.float32(value)))


def _keys(metadata: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for example in metadata for key in example))


def _plain(value: Any) -> Any:
    """Let numpy scalars and arrays into JSON, and anything else as its text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _cell(value: Any) -> Any:
    nested = isinstance(value, dict | list | tuple)
    return json.dumps(value, ensure_ascii=False, default=_plain) if nested else value


def _save_parquet(records: list[dict[str, Any]], path: Path) -> None:
    """Write the lines with their types, if pyarrow is there; mixed columns become text."""
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        return
    columns = {}
    for name in records[0]:
        values = [_cell(record[name]) for record in records]
        if len({type(value) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    parquet.write_table(pyarrow.table(columns), path)
