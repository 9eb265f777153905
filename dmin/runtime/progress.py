"""Progress of long work: a bar on a terminal, an occasional line in a log file."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.segment import Segment
from rich.text import Text

from dmin.runtime.escape import printable
from dmin.runtime.formatting import span

# Seconds after which a line is due, doubled after each up to the second number: a log of a day has
# some hundred.
FIRST, LAST = 15.0, 900.0

LOG_WIDTH = 160  # columns of tables in a log file

T = TypeVar("T")

_quiet = False  # of the process, as what reads files or draws images is told of no settings


@contextmanager
def without_progress(on: bool = True) -> Iterator[None]:
    """Have this process show no progress for a while, if asked to."""
    global _quiet
    before, _quiet = _quiet, _quiet or on
    try:
        yield
    finally:
        _quiet = before


class PlainConsole(Console):
    """Shows texts as they are, as far as a terminal would obey nothing in them: see `titled`."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield what is shown."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def titled(title: str, text: object = "", style: str = "bold") -> Text:
    """Return a line with its beginning set off: the one way, as texts are no markup."""
    return Text.assemble((title, style), str(text))


def console(quiet: bool = False) -> Console:
    """Return where text and tables go: as wide as the terminal, or COLUMNS, or wide in a log file.

    Args:
        quiet: whether nothing is shown.
    """
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if known else LOG_WIDTH
    return PlainConsole(quiet=quiet, width=width, markup=False, emoji=False)


class Lines:
    """Says how far a piece of work is, at most a line for each span of time.

    Args:
        label: what is being done.
        total: how many things there are to do; it may change.
        unit: what the things are, or nothing.
        place: which part of the work this is, such as " in process 0 of 8".
    """

    def __init__(self, label: str, total: int, unit: str = "examples", place: str = "") -> None:
        self.label = label
        self.total = total
        self.place = place
        self.unit: str = f" {unit}" if unit else ""
        self.done: float = 0
        self.found: float = 0
        self._start = time.monotonic()
        self._every = FIRST
        self._due = self._start + FIRST

    def skip(self, done: int) -> None:
        """Leave out of the rate what was done before."""
        self.done = self.found = done

    def due(self, done: float) -> str | None:
        """Return a line, if one is due or all is done."""
        self.done = done
        if time.monotonic() < self._due and done < self.total:
            return None
        self._every = min(2 * self._every, LAST)
        self._due = time.monotonic() + self._every
        return str(self)

    def rate(self) -> float:
        """Return how many things are done in a second."""
        return (self.done - self.found) / self._seconds()

    def ahead(self) -> str:
        """Say how long the rest takes at this rate; nothing if there is none, or no rate yet."""
        left, rate = self.total - self.done, self.rate()
        return f"{span(left / rate)} left" if left and rate else ""

    def __str__(self) -> str:
        rate = self.rate()
        ahead = f", {self.ahead()}" if self.ahead() else f" in {span(self._seconds())}"
        return (
            f"{self.label}: {int(self.done):,} of {self.total:,}{self.unit}{self.place} "
            f"({self.done / max(self.total, 1):.1%}), {rate:,.3g} a second{ahead}"
        )

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)


def followed(
    items: Iterable[T], label: str, total: int, unit: str, transient: bool = False
) -> Iterator[T]:
    """Yield items, and show how many were worked on.

    Args:
        items: that are being worked on.
        label: what is being done.
        total: how many items there are.
        unit: what they are.
        transient: whether nothing shall be left on a terminal.
    """
    if _quiet:
        yield from items
        return
    if sys.stdout.isatty():
        yield from track(items, escape(label), total, transient=transient, console=console())
        return
    lines = Lines(label, total, unit)
    for number, item in enumerate(items, 1):
        yield item
        line = lines.due(number)
        if line is not None and not (transient and number == total):
            print(printable(line), flush=True)
