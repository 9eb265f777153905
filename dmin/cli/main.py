"""``dmin <command> [overrides]``: help from the standard library, everything else through Hydra."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dmin.cli import help as pages
from dmin.cli.config.groups import did_you_mean
from dmin.runtime.errors import DminError
from dmin.runtime.escape import printable
from dmin.runtime.files import machine_failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``dmin``.

    Args:
        argv: the arguments after ``dmin``; those of the process when None.

    Returns:
        The exit status. Errors of the configuration or of the command raise ``SystemExit``, and so
        do system errors: a full disk, no memory, a removed folder.
    """
    try:
        return _main(argv)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or (told := machine_failure(error)) is None:
            raise
        raise SystemExit(f"dmin: {told}") from error


def _main(argv: Sequence[str] | None) -> int:
    command, *overrides = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    asks_help = bool({"-h", "--help"} & set(overrides))
    if command in ("-h", "--help"):
        print(pages.overview(), end="")
    elif command == "--version":
        print(f"dmin {pages.release()}")
    elif command in ("-sc", "--shell-completion"):
        return _complete(overrides)
    elif command not in pages.COMMANDS:
        return _refuse(command)
    elif command in pages.TOOLS:
        tool = import_module(f"dmin.cli.tools.{command}")
        if asks_help:
            print(f"{pages.COMMANDS[command]}\n{tool.PAGE}", end="")
        else:
            try:
                tool.run(overrides)
            except DminError as error:
                print(f"dmin: {printable(str(error))}", file=sys.stderr)
                return 1
    elif asks_help:
        print(pages.page(command), end="")
    else:
        # Imported here, so that the help above does not wait for Hydra.
        from dmin.cli.commands import step_of
        from dmin.cli.config.compose import run
        from dmin.cli.config.line import parse, register
        from dmin.cli.config.shorthand import spelled_out
        from dmin.cli.jobs.processes import PARENT

        try:
            line = parse(command, spelled_out(command, overrides))
        except DminError as error:
            raise SystemExit(printable(str(error))) from error
        # The first process speaks for the others.
        if line.notes and "++extras.quiet=true" not in line.settings and PARENT not in os.environ:
            print(printable("\n".join(line.notes)), flush=True)
        run(step_of(command), command, line.settings, config=register(line))
    return 0


def _refuse(command: str) -> int:
    if command.startswith("-"):
        message = f"name a command before {command}, as in: dmin collect {command}"
    else:
        near = did_you_mean(command, pages.COMMANDS)
        names = ", ".join(pages.COMMANDS)
        message = " ".join(
            filter(None, (f"there is no command {command}.", near, f"Commands: {names}."))
        )
    print(f"dmin: {message}", file=sys.stderr)
    return 2


def _complete(arguments: list[str]) -> int:
    """Complete the command's name, and its overrides by Hydra."""
    from dmin.cli.config.compose import complete

    words = os.environ.get("COMP_LINE", "").split(" ")
    if arguments and arguments[0].startswith("query=") and len(words) < 3:
        print(" ".join(name for name in pages.COMMANDS if name.startswith(words[-1])))
    else:
        complete(arguments)
    return 0
