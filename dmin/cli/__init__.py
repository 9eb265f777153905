"""``dmin <command> [overrides]``: help from the standard library, everything else through Hydra."""

import os
import sys
from collections.abc import Sequence

from dmin.cli import help as pages


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``dmin``.

    Args:
        argv: the arguments after ``dmin``; those of the process when None.

    Returns:
        The exit status. Errors of the configuration or of the command raise ``SystemExit``.
    """
    command, *overrides = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(pages.overview(), end="")
    elif command == "--version":
        print(f"dmin {_version()}")
    elif command in ("-sc", "--shell-completion"):
        return _complete(overrides)
    elif command not in pages.COMMANDS:
        return _refuse(command)
    elif {"-h", "--help"} & set(overrides):
        print(pages.page(command), end="")
    elif command == "store":
        from dmin.cli.tools.store import run as run_store

        return run_store(overrides)
    elif command == "status":
        from dmin.cli.tools.status import run as run_status

        return run_status(overrides)
    elif command == "repeat":
        from dmin.cli.tools.repeat import run as run_again

        return run_again(overrides)
    else:
        # Imported here, so that the help above does not wait for Hydra.
        from dmin.cli.commands import COMMANDS
        from dmin.cli.config.compose import run

        if command == "demo" and not any(o.startswith("experiment=") for o in overrides):
            overrides = ["experiment=digits", *overrides]
        run(COMMANDS[command], command, overrides)
    return 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dmin")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _refuse(command: str) -> int:
    if command.startswith("-"):
        message = f"name a command before {command}, as in: dmin collect {command}"
    else:
        near = pages.did_you_mean(command, pages.COMMANDS)
        names = ", ".join(pages.COMMANDS)
        message = " ".join(
            filter(None, (f"there is no command {command}.", near, f"Commands: {names}."))
        )
    print(f"dmin: {message}", file=sys.stderr)
    return 2


def _complete(arguments: list[str]) -> int:
    """Complete the command's name here, and its overrides with Hydra."""
    from dmin.cli.config.compose import complete

    words = os.environ.get("COMP_LINE", "").split(" ")
    if arguments and arguments[0].startswith("query=") and len(words) < 3:
        print(" ".join(name for name in pages.COMMANDS if name.startswith(words[-1])))
    else:
        complete(arguments)
    return 0
