"""Parse a command line: a store, pictures, a few options, and settings for Hydra.

    dmin COMMAND [STORE] [PICTURE...] [--prompt TEXT] [--model PATH] [--limit N] [setting=value ...]

The settings of the store and of the options become the root that Hydra composes; overrides win.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dmin.cli.config.auto import opened
from dmin.cli.config.groups import config_directory
from dmin.cli.config.shorthand import kind_of
from dmin.cli.config.store_settings import GROUPS, read
from dmin.cli.tools.arguments import Arguments
from dmin.runs import checkpoints
from dmin.runs.recognise import read_run
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

ROOT = "line"
_OTHER_ROOT = ("--config-name", "-cn", "--config-path", "-cp")
_READING = ("sample", "retrieve", "serve", "outliers", "losses", "evaluate")
OF_A_STORE = ("collect", "doctor", *_READING)
WITH_PICTURES = {"retrieve": "pictures", "losses": "pictures that were held out"}


class Line(NamedTuple):
    """A parsed command line."""

    words: list[str]  # store, pictures and options: another process of the same job needs them too
    settings: list[str]  # overrides and options of Hydra
    root: dict[str, Any] | None  # what Hydra composes; None: conf/dmin.yaml as it is
    notes: Sequence[str] = ()  # lines to be printed before anything is loaded


def parse(command: str, arguments: Sequence[str]) -> Line:
    """Parse the words after ``dmin <command>``, and read the settings of a store among them.

    Raises:
        DminError: a word is neither a store, a picture nor a setting; the store's settings cannot
            be used; or an option is not one of the command.
    """
    options, rest = _options(command, arguments)
    overrides = get_args_parser().parse_intermixed_args(rest).overrides
    paths = [word for word in overrides if _is_path(word)]
    of_run = [word for word in overrides if word.startswith(("run=", "run."))]
    settings = [word for word in rest if word not in {*paths, *of_run}]
    own = [word for key, value in options.items() for word in _spelled(key, value)] + of_run
    if not paths and not own:
        return Line([], opened(settings), None)
    given = {word.partition("=")[0].lstrip("+~") for word in settings if "=" in word}
    store, pictures = _store_and_pictures(command, paths, given | ({"model"} if of_run else set()))
    named = given | ({"model.path"} if options["model"] else set())
    root = read(store, command, named, options["trust"]) if store and is_store(store) else {}
    clash = [word for word in rest if word in _OTHER_ROOT or word.startswith("experiment=")]
    if clash and (root or not clash[0].startswith("experiment=")):
        raise DminError(
            f"{clash[0]} and {store or own[0]} both have settings. Leave one of them out."
        )
    run = None
    if of_run:
        if root:
            raise DminError(f"{store} and {of_run[0]} both have settings. Leave one of them out.")
        run = _read_run(of_run, _of_line(settings, options["model"]))
        sections = ("model", "collect", "name", *({"data", "noise"} - given))
        root = {key: _literals(getattr(run, key)) for key in sections}
        root |= _over_checkpoints(run, settings, given)
    chosen = {group for group in GROUPS if "_target_" in root.get(group, {})}
    defaults: list[Any] = [{f"override {group}": None} for group in GROUPS if group in chosen]
    if run is not None and "model" not in given:
        defaults.append({"override model": run.family})
    prompts = options["prompt"] or [each for each in (options["concept"],) if each is not None]
    queries = _queries(pictures, prompts, given) | _part(options, pictures, given)
    if queries and "queries" not in given:
        defaults.append({"override queries": kind_of(queries, root.get("data"), settings)})
    steps = _numbers("timesteps", options["timesteps"], "some of the store's, such as 100,300")
    said = {
        "model": _only(
            path=options["model"] and _literal(options["model"]),
            query_without=options["without"] and _literal(options["without"]),
        ),
        "collect": _only(path=store and _literal(str(store)), limit=options["limit"]),
        "queries": queries,
        "retrieve": _only(places=options["places"], timesteps=steps),
        "losses": {"held_out": True} if pictures and command == "losses" else {},
    }
    for section, values in said.items():
        if values:
            root[section] = root.get(section, {}) | values
    composed = {"defaults": ["dmin", *defaults, "_self_"], **root}
    settings = settings if chosen or run else opened(settings)
    return Line([*paths, *own], settings, composed, run.lines() if run else ())


def _of_line(settings: Sequence[str], path: str | None) -> dict[str, str]:
    """Return the command line's settings of model and data, which override those of a run."""
    names = {"model": "family", "model.path": "path", "model.adapter": "adapter", "data": "data"}
    pairs = (word.partition("=") for word in settings if word != "model=auto")
    said = {names[key]: value for key, _, value in pairs if key in names and value != "null"}
    return said | _only(path=path)


def _read_run(words: Sequence[str], said_on_line: Mapping[str, str]) -> TrainingRun:
    """Return the trainer's run that ``run=PATH run.ignore=[key]`` names."""
    said = dict(word.split("=", 1) for word in words)
    if strange := said.keys() - {"run", "run.root", "run.ignore", "run.draws"}:
        raise DminError(
            f"{strange.pop()} is not a setting of a run, which are run.root, run.ignore and "
            "run.draws."
        )
    if "run" not in said:
        raise DminError(f"{words[0]} needs run=PATH, which is missing.")
    draws, root = said.get("run.draws", "1"), said.get("run.root")
    if not draws.isdecimal() or not int(draws):
        raise DminError(f"run.draws={draws}: give a whole number, 1 or more.")
    ignored = [key.strip() for key in said.get("run.ignore", "").strip("[]").split(",")]
    return read_run(
        Path(said["run"]).expanduser(),
        None if root is None else Path(root).expanduser(),
        [key for key in ignored if key],
        int(draws),
        said_on_line,
    )


def _over_checkpoints(
    run: TrainingRun, settings: Sequence[str], given: Collection[str]
) -> dict[str, Any]:
    """Return the run's checkpoints and weights, for methods that average over checkpoints."""
    chosen = next((word[7:] for word in settings if word.startswith("method=")), "")
    file = config_directory() / f"method/{chosen}.yaml"
    own = set(OmegaConf.load(file)) if file.is_file() else set()
    if not {"checkpoints", "weights"} <= own or "method.checkpoints" in given:
        return {}
    return {"method": _literals(checkpoints.settings(run, chosen, "method.weights" not in given))}


def register(line: Line) -> str:
    """Register the root configuration of a line with Hydra; return its name."""
    if line.root is None:
        return "dmin"
    configurations = ConfigStore.instance()
    configurations.store(ROOT, line.root)
    configurations.store(f"{ROOT}_words", {"words": line.words})
    return ROOT


def words() -> list[str]:
    """Return the words of the line that was registered."""
    return list(ConfigStore.instance().load(f"{ROOT}_words.yaml").node.words)


def is_store(path: Path) -> bool:
    """Return whether a folder is a store."""
    return (path / "manifest.json").is_file()


def _options(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return dmin's own options, and the remaining words."""
    parser = Arguments(command)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--concept")
    parser.add_argument("--without")
    parser.add_argument("--region")
    parser.add_argument("--mask")
    parser.add_argument("--against")
    parser.add_argument("--places", type=int)
    parser.add_argument("--timesteps")
    found, rest = parser.parse_known_args(arguments)
    if found.limit is not None and command not in OF_A_STORE:
        raise DminError(
            f"--limit={found.limit} is not an option of `dmin {command}`, only of commands that "
            f"use the training examples: {', '.join(OF_A_STORE)}."
        )
    of_a_picture = ("region", "mask", "against", "places", "timesteps")
    for option in ("prompt", "concept", "without", *of_a_picture):
        those = ("retrieve", "sample") if option == "prompt" else ("retrieve",)
        if getattr(found, option) and command not in those:
            named = " and ".join(f"`dmin {each}`" for each in those)
            raise DminError(f"--{option} is an option of {named}, not of `dmin {command}`.")
    said = [each for each in (found.concept, found.without) if each is not None]
    if said and (len(set(said)) < 2 or found.prompt):
        raise DminError(
            f"--concept {found.concept!r} --without "
            f"{found.without!r}{' and --prompt' if found.prompt else ''}: give a concept by "
            "exactly two different prompts and no other: --concept 'a red fox' --without 'a fox'."
        )
    return vars(found), rest


def _only(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _spelled(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}={each}" for each in value]
    return [f"--{key}"] if value is True else [f"--{key}={value}"] if value else []


def _is_path(word: str) -> bool:
    """Distinguish a path from an override; a path with a ``=`` is written ``./a=b``."""
    return word.startswith(("/", "./", "../", "~/")) or (
        "=" not in word and not word.startswith(("~", "+"))
    )


def _store_and_pictures(
    command: str, paths: Sequence[str], given: Collection[str]
) -> tuple[Path | None, list[str]]:
    """Return the store, if one is named, and the pictures."""
    found = [Path(word).expanduser() for word in paths]
    stores = [path for path in found if is_store(path)]
    others = [path for path in found if path not in stores]
    if command not in OF_A_STORE and found:
        raise DminError(f"`dmin {command}` takes settings (setting=value), and got {paths[0]}.")
    if len(stores) > 1:
        raise DminError(f"{stores[0]} and {stores[1]} are both stores. Give one of them.")
    if command == "collect" and not stores and len(others) == 1 and _is_free(others[0]):
        return others[0], []  # where a new one is to be
    absent = [path for path in others if not path.exists()]
    if absent or (others and command not in WITH_PICTURES):
        odd = (absent or others)[0]
        what = "there is no such file or folder" if absent else "it is not a store"
        pictures = f", {WITH_PICTURES[command]}" if command in WITH_PICTURES else ""
        raise DminError(
            f"{odd}: {what}. `dmin {command}` takes a store (a folder that `dmin collect` made)"
            f"{pictures} and settings (setting=value)."
        )
    if others and not stores and "model" not in given and "experiment" not in given:
        raise DminError(
            f"{others[0]} is given without a store: `dmin {command} STORE {others[0]}`, where "
            f"STORE is the folder that `dmin collect` made and printed."
        )
    return (stores[0] if stores else None), [str(path) for path in others]


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _queries(pictures: list[str], prompts: list[str], given: Collection[str]) -> dict[str, Any]:
    """Return the settings of the queries: pictures with their prompts, or prompts to generate."""
    said: list[Any] = [int(text) if text.isdecimal() else _literal(text) for text in prompts]
    if not pictures and "queries.root" not in given:
        return {"prompts": said} if said else {}
    if pictures and len(said) not in (0, 1, len(pictures)):
        raise DminError(
            f"--prompt is given {len(said)} times for {len(pictures)} pictures: give it once for "
            f"all of them, or once for each."
        )
    roots = [_literal(path) for path in pictures]
    asked = {"root": roots if roots[1:] else roots[0]} if roots else {}
    return asked | ({"prompt": said if len(said) > 1 else said[0]} if said else {})


def _part(options: dict[str, Any], pictures: list[str], given: Collection[str]) -> dict[str, Any]:
    """Return the settings of region, mask and the pictures to compare against."""
    region, mask, against = (options[name] for name in ("region", "mask", "against"))
    if region is mask is against is None:
        return {}
    if not pictures and "queries.root" not in given:
        raise DminError(
            "--region, --mask and --against need a picture, and none is "
            "given: `dmin retrieve STORE picture.png --region x,y,width,height`."
        )
    texts = {"mask": mask and _literal(mask), "against": against and _literal(against)}
    form = "x,y,width,height, four numbers of pixels or shares up to 1"
    return _only(region=_numbers("region", region, form), **texts)


def _numbers(option: str, said: str | None, form: str) -> list[float] | None:
    """Return numbers between commas."""
    try:
        return None if said is None else [float(part) for part in said.split(",")]
    except ValueError as error:
        raise DminError(f"--{option} {said}: give {form}.") from error


def _literals(value: Any) -> Any:
    """Escape values from a file, so that OmegaConf resolves nothing in them."""
    if isinstance(value, dict):
        return {key: _literals(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_literals(each) for each in value]
    return _literal(value) if isinstance(value, str) else value


def _literal(text: str) -> str:
    """Escape a text for OmegaConf."""
    return text.replace("${", "\\${")
