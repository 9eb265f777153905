"""Memory used by processes and available, as far as the system reports it."""

import os
import sys
from pathlib import Path


def peak_resident(children: bool = False) -> int:
    """Return the most bytes of memory that this process had so far; 0 where nothing tells.

    Args:
        children: that one which it started and which has ended had, if that is more.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    whose = [resource.RUSAGE_SELF, *([resource.RUSAGE_CHILDREN] if children else [])]
    return max(resource.getrusage(who).ru_maxrss for who in whose) * unit


def available() -> int | None:
    """Return the bytes of memory that this machine can still give; None where nothing tells."""
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:  # Windows
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
