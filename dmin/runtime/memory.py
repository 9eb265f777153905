"""The memory that processes had, as far as their system tells."""

import sys


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
