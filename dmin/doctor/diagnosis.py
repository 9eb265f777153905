"""The result of an examination, as tables and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.table import Table
from rich.text import Text

from dmin.collect.prediction import Cost
from dmin.doctor.size import Size
from dmin.doctor.timestep_report import Timestep, report_table
from dmin.runtime.formatting import byte_size, span


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: what was checked.
        passed: whether the check passed.
        value: the measured number, if there is one.
        limit: the largest value that passes.
        detail: what was measured or found.
        remedy: what to do if the check did not pass.
        required: True: without it, collecting would be wrong; False: only a warning.
    """

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""
    remedy: str = ""
    required: bool = True

    @classmethod
    def within(cls, name: str, value: float, limit: float, detail: str, remedy: str) -> Self:
        """Return the check that a number is at most a limit; NaN fails."""
        return cls(name, value <= limit, value, limit, detail, remedy)

    @property
    def verdict(self) -> str:
        """``passed``, ``warning`` or ``failed``."""
        return "passed" if self.passed else "failed" if self.required else "warning"


class Covered(NamedTuple):
    """Parameters of one layer type whose gradients are computed in the same way."""

    layers: str  # type of the layers
    path: str  # closed form, per-example rerun (module), unused, or not attributed
    tensors: int
    scalars: int


@dataclass(frozen=True)
class Diagnosis:
    """The result of an examination.

    Args:
        checks: in the order in which they were made.
        coverage: how the gradients of all parameters are computed.
        timesteps: how well each distinguishes the examples.
        cost: predicted for the whole dataset; None if the examination ended early.
        size: device memory of the model, predicted from its configs; None if unknown.
    """

    checks: Sequence[Check]
    coverage: Sequence[Covered] = field(default_factory=list)
    timesteps: Sequence[Timestep] = field(default_factory=list)
    cost: Cost | None = None
    size: Size | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.verdict == "failed"]

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        content = {
            "passed": self.passed,
            "checks": [{**asdict(check), "verdict": check.verdict} for check in self.checks],
            "coverage": [row._asdict() for row in self.coverage],
            "timesteps": [{**row._asdict(), "blind": row.blind} for row in self.timesteps],
            "cost": self.cost._asdict() if self.cost else None,
            "size": self.size._asdict() if self.size else None,
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    def tables(self) -> list[Table]:
        """Return tables for the terminal, the verdict last."""
        coverage = [_coverage_table(self.coverage)] if self.coverage else []
        timesteps = [report_table(self.timesteps)] if self.timesteps else []
        cost = [_cost_table(self.cost)] if self.cost else []
        return [*coverage, *timesteps, *cost, _check_table(self.checks)]


def _check_table(checks: Sequence[Check]) -> Table:
    table = Table(title="Checks", title_justify="left")
    for heading in ("", "check", "value", "limit", "result, and remedy"):
        justify: Any = "right" if heading in ("value", "limit") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    marks = {"passed": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}
    for check in checks:
        value, limit = ("" if x is None else f"{x:.2g}" for x in (check.value, check.limit))
        told = " ".join(filter(None, (check.detail, "" if check.passed else check.remedy)))
        cells = map(Text, (check.name, value, limit, told))
        table.add_row(Text(*marks[check.verdict]), *cells)
    return table


def _coverage_table(coverage: Sequence[Covered]) -> Table:
    table = Table(title="How gradients are computed", title_justify="left")
    table.add_column("layers")
    table.add_column("path")
    for heading in ("tensors", "parameters", "share"):
        table.add_column(heading, justify="right")
    total = sum(row.scalars for row in coverage)
    for row in coverage:
        numbers = f"{row.tensors:,}", f"{row.scalars:,}", f"{row.scalars / total:.2%}"
        table.add_row(Text(row.layers), row.path, *numbers)
    return table


def _cost_table(cost: Cost) -> Table:
    title = f"All {cost.examples:,} examples on this device, in one process"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("time (without loading and encoding)", span(cost.seconds))
    table.add_row("store", byte_size(cost.store_bytes))
    if cost.encoding_bytes:
        table.add_row("cached encodings on disk", byte_size(cost.encoding_bytes))
    table.add_row(cost.extra_meaning, byte_size(cost.extra_bytes))
    return table
