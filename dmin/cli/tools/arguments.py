"""Arguments of the commands without a configuration: paths and ``key=value``."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dmin.runtime.errors import DminError


class Arguments(argparse.ArgumentParser):
    """Parses the arguments after ``dmin <command>``; errors are `DminError`.

    An option ``--key`` is also understood as ``key=value``, like settings. A path
    with a ``=`` is written ``./a=b``.

    Args:
        command: after ``dmin``, such as ``"status"`` or ``"store fold"``.
    """

    def __init__(self, command: str) -> None:
        super().__init__(f"dmin {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            DminError: always.
        """
        raise DminError(f"{message.replace('argument --', '')}.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the arguments.

        Raises:
            DminError: one is wrong or unknown.
        """
        return self.parse_intermixed_args([self._option(word) for word in words])

    def _option(self, word: str) -> str:
        key, equals, _ = word.partition("=")
        if not equals or "/" in key or key.startswith("-"):
            return word
        known = [name[2:] for name in self._option_string_actions]
        if key not in known:
            raise DminError(
                f"{key} is not a setting of {self.prog}. It takes {', '.join(known) or 'none'}."
            )
        return f"--{word}"
