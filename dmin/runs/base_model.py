"""The family of a run's base model, from its small files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import wording as say
from dmin.runs.files import Places, header, load, spelled
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import FLOWS, GIVEN
from dmin.runs.training_run import Entry, TrainingRun, shown
from dmin.runtime.errors import DminError


def take(
    run: TrainingRun,
    places: Places,
    text: str | None,
    kind: Any = None,
    known: Mapping[str, str | None] | None = None,
) -> None:
    """Take a run's base model: its family, and the settings that name it.

    Args:
        run: gets ``family`` and ``model``.
        places: finds paths; the user's own path and family take precedence.
        text: the run's name or path of the base model.
        kind: the run's name of the architecture.
        known: ``kind`` → family; None: read from the base model.

    Raises:
        DminError: the run names no base model, or its family is unknown.
    """
    expected = places.said.get("family")
    if known is not None and expected is None:
        if not isinstance(kind, str) or kind not in known:
            raise DminError(
                f"{run.source} trained {shown(kind)}, which no family of dmin opens. It "
                f"opens {', '.join(known)}; for your own model set model=… (docs/own_models.md)."
            )
        expected = known[kind]
    said, file = places.said.get("path"), places.seek(text, "base model")
    if said is None and text is None:
        raise DminError(f"{run.source} names no base model: set model.path=PATH.")
    if file is not None and file.is_file() and file.suffix == ".safetensors":
        if said is None or Path(said).is_file():
            raise DminError(
                f"{run.source}: its base model, {file}, is a single file without configs. Set "
                f"model.path=FOLDER to a diffusers pipeline of the same version and size."
            )
        run.family, run.model = settings_of(spelled(file), expected)
        run.model["path"] = said
        meaning = f"model={run.family}, model.single_file; configs at your model.path"
        run.taken.append(Entry("base model", spelled(file), meaning))
        return
    path = said or str(places.maybe(text, "base model"))
    run.family, run.model = settings_of(path, expected)
    meaning = f"model={run.family}" + ("" if said is None else ", at your model.path")
    run.taken.append(Entry("base model", path, meaning))


def predicts(keys: Keys, key: str, kind: str) -> None:
    """Compare the prediction type of a run with that of the base model's scheduler.

    Args:
        keys: of the config; the run's base model is known.
        key: the key that gives the prediction type.
        kind: ``epsilon``, ``v_prediction`` or ``sample``.
    """
    if keys.run.family in FLOWS:
        return
    file = Path(keys.run.model.get("path") or "") / "scheduler/scheduler_config.json"
    told = Keys(load(file), keys.run).get("prediction_type", "epsilon") if file.is_file() else kind
    if told != kind:
        meaning = f"{file} has {shown(told)}: set prediction_type to {kind} there"
        keys.note(keys.run.other, key, kind, meaning)
    elif kind != "epsilon":
        keys.note(keys.run.taken, key, kind, say.PREDICTION)


def _given(family: str) -> str:
    return family if family in GIVEN else ""


def settings_of(path: str, expected: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the family of a base model and the settings that name it.

    Args:
        path: a folder saved by diffusers, a single file, or a name on the Hub.
        expected: family given by the config; required for a name on the Hub.

    Raises:
        DminError: the family is unknown, or differs from the config's.
    """
    from dmin.models import recognition  # imports torch

    place = Path(path)
    if place.suffix in recognition.PICKLES:
        recognition.refuse_pickle(place, "base model")
    if (place / "model_index.json").is_file():
        name = recognition.pipeline_name(place, None, None)
        found: str | None = recognition.of_pipeline(name, str(place))
    elif place.is_file():
        found = recognition.of_tensors(header(place)) or expected
    elif place.is_dir():
        raise DminError(f"{place} has no model_index.json: give the folder of a complete pipeline.")
    else:
        found = expected
    if found is None:
        raise DminError(
            f"{path}: this folder or file does not exist, and the family of a model on a hub is "
            f"unknown. Set model=FAMILY, or give the folder of the run's files as run.root=FOLDER."
        )
    # A trainer may use one name for a family and its variant with a second image: the files decide.
    if expected is not None and found != expected and f"{expected}_" not in _given(found):
        raise DminError(
            f"{path} is of the family {found}, and the run, or model= on the command line, "
            f"says {expected}: give the base model that it was trained on, model.path=PATH."
        )
    if place.is_file():
        return found, {"single_file": path}
    return found, {"path": path}
