"""The commands that compose a configuration, one file for each."""

from importlib import import_module
from typing import Any


def step_of(name: str) -> Any:
    """Import and return the step of a command."""
    return getattr(import_module(f"dmin.cli.commands.{name}"), name)
