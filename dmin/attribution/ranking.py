"""The answer to *which training examples made this image?*, as one table that is easy to keep."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmin.errors import DminError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SCHEMA = 1
CORE_COLUMNS = ("query", "rank", "id", "row", "score", "error", "stability")


@dataclass(frozen=True, eq=False)
class Ranking:
    """The top-k training examples of each query, best first.

    Q queries, K training examples a query, T timesteps, G groups of parameters.

    Args:
        method: name of the attribution method.
        timesteps: the T timesteps, in the order of `contributions`.
        query_ids: Q distinct names.
        query_metadata: one small JSON dict a query: label and provenance.
        train_rows: int64 [Q, K], rows of the training store.
        train_ids: [Q][K] names of the training examples.
        train_metadata: [Q][K] small JSON dicts, typically label, caption, file.
        scores: float32 [Q, K], descending along K, in the units of the method.
        contributions: float32 [Q, K, T], what each timestep adds to the score, or None.
        groups: names of the G groups, none if they were not told apart.
        group_contributions: float32 [Q, K, G], what each group adds to the score, or None.
        errors: float32 [Q, K], one standard error of each score, or None; see
            `dmin.attribution.confidence`.
        stability: float32 [Q, K], how probably each example is among the first K, or None.
        order: "proponents", or "opponents" for scores that ascend along K.
        min_score: what lies below it (opponents: above its opposite) is not part of the answer,
            and only there because queries have different numbers of answers.
        notes: what else there is to say, such as how the answer was found.

    Raises:
        DminError: a part disagrees with the others in shape, order or sum.
    """

    method: str
    timesteps: tuple[float, ...]
    query_ids: list[str]
    query_metadata: list[dict[str, Any]]
    train_rows: np.ndarray
    train_ids: list[list[str]]
    train_metadata: list[list[dict[str, Any]]]
    scores: np.ndarray
    contributions: np.ndarray | None = None
    groups: tuple[str, ...] = ()
    group_contributions: np.ndarray | None = None
    errors: np.ndarray | None = None
    stability: np.ndarray | None = None
    order: str = "proponents"
    min_score: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring the arrays to their dtypes and hold every part to the shape of the scores."""
        # A frozen dataclass is set through object: the conversions are part of its construction.
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "train_rows", np.asarray(self.train_rows, np.int64))
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float32))
        object.__setattr__(self, "groups", tuple(self.groups))
        for name in ("contributions", "group_contributions", "errors", "stability"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if self.scores.ndim != 2 or 0 in self.scores.shape:
            _refuse("scores", list(self.scores.shape), "[queries, k], both at least 1")
        queries, k = self.scores.shape
        for name in ("query_ids", "query_metadata", "train_ids", "train_metadata"):
            if len(getattr(self, name)) != queries:
                _refuse(name, len(getattr(self, name)), f"{queries} entries, one a query")
        for name in ("train_ids", "train_metadata"):
            lengths = {len(row) for row in getattr(self, name)}
            if lengths != {k}:
                _refuse(name, sorted(lengths), f"{k} entries a query, as in scores")
        if self.train_rows.shape != (queries, k):
            _refuse("train_rows", list(self.train_rows.shape), f"[{queries}, {k}], as in scores")
        for name, axis, what in (
            ("contributions", self.timesteps, "timestep"),
            ("group_contributions", self.groups, "group"),
        ):
            parts, expected = getattr(self, name), (queries, k, len(axis))
            if parts is not None and parts.shape != expected:
                _refuse(name, list(parts.shape), f"{list(expected)}, one a {what}")
        if (self.group_contributions is None) != (not self.groups):
            _refuse(
                "groups", list(self.groups), "names exactly where there are group_contributions"
            )

    def _check_values(self) -> None:
        repeated = sorted(name for name, n in Counter(self.query_ids).items() if n > 1)
        if repeated:
            _refuse("query_ids", repeated[:3], "every query under a name of its own")
        if len(set(self.timestep_names)) != len(self.timesteps):
            _refuse("timesteps", list(self.timesteps), "every timestep once")
        if not np.isfinite(self.scores).all():
            where = np.argwhere(~np.isfinite(self.scores))[0].tolist()
            _refuse("scores", f"{self.scores[tuple(where)]} at {where}", "finite numbers")
        if self.order not in ("proponents", "opponents"):
            _refuse("order", repr(self.order), "'proponents' or 'opponents'")
        steps = np.diff(self._sign * self.scores, axis=1)
        if (steps > 0).any():
            query = int(np.argwhere(steps > 0)[0, 0])
            wrong, right = ("rise", "de") if self._sign > 0 else ("fall", "a")
            _refuse("scores", f"a {wrong} in query {query}", f"{right}scending scores: best first")
        for name in ("contributions", "group_contributions"):
            if (parts := getattr(self, name)) is None:
                continue
            # Wide enough for half-precision arithmetic, far narrower than a forgotten weight.
            scale = float(np.abs(parts).sum(axis=2).max())
            gap = float(np.abs(parts.sum(axis=2) - self.scores).max())
            if not gap <= 1e-2 * scale + 1e-12:
                _refuse(name, f"a gap of {gap:.3g} to the scores", "terms that sum to them")

    def first(self, k: int) -> Ranking:
        """Return the first k examples of each query."""
        cut = {
            name: None if value is None else value[:, :k]
            for name in ("contributions", "group_contributions", "errors", "stability")
            for value in [getattr(self, name)]
        }
        return replace(
            self,
            train_rows=self.train_rows[:, :k],
            train_ids=[row[:k] for row in self.train_ids],
            train_metadata=[row[:k] for row in self.train_metadata],
            scores=self.scores[:, :k],
            **cut,  # type: ignore[arg-type]
        )

    @property
    def _sign(self) -> int:
        return 1 if self.order == "proponents" else -1

    def count(self, query: int) -> int:
        """Return how many of a query's examples are part of the answer: see `min_score`."""
        if self.min_score is None:
            return self.scores.shape[1]
        # As float32, like the scores: one that equals the bound is in.
        return int((self._sign * self.scores[query] >= np.float32(self.min_score)).sum())

    @property
    def timestep_names(self) -> list[str]:
        """Column names of the timesteps: `t0950` for whole steps, `t0.95` for times."""
        if all(t.is_integer() for t in self.timesteps):
            return [f"t{int(t):04d}" for t in self.timesteps]
        return [f"t{t:.6g}" for t in self.timesteps]

    def same_label(self, query: int, rank: int) -> bool | None:
        """Say whether a training example carries its query's label; None where one has none."""
        mine = self.query_metadata[query].get("label")
        other = self.train_metadata[query][rank].get("label")
        return None if mine is None or other is None else str(mine) == str(other)

    def records(self) -> list[dict[str, Any]]:
        """Lay the ranking out as tidy rows, one for each query and rank.

        Returns:
            Dicts with the same keys in the same order: query, rank (from 1), id, row, score, error
            and stability where they are known, the
            metadata of the training example, the metadata of the query under `query_<key>`, the
            timesteps, and the groups under `group_<name>`. A metadata key that would hide one of
            these becomes `metadata_<key>`.
        """
        times = self.timestep_names if self.contributions is not None else []
        query_keys = _keys(self.query_metadata)
        train_keys = _keys([example for row in self.train_metadata for example in row])
        groups = [f"group_{name}" for name in self.groups]
        taken = {*CORE_COLUMNS, *times, *groups, *(f"query_{key}" for key in query_keys)}
        columns = {key: f"metadata_{key}" if key in taken else key for key in train_keys}
        records = []
        for query, rank in np.ndindex(*self.scores.shape):
            if rank >= self.count(query):
                continue
            example, origin = self.train_metadata[query][rank], self.query_metadata[query]
            record: dict[str, Any] = {
                "query": self.query_ids[query],
                "rank": rank + 1,
                "id": self.train_ids[query][rank],
                "row": int(self.train_rows[query, rank]),
                "score": _number(self.scores[query, rank]),
                **self._confidence(query, rank),
            }
            record |= {column: example.get(key) for key, column in columns.items()}
            record |= {f"query_{key}": origin.get(key) for key in query_keys}
            if self.contributions is not None:
                parts = self.contributions[query, rank]
                record |= {name: _number(part) for name, part in zip(times, parts, strict=True)}
            if self.group_contributions is not None:
                parts = self.group_contributions[query, rank]
                record |= {name: _number(part) for name, part in zip(groups, parts, strict=True)}
            records.append(record)
        return records

    def _confidence(self, query: int, rank: int) -> dict[str, float]:
        known = {"error": self.errors, "stability": self.stability}
        return {n: _number(v[query, rank]) for n, v in known.items() if v is not None}

    def spell_confidence(self, query: int, rank: int) -> str | None:
        """Say error bar and stability as `±.012 · 97 %`; None if they are not known."""
        if self.errors is None or self.stability is None:
            return None
        error = format_score(self.errors[query, rank])
        return f"±{error} · {100 * self.stability[query, rank]:.0f} %"

    def save(self, folder: str | Path) -> Path:
        """Write `ranking.csv` (one line for each query and rank) and `ranking.json`.

        With pyarrow installed, `ranking.parquet` holds the lines as well, their types kept.

        Args:
            folder: made if it is not there.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        records = self.records()
        with (folder / "ranking.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            for record in records:
                writer.writerow({key: _cell(value) for key, value in record.items()})
        _save_parquet(records, folder / "ranking.parquet")
        text = json.dumps(self.document(), ensure_ascii=False, indent=1, default=_plain)
        (folder / "ranking.json").write_text(text + "\n", encoding="utf-8")
        return folder

    def document(self) -> dict[str, Any]:
        """Return all of it as JSON values, as `load` reads them."""

        def example(query: int, rank: int) -> dict[str, Any]:
            found = {
                "id": self.train_ids[query][rank],
                "row": int(self.train_rows[query, rank]),
                "score": _number(self.scores[query, rank]),
                **self._confidence(query, rank),
                "metadata": self.train_metadata[query][rank],
            }
            if self.contributions is not None:
                found["contributions"] = [_number(c) for c in self.contributions[query, rank]]
            if self.group_contributions is not None:
                parts = self.group_contributions[query, rank]
                found["group_contributions"] = [_number(part) for part in parts]
            return found

        queries, k = self.scores.shape
        return {
            "schema": SCHEMA,
            "method": self.method,
            "order": self.order,
            "min_score": self.min_score,
            "notes": self.notes,
            "timesteps": list(self.timesteps),
            "groups": list(self.groups),
            "queries": [
                {
                    "id": self.query_ids[query],
                    "metadata": self.query_metadata[query],
                    "examples": [example(query, rank) for rank in range(k)],
                }
                for query in range(queries)
            ],
        }

    def dump(self) -> bytes:
        """Return all of it as JSON, for :meth:`load`."""
        return json.dumps(self.document()).encode()

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read a ranking back.

        Args:
            path: a `ranking.json`, or the folder that `save` wrote.

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
            return cls(
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
            )
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DminError(f"{path} is not a ranking ({error!r}): {remedy}.") from error

    def table(self, max_queries: int = 12, columns: int = 5) -> Table:
        """Draw the ranking for a terminal, one line of training examples a query.

        Args:
            max_queries: queries shown, from the first.
            columns: training examples shown of each, from the best.

        Returns:
            A table in which every cell gives id, label and score; a label that agrees with the
            query's is bold and green.
        """
        from rich.table import Table
        from rich.text import Text

        queries, k = min(max_queries, len(self.query_ids)), min(columns, self.scores.shape[1])
        table = Table(
            title=Text(f"{headline(self)}, by {self.method}", style="bold"),
            caption=f"{queries} of {len(self.query_ids)} queries, "
            f"{k} of {self.scores.shape[1]} examples each: id, label, score"
            + (", its error, and how surely it is among them" if self.errors is not None else ""),
            show_lines=any("label" in metadata for metadata in self.query_metadata),
        )
        table.add_column("query", style="bold", overflow="fold")
        for rank in range(k):
            table.add_column(str(rank + 1), justify="right", overflow="fold")
        for query in range(queries):
            head = Text(self.query_ids[query])
            if (label := self.query_metadata[query].get("label")) is not None:
                head.append(f"\n{label}", style="not bold")
            shown = range(min(k, self.count(query)))
            table.add_row(head, *(self._terminal_cell(query, rank) for rank in shown))
        return table

    def _terminal_cell(self, query: int, rank: int) -> Text:
        from rich.text import Text

        # Text, never markup: an id may hold square brackets.
        cell = Text(self.train_ids[query][rank], style="dim")
        if (label := self.train_metadata[query][rank].get("label")) is not None:
            style = "bold green not dim" if self.same_label(query, rank) else "not dim"
            cell.append(f"\n{label}", style=style)
        cell.append(f"\n{format_score(self.scores[query, rank])}", style="not dim")
        sure = self.spell_confidence(query, rank)
        return cell if sure is None else cell.append(f"\n{sure}", style="dim")


def headline(ranking: Ranking) -> str:
    """Say in a few words what a ranking shows."""
    what = "behind" if ranking.order == "proponents" else "that speak against"
    return f"Training examples {what} each image"


def format_score(score: float) -> str:
    """Write a score for people: three decimals, or powers of ten where these would say nothing."""
    size = abs(score)
    if not math.isfinite(size) or size == 0 or 5e-3 <= size < 1e4:
        return f"{score:.3f}"
    return f"{score:.1e}"


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


def _refuse(name: str, value: object, allowed: str) -> None:
    raise DminError(
        f"A ranking cannot have {name} = {value}: allowed is {allowed}. "
        "Build it from the stores and the method's scores, and leave its order alone."
    )
