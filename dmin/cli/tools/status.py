"""``dmin status [STORE]``: the progress and the processes of a collection, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmin.cli.tools.arguments import Arguments
from dmin.runtime.errors import DminError
from dmin.runtime.formatting import span, spans

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from dmin.store import Manifest
    from dmin.workers.liveness import WorkerStatus

STORES = Path("outputs/stores")
APART = 5.0  # seconds between two clocks that are worth a word
SHOWN = 64  # processes listed, first those that need a look


PAGE = """
usage: dmin status [STORE] [json=true]

Without a store: all of outputs/stores. A store that is being written is not disturbed.

examples:
  dmin status
  dmin status outputs/stores/digits-train-0123456789abcdef
  dmin status store=outputs/stores/digits-train-0123456789abcdef json=true
"""


@dataclass(frozen=True)
class Status:
    """The progress of a store.

    Args:
        path: of the store.
        manifest: of the store.
        sealed: finished blocks.
        missing: other blocks.
        reports: of the processes.
        unattended: missing blocks assigned to no running process.
    """

    path: Path
    manifest: Manifest
    sealed: int
    missing: list[int]
    reports: list[WorkerStatus]
    unattended: list[int]

    @property
    def rows(self) -> int:
        """Examples that are there."""
        manifest = self.manifest
        return manifest.num_examples - sum(len(manifest.block_rows(b)) for b in self.missing)

    @property
    def running(self) -> list[WorkerStatus]:
        """The processes at work."""
        return [each for each in self.reports if each.running]

    @property
    def rate(self) -> float:
        """Examples a second, all processes together."""
        return sum(each.rate for each in self.running if each.done < each.blocks)

    @property
    def seconds_left(self) -> float | None:
        """Until the slowest process is done; None if none is running or has a rate yet."""
        left = map(self.left, self.running)
        return max((seconds for seconds in left if seconds is not None), default=None)

    def left(self, report: WorkerStatus) -> float | None:
        """Return the seconds that a process still needs."""
        if report.state != "collecting" or report.rate < 1e-6:
            return 0.0 if report.state == "waiting" else None
        return max(0, report.blocks - report.done) * self.manifest.block_size / report.rate


def status_of(path: Path) -> Status:
    """Read a store and the heartbeats of its processes.

    Raises:
        DminError: there is no store, or a segment cannot be read.
    """
    from dmin.store.segments import open_segments, read_manifest
    from dmin.workers.liveness import reports

    manifest = read_manifest(path)
    found = reports(path)  # before the segments: what is sealed meanwhile is then no news
    segments = open_segments(path, manifest, verify=False).values()
    there = {block for segment in segments for block in segment.blocks.tolist()}
    missing = [block for block in range(manifest.num_blocks) if block not in there]
    shares = [each.share.range(manifest.num_blocks) for each in found if each.running]
    attended = {block for share in shares for block in share}
    unattended = [block for block in missing if block not in attended]
    return Status(path, manifest, len(there), missing, found, unattended)


def run(arguments: Sequence[str]) -> None:
    """Print the status of one store or of all."""
    path, as_json = _parsed(arguments)
    found = [status_of(each) for each in ([path] if path else _all_stores())]
    if as_json:
        values = [as_values(each) for each in found]
        print(json.dumps(values[0] if path else values, indent=1))
        return
    from dmin.runtime.progress import console

    screen = console()
    if path is None:
        screen.print(overview(found))
        return
    for line in lines(found[0]):
        screen.print(line, soft_wrap=True, highlight=False)
    if found[0].reports:
        screen.print(table(found[0]))


def _all_stores() -> list[Path]:
    paths = sorted(file.parent for file in STORES.glob("*/manifest.json"))
    if not paths:
        raise DminError(
            f"there are no stores in {STORES.resolve()}. Give one: dmin status path/to/store."
        )
    return paths


def as_values(status: Status) -> dict[str, Any]:
    """Return the status as JSON values."""
    return {
        "path": str(status.path),
        "examples": status.manifest.num_examples,
        "rows": status.rows,
        "blocks": status.manifest.num_blocks,
        "sealed_blocks": status.sealed,
        "complete": not status.missing,
        "rows_a_second": round(status.rate, 3),
        "seconds_left": status.seconds_left,
        "unattended_blocks": status.unattended,
        "processes": [
            {**asdict(each), "share": str(each.share), "running": each.running}
            for each in status.reports
        ],
    }


def lines(status: Status) -> list[Text]:
    """Describe the progress of a store in a few lines."""
    from dmin.runtime.progress import titled

    manifest, rows = status.manifest, status.rows
    share = rows / manifest.num_examples
    done = "━" * round(30 * share)
    sealed = (
        f" {rows:,} of {manifest.num_examples:,} rows sealed ({100 * share:.1f} %), "
        f"{status.sealed:,} of {manifest.num_blocks:,} blocks"
    )
    bar = titled(f"  {done}", style="green").append("━" * (30 - len(done)), "dim").append(sealed)
    told = [titled("store", f": {status.path}"), bar]

    def say(what: str, more: str = "", style: str = "") -> None:
        told.append(titled(f"  {what}", more, style))

    if not status.missing:
        say("complete")
        return told
    running = status.running
    if running:
        left = status.seconds_left
        rest = "time left unknown" if left is None else f"{span(left)} left"
        say(f"{len(running)} running, {status.rate:,.2f} rows/s together, {rest}")
    dead = [each for each in status.reports if not each.running and not each.ended]
    if dead:
        undone = sum(max(0, each.blocks - each.done) for each in dead)
        lost = f" before finishing up to {undone:,} blocks; what they had not sealed is lost"
        say(f"{len(dead)} died", lost, "red")
    if status.unattended:
        which = f" (numbers {spans(status.unattended)})"
        again = f"{which}: run the command that started them again, it resumes"
        say(f"no process computes {len(status.unattended):,} missing blocks", again, "red")
    apart = [each for each in running if abs(each.ahead) > APART]
    if apart:
        far = max(apart, key=lambda each: abs(each.ahead))
        by = f": that of {far.host} by {far.ahead:+.0f} s from the file system's"
        say("clocks differ", f"{by}. Nothing here depends on it.", "yellow")
    return told


def table(status: Status) -> Table:
    """List the processes: first dead ones, then running ones, then finished ones."""
    made = _table(("part", "process", "state"), ("blocks", "rows/s", "left", "last sign"))
    ordered = sorted(status.reports, key=lambda each: (each.ended, each.running, each.share))
    for each in ordered[:SHOWN]:
        state = each.state if each.running or each.ended else "dead"
        style = {"dead": "red", "failed": "red", "stopped": "yellow"}.get(state)
        left = status.left(each) if each.running else None
        made.add_row(
            str(each.share),
            each.who,
            state,
            f"{each.done:,}/{each.blocks:,}",
            *_pace(each.rate, left),
            f"{span(each.age)} ago",
            style=style,
        )
        if each.note and state in ("failed", "stopped"):
            made.add_row("", f"  {each.note[:160]}", style=style)
    if len(ordered) > SHOWN:
        made.add_row(f"and {len(ordered) - SHOWN:,} more: json=true lists all")
    return made


def overview(found: Sequence[Status]) -> Table:
    """List stores, one line for each."""
    made = _table(("store",), ("rows", "", "at work", "rows/s", "left"), overflow="fold")
    for each in found:
        total = each.manifest.num_examples
        made.add_row(
            str(each.path),
            f"{each.rows:,}/{total:,}",
            f"{100 * each.rows / total:.1f} %" if each.missing else "complete",
            str(len(each.running) or ""),
            *_pace(each.rate, each.seconds_left if each.missing else None),
            style="red" if each.unattended else None,
        )
    return made


def _table(texts: Sequence[str], numbers: Sequence[str], **options: Any) -> Table:
    from rich.table import Table

    made = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for name in texts:
        made.add_column(name, justify="left", **options)
    for name in numbers:
        made.add_column(name, justify="right", **options)
    return made


def _pace(rate: float, left: float | None) -> tuple[str, str]:
    return f"{rate:,.2f}" if rate else "", "" if left is None else span(left)


def _parsed(words: Sequence[str]) -> tuple[Path | None, bool]:
    """Return the store, if given, and whether to print JSON."""
    parser = Arguments("status")
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--json", choices=("true", "false"), nargs="?", const="true")
    try:
        found = parser.read(words)
    except DminError as error:
        raise DminError(f"{error} dmin status takes a store and json=true|false.") from None
    return found.store or found.path, found.json == "true"
