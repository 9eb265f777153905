"""A ranking as JSON: versioned, with keys that have no spaces."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmin.attribution.ranking import PER_QUERY, Ranking
from dmin.attribution.ranking_rows import COUNTED, ERRORS, number, score_facts, score_of_passes
from dmin.runtime.errors import DminError

FORMAT, VERSION = "dmin-ranking", 3  # without these two a file is of version 1
# Fields of a ranking, by what a file calls them.
COUNTS = {"group_sizes": "examples", "at_least": "at_least"}
PARTS = {n: n for n in ("contributions", "group_contributions")}
PER_EXAMPLE = {**ERRORS, **COUNTS, **PARTS}


def document(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Return the ranking as JSON values, as `load_ranking` reads them."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": rankings[0].about,
        "rankings": [_document(each) for each in rankings],
    }


def _document(ranking: Ranking) -> dict[str, Any]:
    queries, k = ranking.scores.shape
    shares = ranking.order_shares
    centred = ranking.centred

    def query_of(query: int) -> dict[str, Any]:
        return {
            "id": ranking.query_ids[query],
            "metadata": ranking.query_metadata[query],
            **_of_query(ranking, query),
            **({} if shares is None else {"order_shares": _numbers(shares[query])}),
            "examples": [_example(ranking, query, rank, centred) for rank in range(k)],
        }

    return {
        "method": ranking.method,
        "order": ranking.order,
        "min_score": ranking.min_score,
        "group_by": ranking.group_by,
        "notes": [{"topic": topic, "text": text} for topic, text in ranking.notes.items()],
        "candidates": ranking.candidates,
        "sample": ranking.sample,
        "timesteps": list(ranking.timesteps),
        "blind": None if ranking.blind is None else list(ranking.blind),
        "groups": list(ranking.groups),
        "queries": [query_of(query) for query in range(queries)],
    }


def _of_query(ranking: Ranking, query: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PER_QUERY:
        if (value := getattr(ranking, name)) is not None:
            one = value[query]
            found[name] = (
                _numbers(one) if one.ndim else bool(one) if one.dtype == bool else number(one)
            )
    return found if ranking.same_as is None else {**found, "same_as": ranking.same_as[query]}


def _example(ranking: Ranking, query: int, rank: int, centred: np.ndarray | None) -> dict[str, Any]:
    found = {
        "rank": rank + 1,
        "id": ranking.train_ids[query][rank],
        "row": int(ranking.train_rows[query, rank]),
        "score": number(ranking.scores[query, rank]),
        **score_facts(ranking, query, rank),
        "metadata": ranking.train_metadata[query][rank],
    }
    if "repeats" in found["metadata"]:
        found["score_of_passes"] = score_of_passes(ranking, query, rank)
    counts = {key: getattr(ranking, name) for name, key in COUNTS.items()}
    found |= {n: int(v[query, rank]) for n, v in counts.items() if v is not None}
    if ranking.tied_copies is not None:
        found["tied_copies"] = ranking.tied_copies[query][rank]
    parts = {name: getattr(ranking, name) for name in PARTS} | {"centred": centred}
    return found | {n: _numbers(v[query, rank]) for n, v in parts.items() if v is not None}


def dump_ranking(ranking: Ranking) -> bytes:
    """Return the ranking as JSON text, for :func:`load_ranking`."""
    return json.dumps(document([ranking])).encode()


def load_ranking(path: str | Path) -> Ranking:
    """Read the ranking of one method back; arguments and errors as of :func:`load_rankings`.

    Raises:
        DminError: the file has those of several methods.
    """
    first, *others = load_rankings(path)
    if others:
        names = ", ".join(each.method for each in (first, *others))
        raise DminError(f"{path} has the rankings of {names}: read it with load_rankings.")
    return first


def load_rankings(path: str | Path) -> list[Ranking]:
    """Read the rankings of all methods in a file back.

    Args:
        path: a `ranking.json` of this version or of an earlier one, or the folder that
            `save_ranking` wrote.

    Raises:
        DminError: there is no such file, or it holds no ranking of a known version.
    """
    path = Path(path)
    path = path / "ranking.json" if path.is_dir() else path
    remedy = "name a ranking.json, or the folder that holds one"
    if not path.is_file():
        raise DminError(f"No ranking at {path}: {remedy}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"] if content.get("format") == FORMAT else content["schema"]
        if version not in range(1, VERSION + 1):
            raise DminError(
                f"{path} holds a ranking of version {version}, this dmin reads 1 to {VERSION}: "
                f"rank again, or read it with the version of dmin that wrote it."
            )
        if version == 1:
            return [_without_errors(_ranking(content, {}))]
        found = [_ranking(each, content["about"]) for each in content["rankings"]]
        return found if version == VERSION else [_without_errors(each) for each in found]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DminError(f"{path} is not a ranking ({error!r}): {remedy}.") from error


def _without_errors(old: Ranking) -> Ranking:
    """Drop the errors of a ranking of before version 3, which were not valid."""
    return replace(old, stability=None, tiers=None, tier_goes_on=None)


def _ranking(content: dict[str, Any], about: dict[str, str]) -> Ranking:
    queries, notes = content["queries"], content.get("notes", {})
    if isinstance(notes, list):
        notes = {note["topic"]: note["text"] for note in notes}
    found = [query["examples"] for query in queries]
    counts = {name: _parts(found, key) for name, key in COUNTED.items()}
    blind = content.get("blind")
    single = ("min_score", "group_by", "candidates", "sample")
    known: dict[str, Any] = {
        **{name: content.get(name) for name in single},
        **{name: _per_query(queries, name) for name in PER_QUERY},
        **{name: _parts(found, key) for name, key in PER_EXAMPLE.items()},
        **{name: None if v is None else v - 1 for name, v in counts.items()},
    }
    return Ranking(
        method=content["method"],
        order=content.get("order", "proponents"),
        notes=notes,
        about=about,
        timesteps=tuple(content["timesteps"]),
        groups=tuple(content.get("groups", ())),
        blind=None if blind is None else tuple(blind),
        query_ids=[query["id"] for query in queries],
        query_metadata=[query["metadata"] for query in queries],
        train_ids=[[e["id"] for e in row] for row in found],
        train_metadata=[[e["metadata"] for e in row] for row in found],
        train_rows=np.array([[e["row"] for e in row] for row in found], np.int64),
        scores=np.array([[e["score"] for e in row] for row in found], np.float32),
        tied_copies=_lists(found, "tied_copies"),
        same_as=[query["same_as"] for query in queries] if "same_as" in queries[0] else None,
        **known,
    )


def _parts(found: list[list[dict[str, Any]]], name: str) -> np.ndarray | None:
    """Return a field of the examples of a saved ranking, [Q, K, …], or None."""
    if name not in found[0][0]:
        return None
    return np.array([[example[name] for example in row] for row in found])


def _lists(found: list[list[dict[str, Any]]], name: str) -> list[list[Any]] | None:
    return [[e[name] for e in row] for row in found] if name in found[0][0] else None


def _per_query(queries: list[dict[str, Any]], name: str) -> np.ndarray | None:
    return np.array([each[name] for each in queries]) if name in queries[0] else None


def _numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, which has no NaN."""
    return [number(value) if np.isfinite(value) else None for value in values]


def plain(value: Any) -> Any:
    """Convert numpy scalars and arrays for JSON, and anything else to text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
