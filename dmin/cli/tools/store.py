"""``dmin store <operation> <paths> [key=value]``, without configuration, model and torch."""

import json
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
    "info": ("STORE", (), (), "print what a store contains, as JSON"),
    "verify": ("STORE", (), (), "check every byte and every value"),
    "merge": ("SOURCE... TARGET", (), (), "join parts of one collection"),
    "append": ("SOURCE TARGET", (), ("restore",), "add the rows of SOURCE to TARGET"),
    "remove": ("STORE [ID...]", (), ("ids", "where", "encodings"), "remove examples from answers"),
    "metadata": (
        "STORE [FOLDER]",
        (),
        ("label", "text", "layout", "condition_image", "same_images"),
        "update metadata from the data",
    ),
    "import": (
        "SOURCE TARGET",
        (),
        ("sketch", "ids", "dtype"),
        "read an export, or other sketches",
    ),
    "fold": ("SOURCE TARGET", ("dim",), ("dtype",), "reduce the dimension of the sketch"),
    "convert": ("SOURCE TARGET", ("dtype",), (), "change the type, such as dtype=int8_parts"),
    "compact": ("SOURCE TARGET", (), (), "write few large segments, without removed rows"),
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
A TARGET is a new directory (or file), except for append; sources never change. An operation that
was interrupted continues when you run it again, except export. Removed examples are left out of
all answers and of all stores made from this one, unless restore=true; compact deletes their bytes.
ids=FILE has one id a line, where=COLUMN:VALUE selects rows by their metadata. metadata changes no
row: images, labels and captions must be those that were collected. Give FOLDER if the store has no
settings, or if the images have moved.

examples:
  dmin store info outputs/stores/digits-train-0123456789abcdef
  dmin store fold outputs/stores/digits-train-0123456789abcdef small dim=1024 dtype=int8
"""


def run(arguments: Sequence[str]) -> None:
    """Run one operation, and report it."""
    print(printable(_run(arguments)))


def _run(arguments: Sequence[str]) -> str:
    from dmin.cli.config.store_settings import follow
    from dmin.store import Store, maintenance as operations
    from dmin.store.export import export
    from dmin.store.revisions import append

    name, paths, settings = _parsed(arguments)
    if name == "merge":
        done = operations.merge(paths[:-1], paths[-1])
        follow(paths[0], paths[-1])
        return f"{done.path}: {len(done):,} of {done.manifest.num_examples:,} rows"
    if name == "verify":
        done = operations.verify(paths[0])
        return f"{done.path}: {len(done):,} rows are sound"
    if name == "append":
        done = append(paths[1], paths[0], restore=settings.get("restore", False))
        return f"{done.path}: {len(done):,} rows"
    if name == "import":
        from dmin.store.interchange import import_store

        ids = _lines(settings["ids"]) if "ids" in settings else None
        said = {key: settings[key] for key in ("sketch", "dtype") if key in settings}
        done = import_store(paths[0], paths[1], ids=ids, **said)
        return f"{done.path}: {len(done):,} rows"
    if name == "metadata":
        from dmin.collect.described import refresh_metadata

        data = _data_of(Store(paths[0]), paths[1:], settings)
        done = refresh_metadata(paths[0], data, settings.get("same_images", False))
        return f"{done.path}: {len(done):,} rows have the current metadata of the data"
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
    return f"{done.path}: {len(done):,} rows, {size / 1024:,.1f} KiB per example"


def _remove(store: "Store", ids: list[str], settings: dict[str, str]) -> str:
    from dmin.store.removal import known_copies, remove

    if "ids" in settings:
        ids += _lines(settings["ids"])
    if "where" in settings:
        column, _, value = settings["where"].partition(":")
        pairs = zip(store.ids, store.metadata, strict=True)
        found = [id for id, entry in pairs if column in entry and str(entry[column]) == value]
        if not found:
            raise DminError(f"where={settings['where']}: no example has {column} = {value}.")
        ids += found
    file = remove(store, ids, settings.get("encodings"))
    left = type(store)(store.path)
    copies = ", ".join(map(str, known_copies(store.path))) or "none that it knows of"
    return (
        f"{file}: {len(store) - len(left):,} removed, {len(left):,} rows are left.\nThey are left "
        "out of all answers; indices and cached encodings with them are deleted. To delete their "
        f"rows and ids too, run `dmin store compact {store.path} NEW`, then delete "
        f"{store.path}.\nRemove them yourself from copies and exports of the store ({copies}; dmin "
        "cannot know of others), from earlier results (rankings, pages with their pictures), and "
        "from the data."
    )


def _data_of(store: "Store", folders: list[Path], settings: dict[str, Any]) -> Any:
    """Return the data of a store from its settings, or from a folder of images.

    Raises:
        DminError: it has no settings, or a folder is given and the data were not a folder.
    """
    from dmin.data.image_folder import ImageFolder

    if not folders:
        from omegaconf import OmegaConf

        from dmin.cli.config.store_settings import read
        from dmin.cli.workspace.built import build

        found = read(store.path, "collect", ("model", "sketch", "timesteps", "noise"), trust=False)
        return build(OmegaConf.create(found).data)
    said = store.manifest.dataset
    if said.get("name") != ImageFolder.__name__:
        raise DminError(
            f"{store.path} was collected from {said.get('name')}, not from a folder of "
            f"images. In Python, refresh_metadata(store, dataset) of dmin.collect.described "
            f"takes any dataset."
        )
    known = ["size", "mode", "crop", "resize", "background"]
    known += ["aspect", "bucket_step", "bucket_shapes", "bucket_ratio", "upscale"]
    options = {name: said[name] for name in known if name in said}
    told = ("label", "text", "layout", "condition_image")
    options |= {name: settings[name] for name in told if name in settings}
    return ImageFolder(folders[0], **options, on_error="skip" if said.get("skipped") else "raise")


def _lines(file: str) -> list[str]:
    try:
        return [line for line in Path(file).read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DminError(
            f"ids={file} cannot be read ({error}): give a text file with one id in each line."
        ) from error


def _parsed(words: Sequence[str]) -> tuple[str, list[Path], dict[str, Any]]:
    """Return operation, paths and settings."""
    name, *rest = words or [""]
    if name not in OPERATIONS:
        near = did_you_mean(name, OPERATIONS)
        known = f"Operations: {', '.join(OPERATIONS)}."
        raise DminError(" ".join(filter(None, (f"dmin store {name} does not exist.", near, known))))
    form, needed, allowed, _ = OPERATIONS[name]
    parser = Arguments(f"store {name}")
    parser.add_argument("paths", nargs="*", type=Path)
    for key in (*needed, *allowed):
        kind = {"dim": _whole, "restore": _truth, "same_images": _truth}.get(key, str)
        parser.add_argument(f"--{key}", type=kind)
    found = vars(parser.read(rest))
    paths = found.pop("paths")
    settings = {key: value for key, value in found.items() if value is not None}
    if lacking := [key for key in needed if key not in settings]:
        raise DminError(f"dmin store {name} needs {lacking[0]}=..., see dmin store --help.")
    least = len([each for each in form.split() if not each.startswith("[")])
    if not least <= len(paths) <= (len(paths) if "..." in form else len(form.split())):
        raise DminError(f"dmin store {name} takes {form}, but {len(paths)} paths are given.")
    return name, paths, settings


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise DminError(f"{text} is neither true nor false.")
    return text == "true"


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise DminError(f"dim={text}: give a whole number, such as dim=1024.")
    return int(text)
