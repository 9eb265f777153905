"""Atomic file writing, and messages for errors of the file system."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dmin.runtime.errors import DminError

REMEDIES = {
    errno.EACCES: "give yourself permission to this path, or choose another directory",
    errno.EPERM: "give yourself permission to this path, or choose another directory",
    errno.EROFS: "the disk is mounted read-only: choose another directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory: choose another path",
    errno.EEXIST: "a file of this name already exists: choose another path",
    errno.ENOTEMPTY: "another process has just made it: run the command again, which uses it",
    errno.ENOSPC: "the disk is full: free space, then run the same command again, it resumes",
    errno.EDQUOT: "your disk quota is used up: free space, then run the same command again",
    errno.ENOENT: "it does not exist, or was just removed: run the command again",
    errno.ESTALE: "another machine has just removed it: run the command again",
    errno.EISDIR: "a folder of this name already exists: choose another path",
    errno.ENAMETOOLONG: "this name or path is too long for the file system: choose a shorter one",
    errno.EIO: "the disk or the network to it failed: check both, then run the command again",
    errno.EFBIG: "files of this size are not allowed: raise `ulimit -f` or lower segment_bytes",
}
ENDLESS = "pipe, socket or device"


def os_failure(doing: str, path: Path, error: OSError) -> DminError:
    """Say which path failed, why, and what helps."""
    remedy = REMEDIES.get(error.errno or 0, "check that the disk works and that the path is right")
    return DminError(f"Could not {doing} {path} ({error.strerror or error}): {remedy}.")


@contextlib.contextmanager
def naming(doing: str, path: Path) -> Iterator[None]:
    """Have what the system refuses in the block told by what was done, and the path.

    Raises:
        DminError: see :func:`os_failure`.
    """
    try:
        yield
    except OSError as error:
        raise os_failure(doing, path, error) from error


def machine_failure(error: BaseException) -> DminError | None:
    """Say what the machine refused, be it disk, memory or a folder; None if it is a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return DminError(
            f"This machine has not enough memory ({text or 'an allocation failed'}): close "
            "other programs, or lower collect.microbatch, collect.block_size, retrieve.rows or "
            "data.workers. Sealed blocks are kept."
        )
    native = re.search(r"\(os error (\d+)\)", text)  # as safetensors says it
    if native and int(native[1]) != errno.ENOENT:
        error = OSError(int(native[1]), os.strerror(int(native[1])))
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    if error.filename is None and error.errno == errno.ENOENT:  # os.getcwd
        return DminError(
            "The folder that this command was started in no longer exists: change to another one "
            "(cd), and run the command again."
        )
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if error.errno == errno.ENOENT and (path is None or path.parent.is_dir()):
        return None  # of a file that dmin should have made, or looked for
    return os_failure("use", path or Path("a result, record or log of this command"), error)


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file to be written so that it is there whole or not at all.

    Args:
        path: the file.
        overwrite: replace a file of this name; otherwise the file that is there first stays.
        durable: hold this even after a power failure, for which the disk is waited for.

    Yields:
        A temporary file beside it, which takes its name in the end.

    Raises:
        FileExistsError: there is such a file, and it may not be overwritten.
        OSError: it was not written; the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if overwrite:
            os.rename(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, this fails if the name is taken
    except OSError as error:
        error.filename = error.filename or str(path)  # what only writes knows no name
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if not durable:
        return
    # Some network file systems cannot sync a directory; the file is whole there all the same.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def commit(
    path: Path, content: bytes | memoryview, *, overwrite: bool = True, durable: bool = True
) -> None:
    """Write a file of these bytes, see :func:`replacing`."""
    with replacing(path, overwrite=overwrite, durable=durable) as file:
        file.write(content)


def read_regular(path: Path, most: int) -> bytes:
    """Return what an ordinary file holds; a pipe in its place would make the reader wait for ever.

    Raises:
        OSError: it is no ordinary file, holds more than so many bytes, or cannot be read.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def append(path: Path, text: str) -> None:
    """Add a text to an ordinary file, which is made if it is not there; follow no link.

    Raises:
        OSError: it is something else, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(_without_waiting(str(path), flags), "a") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        file.write(text)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def endless(path: Path) -> bool:
    """Return whether a path is none that can be read to its end: a pipe, a socket, a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
