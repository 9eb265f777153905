"""The command line; ``dmin.cli:main`` is its entry."""

from dmin.cli.main import main

__all__ = ["main"]
