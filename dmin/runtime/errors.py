"""The exception for errors that a user can fix."""

from dmin.runtime.escape import printable


class DminError(Exception):
    """Say what is wrong, where, what is allowed and how to mend it, in one paragraph.

    The command line prints the message alone, without a traceback, and exits with status 1.
    Anything else that escapes is a defect of dmin and keeps its traceback.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DminWarning(UserWarning):
    """Say what was done that the user may not expect; the command line prints it as it is."""
