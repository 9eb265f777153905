"""``dmin store <operation> <paths> [key=value]``: no configuration, no model, no torch."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmin.cli.config.groups import did_you_mean
from dmin.cli.tools.arguments import Arguments
from dmin.runtime.errors import DminError
from dmin.runtime.escape import printable

if TYPE_CHECKING:
    from dmin.store import Store

# operation -> paths it takes, settings it needs, settings it may have, what it does
OPERATIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "info": ("STORE", (), (), "say what a store holds, as JSON"),
    "verify": ("STORE", (), (), "read every byte and every value"),
    "merge": ("SOURCE... TARGET", (), (), "put parts of one collection together"),
    "append": ("SOURCE TARGET", (), (), "put the rows of SOURCE behind those of TARGET"),
    "remove": ("STORE [ID...]", (), ("ids", "where"), "show some examples no more"),
    "import": (
        "SOURCE TARGET",
        (),
        ("sketch", "ids", "dtype"),
        "read what export wrote, or sketches",
    ),
    "fold": ("SOURCE TARGET", ("dim",), ("dtype",), "write the sketch of a smaller dim"),
    "convert": ("SOURCE TARGET", ("dtype",), (), "write float32, float16, bfloat16 or int8"),
    "compact": ("SOURCE TARGET", (), (), "write few large segments, without what was removed"),
    "export": ("SOURCE TARGET", ("format",), (), "write numpy, safetensors or parquet"),
}


PAGE = """
usage: dmin store OPERATION PATH... [setting=value ...]

operations:
"""
for _name, (_paths, _needed, _allowed, _what) in OPERATIONS.items():
    _settings = [f"{key}=..." for key in _needed] + [f"[{key}=...]" for key in _allowed]
    PAGE += f"  {' '.join([_name, _paths, *_settings]):<56}{_what}\n"
PAGE += """
A TARGET is a new directory (or file), but for append: sources never change. An operation that was
stopped goes on when it is given again, except export. What is removed is in no answer from then
on; its bytes go when the store is compacted. ids=FILE has an id a line, where=COLUMN:VALUE names
rows by their metadata.

examples:
  dmin store info outputs/stores/digits-train-0123456789abcdef
  dmin store fold outputs/stores/digits-train-0123456789abcdef small dim=1024 dtype=int8
"""


def run(arguments: Sequence[str]) -> int:
    """Run one operation; return the exit status, 1 with a message for what the user got wrong."""
    try:
        print(printable(_run(arguments)))
    except DminError as error:
        print(f"dmin: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: Sequence[str]) -> str:
    from dmin.cli.config.store_settings import follow
    from dmin.store import Store
    from dmin.store import maintenance as operations
    from dmin.store.export import export

    name, paths, settings = _parsed(arguments)
    if name == "merge":
        done = operations.merge(paths[:-1], paths[-1])
        follow(paths[0], paths[-1])
        return f"{done.path}: {len(done):,} of {done.manifest.num_examples:,} rows"
    if name == "verify":
        done = operations.verify(paths[0])
        return f"{done.path}: {len(done):,} rows are sound"
    if name == "append":
        done = operations.append(paths[1], paths[0])
        return f"{done.path}: {len(done):,} rows"
    if name == "import":
        from dmin.store.interchange import import_store

        ids = _lines(settings["ids"]) if "ids" in settings else None
        dtype = settings.get("dtype", "float16")
        done = import_store(paths[0], paths[1], settings.get("sketch"), ids, dtype)
        return f"{done.path}: {len(done):,} rows"
    store = Store(paths[0])
    if name == "remove":
        return _remove(store, [str(path) for path in paths[1:]], settings)
    if name == "info":
        return json.dumps(operations.info(store), indent=1, ensure_ascii=False)
    if name == "export":
        return str(export(store, paths[1], settings["format"]))
    changes = {"collect.dtype": settings["dtype"]} if "dtype" in settings else {}
    if name == "fold":
        done = operations.fold(store, paths[1], settings["dim"], settings.get("dtype"))
        changes["sketch.dim"] = settings["dim"]
    elif name == "convert":
        done = operations.convert(store, paths[1], settings["dtype"])
    else:
        done = operations.compact(store, paths[1])
    follow(paths[0], paths[1], changes)
    size = operations.info(done)["bytes an example"]
    return f"{done.path}: {len(done):,} rows, {size / 1024:,.1f} KiB an example"


def _remove(store: "Store", ids: list[str], settings: dict[str, str]) -> str:
    from dmin.store.revisions import remove

    if "ids" in settings:
        ids += _lines(settings["ids"])
    if "where" in settings:
        column, _, value = settings["where"].partition(":")
        pairs = zip(store.ids, store.metadata, strict=True)
        found = [id for id, entry in pairs if column in entry and str(entry[column]) == value]
        if not found:
            raise DminError(f"where={settings['where']}: no example has {column} = {value}.")
        ids += found
    file = remove(store, ids)
    left = type(store)(store.path)
    return f"{file}: {len(store) - len(left):,} removed, {len(left):,} rows are left"


def _lines(file: str) -> list[str]:
    try:
        return [line for line in Path(file).read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DminError(
            f"ids={file} cannot be read ({error}): name a text, an id a line."
        ) from error


def _parsed(words: Sequence[str]) -> tuple[str, list[Path], dict[str, Any]]:
    """Return operation, paths and settings."""
    name, *rest = words or [""]
    if name not in OPERATIONS:
        near = did_you_mean(name, OPERATIONS)
        known = f"Operations: {', '.join(OPERATIONS)}."
        raise DminError(" ".join(filter(None, (f"there is no dmin store {name}.", near, known))))
    form, needed, allowed, _ = OPERATIONS[name]
    parser = Arguments(f"store {name}")
    parser.add_argument("paths", nargs="*", type=Path)
    for key in (*needed, *allowed):
        parser.add_argument(f"--{key}", type=_whole if key == "dim" else str)
    found = vars(parser.read(rest))
    paths = found.pop("paths")
    settings = {key: value for key, value in found.items() if value is not None}
    if lacking := [key for key in needed if key not in settings]:
        raise DminError(f"dmin store {name} needs {lacking[0]}=..., see dmin store --help.")
    least = len([each for each in form.split() if not each.startswith("[")])
    if len(paths) < least or (len(paths) > least and "..." not in form):
        raise DminError(f"dmin store {name} takes {form}, and got {len(paths)} paths.")
    return name, paths, settings


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise DminError(f"dim={text}: give a whole number, such as dim=1024.")
    return int(text)
