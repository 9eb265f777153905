"""Read all files of a dataset once: what each contains, and whether it can be read at all."""

import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dmin.data.pixels import Unreadable
from dmin.runtime.errors import DminError
from dmin.runtime.files import ENDLESS, commit, endless, naming
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.progress import followed

LARGE = 64 << 20
"""If at least so many bytes are read, show a progress bar and cache the results on disk."""

MANY = 2000
"""The same for rows of a table."""

# Two changes of a file within one tick of the file system's clock have the same time, so results
# of files that changed so recently are not cached.
_SETTLED_NS = 2_000_000_000


class Survey(NamedTuple):
    """The results of reading all files."""

    found: dict[str, Any]  # file -> result, for readable files
    problems: dict[str, str]  # file -> why it cannot be read


class Rows(NamedTuple):
    """The results of reading a table."""

    problems: dict[int, str]  # row -> the problem with it
    digest: str  # digest of the texts of the other rows
    sums: list[str]  # digest of the text of every row


def read_bytes(path: Path, name: str) -> bytes:
    """Return the content of a file.

    Args:
        path: the file.
        name: name of the file in messages.

    Raises:
        Unreadable: the file does not exist or cannot be read.
    """
    try:
        if not endless(path):
            return path.read_bytes()
        reason = f"it is a {ENDLESS}"
    except FileNotFoundError:
        reason = "there is no such file, or it is a broken link"
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    except ValueError:  # it holds a zero byte
        reason = "this is not a valid file name"
    raise Unreadable(name, reason)


def files_below(
    folder: Path, left: dict[str, str], inside: str = "", above: frozenset[Any] = frozenset()
) -> Iterator[str]:
    """Yield the paths of the files below a folder, relative to it, in order; links are followed.

    Args:
        folder: the folder.
        left: receives hidden files and special files, with the reason why they are left out.
        inside: the folder's path relative to the outermost one.
        above: (device, inode) of the folders that contain this one.
    """
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:
        return  # a link to a folder that contains this one
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DminError(
            f"{folder} cannot be listed ({error.strerror}). Grant read permission."
        ) from error
    for name in names:
        if name.startswith((".", "__")):
            left[f"{inside}{name}"] = "hidden"
        elif os.path.isdir(folder / name):
            yield from files_below(folder / name, left, f"{inside}{name}/", above | {here})
        elif endless(folder / name):
            left[f"{inside}{name}"] = ENDLESS
        else:
            yield f"{inside}{name}"


def survey(
    root: Path,
    files: Sequence[str],
    look: Callable[[Path, str], Any],
    settings: dict[str, Any],
) -> Survey:
    """Read every file once, several in parallel.

    For large folders the results are cached by size, times of change and inode, so that later
    commands need not read unchanged files. The cache is in the user's cache folder
    (``$XDG_CACHE_HOME/dmin``), not next to the data, which is often read-only and shared. Failures
    are not cached. Deleting the cache is always safe.

    Args:
        root: the folder.
        files: paths of the files below it.
        look: a function of a file and its name that returns a result as JSON (such as a digest),
            or raises :class:`Unreadable`.
        settings: the settings on which results depend.
    """
    record = _record_path(root, settings)
    known, stamps = _load(record), {file: _stamp(root / file) for file in files}
    fresh = [file for file in files if known.get(file, [])[:4] != stamps[file]]
    amount = sum(stamps[file][0] for file in fresh)
    found = {file: known[file][4] for file in set(files).difference(fresh)}
    problems = {}

    def read(file: str) -> tuple[Any, str | None]:
        try:
            return look(root / file, file), None
        except Unreadable as error:
            return None, error.reason

    now = time.time_ns()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looked: Iterable[tuple[Any, str | None]] = pool.map(read, fresh)
        if amount >= LARGE:
            looked = followed(looked, f"reading {root.name}", len(fresh), "files", transient=True)
        for file, (outcome, problem) in zip(fresh, looked, strict=True):
            if problem is None:
                found[file] = outcome
            else:
                problems[file] = problem
    if amount >= LARGE:
        settled = {f: o for f, o in found.items() if stamps[f][2] < now - _SETTLED_NS}
        _save(record, known | {file: [*stamps[file], o] for file, o in settled.items()})
    return Survey(found, problems)


def survey_rows(
    rows: int, look: Callable[[int], tuple[str, str | None]], settings: dict[str, Any]
) -> Rows:
    """Read every row of a table once, several in parallel.

    The results of a large table without problems are cached in the user's cache folder.

    Args:
        rows: number of rows.
        look: returns what gradients of a row depend on, as text, and the problem with it, if any.
        settings: the settings on which results depend, with a fingerprint of the table.
    """
    record, large = _record_path(Path("/"), settings), rows >= MANY
    known = _load(record) if large else {}
    if {"digest", "sums"} <= known.keys():
        return Rows({}, known["digest"], known["sums"])
    digest, sums, problems = hashlib.sha256(), [], {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looked: Iterable[tuple[str, str | None]] = pool.map(look, range(rows))
        if large:
            looked = followed(looked, "reading the table", rows, "rows", transient=True)
        for at, (text, wrong) in enumerate(looked):
            sums.append(hashlib.sha256(text.encode()).hexdigest()[:16])
            if wrong is None:
                digest.update(f"{text}\n".encode())
            else:
                problems[at] = wrong
    found = Rows(problems, digest.hexdigest()[:16], sums)
    if large and not problems:
        _save(record, {"digest": found.digest, "sums": sums})
    return found


def _stamp(path: Path) -> list[int]:
    try:
        if path.is_dir():  # a clip of frames, which changes with each of them
            parts = [_stamp(file) for file in sorted(path.iterdir())]
            sizes, times, changes, nodes = zip(*parts, strict=True) if parts else ([0],) * 4
            return [sum(sizes), max(times), max(changes), sum(nodes)]
        found = path.stat()
    except (OSError, ValueError):
        return [0] * 4
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _record_path(root: Path, settings: dict[str, Any]) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dmin" / f"{fingerprint({'root': str(root.resolve()), **settings})}.json"


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or incomplete: read the files instead
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _save(path: Path, entries: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        commit(path, json.dumps(entries).encode())
    except OSError:
        return  # on a full or read-only disk, files are read again next time


def expand(pattern: str) -> list[Path]:
    """Return the files of a pattern of shards, such as ``data/*.tar`` or ``data/{000..041}.tar``.

    Raises:
        DminError: there is none, or one that is listed in braces is missing.
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces:
        head, tail = pattern[: braces.start()], pattern[braces.end() :]
        inside = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        if inside:
            first, last = inside.groups()
            numbers = range(int(first), int(last) + 1)
            choices = [str(number).zfill(len(first)) for number in numbers]
        else:
            choices = braces[1].split(",")
        return [path for choice in choices for path in expand(f"{head}{choice}{tail}")]
    with naming("look for shards at", Path(pattern)):
        is_pattern = glob.has_magic(pattern) and not Path(pattern).is_file()
        found = [Path(n) for n in sorted(glob.glob(pattern))] if is_pattern else [Path(pattern)]
        absent = [path for path in found if not path.is_file()]
    if absent or not found:
        raise DminError(
            f"data.shards: there is no {absent[0] if absent else pattern}. Give tar files, such as "
            f"data/*.tar or data/{{000..041}}.tar."
        )
    return found
