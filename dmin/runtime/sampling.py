"""Samples evenly spaced over a sequence."""

import numpy as np


def evenly(total: int, count: int | None, ends: bool = False) -> list[int]:
    """Return places evenly spaced over ``0 … total − 1``, ascending and each once.

    Args:
        total: how many places there are.
        count: how many to choose; all if there are no more, or if None.
        ends: from the first to the last; else each is the start of an equal part.
    """
    count = total if count is None else min(count, total)
    if ends:
        return [int(place) for place in np.linspace(0, total - 1, count).round()]
    return [number * total // count for number in range(count)]
