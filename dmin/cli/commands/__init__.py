"""The commands that compose a configuration, one file for each."""

from importlib import import_module
from typing import Any


def step_of(name: str) -> Any:
    """Return the step of a command; what it needs is imported now."""
    return getattr(import_module(f"dmin.cli.commands.{name}"), name)
