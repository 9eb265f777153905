"""The tidy table that all reports are made from: one row for each method, task and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmin.evaluation.metrics import Estimate, interval, within_bounds
from dmin.runtime.escape import read_csv, write_csv

Array = np.ndarray

TRANSFORMED = ("squared", "soft-max", "top 5 %")
DIFFERENCE = ("difference", "difference_low", "difference_high")
Place = tuple[str, str, str]
"""Task, ground truth and metric."""


@dataclass(frozen=True)
class Row:
    """Identifies a row of the tables: a method, a control of it, or a reference.

    Args:
        method: its name.
        tuned: the criterion by which its settings were chosen; empty: settings of its YAML.
        control: ``untrained``, ``squared`` …; empty for the method itself; ``reference`` for a row
            that is not a method, such as the ceiling.
        settings: the chosen settings, as text.
    """

    method: str
    tuned: str = ""
    control: str = ""
    settings: str = ""

    @property
    def name(self) -> str:
        """Its name in the tables."""
        parts = [self.method]
        if self.tuned:
            parts.append(f"tuned on {self.tuned}")
        if self.control and self.control != "reference":
            parts.append(self.control)
        return ", ".join(parts)


@dataclass(frozen=True)
class Cost:
    """The cost of a row: bytes per example in the store, seconds to fit, seconds per query.

    ``reads`` is ``gradients``; ``model`` for a method that runs the model and needs no store; or
    empty.
    """

    bytes: int = 0
    fit_seconds: float = 0.0
    query_seconds: float = 0.0
    reads: str = ""


@dataclass(frozen=True)
class Cell:
    """One measurement, before it is compared with others."""

    task: str
    truth: str
    metric: str
    row: Row
    values: Array  # [Q]
    resampled: Array  # [R]
    cost: Cost = field(default_factory=Cost)
    dim: int | None = None
    clusters: int | None = None  # number of resampled units; None: queries

    @property
    def place(self) -> Place:
        """Where it was measured."""
        return self.task, self.truth, self.metric

    def interval(self, base: Cell | None = None) -> Estimate:
        """Return the mean with its interval, or the paired difference to another cell with its."""
        clusters = self.clusters or len(self.values)
        if base is None:
            return interval(self.values.mean(), self.resampled, clusters)
        off = self.values.mean() - base.values.mean()
        return interval(off, self.resampled - base.resampled, clusters)


@dataclass(frozen=True)
class Result:
    """One measurement with its 95 % interval, and how it compares.

    ``difference`` is to the reference method in the same resamples; ``better``: its interval is
    above zero, ``worse``: below. ``best``: no other method (without controls) is better by the
    interval of the paired difference.
    """

    task: str
    truth: str
    metric: str
    method: str
    tuned: str
    control: str
    settings: str
    dim: int | None
    queries: int
    mean: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    best: bool = False
    of_ceiling: float | None = None
    bytes: int = 0
    fit_seconds: float = 0.0
    query_seconds: float = 0.0
    reads: str = ""

    @property
    def place(self) -> Place:
        """Where it was measured."""
        return self.task, self.truth, self.metric

    @property
    def name(self) -> str:
        """The row's name in the tables."""
        return Row(self.method, self.tuned, self.control).name

    @property
    def better(self) -> bool:
        """Whether it is better than the reference method beyond chance."""
        return self.difference_low is not None and self.difference_low > 0

    @property
    def worse(self) -> bool:
        """Whether it is worse than the reference method beyond chance."""
        return self.difference_high is not None and self.difference_high < 0


@dataclass
class Report:
    """The results of a benchmark.

    Args:
        results: the tidy table.
        path: all settings tried for every tuned method, with all metrics that are not costly.
        left_out: methods that could not be measured, and why.
        reference: the method to which differences are computed.
        notes: description of the context, and the run's time.
        fits: results of fitting, such as effective dimensions, by row and topic.
    """

    results: list[Result]
    path: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    reference: str = "dmin"
    notes: dict[str, str] = field(default_factory=dict)
    fits: dict[str, str] = field(default_factory=dict)

    def at_one_size(self) -> Report:
        """Return only results of the first sketch size, and of methods without sketches."""
        first = next((r.dim for r in self.results if r.dim is not None), None)
        return replace(self, results=[r for r in self.results if r.dim in (None, first)])

    def save(self, folder: str | Path) -> None:
        """Write ``results.csv`` (and ``.parquet``, with pyarrow) and ``path.csv``."""
        folder = Path(folder)
        rows = [asdict(r) for r in self.results]
        tables = {"results.csv": rows, **({"path.csv": self.path} if self.path else {})}
        for name, table in tables.items():
            write_csv(folder / name, table)  # not rounded; only tables round
        try:
            pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError:
            return
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "results.parquet")

    @classmethod
    def load(cls, folder: str | Path, **known: Any) -> Report:
        """Read the tables back; ``known`` gives the other fields."""
        folder = Path(folder)
        results = [_read(line) for line in read_csv(folder / "results.csv")]
        lines = read_csv(folder / "path.csv") if (folder / "path.csv").is_file() else []
        path: list[dict[str, Any]] = [
            {k: v if k == "method" else float(v) for k, v in line.items() if v != ""}
            for line in lines
        ]
        return cls(results, path, **known)


def compared(cells: Sequence[Cell], reference: str) -> list[Result]:
    """Turn measurements into results: intervals, paired differences, the best methods."""
    results = []
    for place in dict.fromkeys(cell.place for cell in cells):
        group = [cell for cell in cells if cell.place == place]
        base = next((c for c in group if c.row == Row(c.row.method) == Row(reference)), None)
        ceiling = next((c.values.mean() for c in group if c.row.method == "ceiling"), None)
        best = _best_at_each_size([c for c in group if not c.row.control])
        for cell in group:
            is_method = cell.row.control != "reference"
            mean, low, high = (within_bounds(cell.metric, each) for each in cell.interval())
            difference: tuple[float | None, ...] = (None, None, None)
            if base is not None and is_method and cell is not base:
                difference = cell.interval(base)
            found: dict[str, Any] = {
                **dict(zip(("task", "truth", "metric"), cell.place, strict=True)),
                **asdict(cell.row),
                **dict(zip(DIFFERENCE, difference, strict=True)),
                **asdict(cell.cost),
                "best": any(cell is one for one in best),
                "of_ceiling": mean / ceiling if ceiling and is_method else None,
            }
            found |= {"dim": cell.dim, "queries": len(cell.values)}
            results.append(Result(mean=mean, low=low, high=high, **found))
    return results


def _best_at_each_size(cells: Sequence[Cell]) -> list[Cell]:
    """Return for each sketch size the best cells, compared with methods without gradients too."""
    found: list[Cell] = []
    for size in dict.fromkeys(cell.dim for cell in cells):
        rivals = [c for c in cells if c.dim == size or c.cost.reads != "gradients"]
        found += [c for c in _best(rivals) if c.dim == size]
    return found


def _best(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that are not worse, beyond chance, than the one with the largest mean."""
    if not cells:
        return []
    top = max(cells, key=lambda c: float(c.values.mean()))
    return [c for c in cells if c is top or top.interval(c).low <= 0]


def _read(line: Mapping[str, str]) -> Result:
    kinds = {f.name: str(f.type) for f in fields(Result)}

    def value(name: str, text: str) -> Any:
        kind = kinds[name]
        if kind == "str":
            return text
        if text == "":
            return None
        if kind == "bool":
            return text == "True"
        return int(text) if kind.startswith("int") else float(text)

    return Result(**{name: value(name, text) for name, text in line.items()})
