"""Loops compiled by numba for this processor, cached on disk, and announced when compiled.

numba keeps what it compiled in NUMBA_CACHE_DIR if that is set, else beside the source, else, where
that cannot be written, in the user's cache folder. This module imports numba, so a stage imports it
only when it first needs a loop.
"""

import sys
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.event import Event, Listener, register

NOTICE = "dmin: compiling loops for this processor "
KEPT = "(once, up to a minute)"
NOT_KEPT = "(up to a minute, in every run: set NUMBA_CACHE_DIR to a folder where they can be kept)"


class _Notice(Listener):
    """Says once in a process that loops are compiled: numba tells of those it does not find kept.

    Attributes:
        kept: whether there is a place for them, by the module that has them.
    """

    def __init__(self) -> None:
        self.kept: dict[str, bool] = {}
        self.said = False

    def on_start(self, event: Event) -> None:
        """Say it at the first of ours: other packages may use numba as well."""
        module = event.data["dispatcher"].py_func.__module__
        if module in self.kept and not self.said:
            self.said = True
            print(NOTICE + (KEPT if self.kept[module] else NOT_KEPT), file=sys.stderr, flush=True)

    def on_end(self, event: Event) -> None:
        """Say nothing: what comes next shows that it is done."""


_notice = _Notice()
register("numba:compile", _notice)


def compiled(function: Callable, **settings: Any) -> Any:
    """Compile a loop when it is first called; it does not hold Python's lock.

    Args:
        function: of what numba knows.
        settings: of ``numba.njit``.

    Returns:
        What is called like the function.
    """
    settings = {"nogil": True, **settings}
    try:
        found = njit(cache=True, **settings)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        found = njit(**settings)(function)
    _notice.kept[function.__module__] = found.stats.cache_path is not None
    return found
