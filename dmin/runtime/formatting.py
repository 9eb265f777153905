"""Format numbers for people."""

from collections.abc import Iterable, Sequence

import numpy as np


def span(seconds: float) -> str:
    """Say a time in its two largest units: ``1 d 3 h``, ``12 min``, ``8 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def byte_size(count: float) -> str:
    """Say a number of bytes: ``12.5 MiB``, ``1,024.0 GiB``."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Write ascending numbers as spans, such as ``0-7, 16-23``."""
    array = np.asarray(numbers, dtype=np.int64)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run)]
    return ", ".join(texts[:most]) + (" ..." if len(texts) > most else "")


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, and an empty one.

    A text of the data, such as the name of a source, ends neither its cell nor its line.
    """
    plain = (
        (" ".join(text.split()).replace("|", r"\|") for text in each) for each in (head, *lines)
    )
    top, *rest = (f"| {' | '.join(each)} |" for each in plain)
    return [top, "|---" * len(head) + "|", *rest, ""]
