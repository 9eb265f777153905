"""``model=auto``: detect the family of a checkpoint from its small files."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import diffusers
from safetensors import SafetensorError, safe_open

from dmin.models.base import DiffusionModel
from dmin.models.relatives import all_families, claimants, pipeline_kind, reason
from dmin.runtime.errors import DminError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
"""Pattern of names of repositories on the Hub."""


class Recognised(NamedTuple):
    """The family of a checkpoint, and the evidence for it."""

    family: str  # its name in ``model=``
    evidence: str


def auto(path: str | Path, **settings: Any) -> DiffusionModel:
    """Load a checkpoint as a model of the family that its files determine.

    Args:
        path: folder with ``model_index.json``, or name of a repository on the Hub.
        settings: settings of the family, and ``single_file``, ``subfolder``, ``revision``.

    Raises:
        DminError: no family supports it, or the checkpoint is incomplete.
    """
    found = all_families()[recognise(path, **where(settings)).family]
    model: DiffusionModel = found.from_pretrained(path, **settings)
    return model


def where(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model that, besides its path, locate the checkpoint."""
    names = ("single_file", "subfolder", "revision")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def recognise(
    path: str | Path,
    *,
    single_file: str | Path | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
) -> Recognised:
    """Return the family of a checkpoint from its small files.

    Args:
        path: folder, or name on the Hub.
        single_file: file with weights in the original layout.
        subfolder: folder inside ``path`` with the pipeline.
        revision: branch, tag or commit on the Hub.

    Raises:
        DminError: no family supports it, or file and folder belong to different families.
    """
    place = Path(path, subfolder or "")
    for setting, given in (("path", path), ("single_file", single_file)):
        if given is not None and Path(given).suffix in PICKLES:
            refuse_pickle(given, f"model.{setting}")
    if place.suffix == ".safetensors" and place.is_file():
        family = of_tensors(tensor_names(place))
        raise DminError(
            f"model.path={path} is a single file{f' of the family {family}' if family else ''}. "
            f"Set model.single_file={path}, and model.path=FOLDER of a pipeline of the same "
            f"version and size, for its configs and tokenizers."
        )
    if (place / "config.json").is_file() and not (place / "model_index.json").is_file():
        _refuse_part(place)
    name = pipeline_name(path, subfolder, revision)
    found = Recognised(of_pipeline(name, str(place)), f"a {name} by its model_index.json")
    if single_file is not None:
        family = of_tensors(tensor_names(Path(single_file)))
        known = all_families()
        if family and known[family].claims.keys != known[found.family].claims.keys:
            raise DminError(
                f"model.single_file={single_file} is of the family {family} by the names of its "
                f"tensors, and model.path={path} of {found.family}. Set model.path to a pipeline "
                f"of the file's family, version and size."
            )
    return found


def refuse_pickle(path: Any, setting: str) -> NoReturn:
    """Refuse a file that can run code when it is read.

    Raises:
        DminError: always.
    """
    raise DminError(
        f"{setting}={path} is a pickle, which can run code: convert it to .safetensors (diffusers' "
        f"scripts/convert_original_stable_diffusion_to_diffusers.py does, with "
        f"--from_safetensors off and --to_safetensors) if you trust it, and give the new file."
    )


def of_pipeline(name: str, what: str) -> str:
    """Return the family that claims a pipeline's class.

    Args:
        name: its kind, from ``pipeline_kind``.
        what: the checkpoint or object, for messages.

    Raises:
        DminError: none does (the message has all supported pipelines, and a template for a family
            of your own), or several do.
    """
    found = claimants(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise DminError(
            f"{what} is a {name}, which several families open: {', '.join(found)}. Choose one, for "
            f"example model={found[0]}."
        )
    opened = "; ".join(
        f"{family} ({', '.join((of.claims.pipelines[0], *of.claims.own))})"
        for family, of in sorted(all_families().items())
    )
    why = reason(name)
    rest = f": {why}." if why else f". A family of your own:\n\n{skeleton(name.split()[0])}"
    raise DminError(
        f"{what} is a {name}, which no family of dmin opens. It opens {opened}. This one is not "
        f"supported{rest}"
    )


def of_tensors(names: Iterable[str]) -> str | None:
    """Return the family that claims a single file: the one with most keys, all in the file."""
    text = "\n".join(names)
    known = {family: of.claims.keys for family, of in all_families().items()}
    found = [f for f, keys in known.items() if keys and all(key in text for key in keys)]
    return max(found, key=lambda family: len(known[family]), default=None)


def tensor_names(file: Path) -> list[str]:
    """Return the names of a file's tensors, from its header.

    Raises:
        DminError: it is not a ``.safetensors`` file.
    """
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise DminError(
            f"model.single_file={file} cannot be read as a .safetensors file ({error}). Other "
            f"kinds of files can run code when they are read: convert them first."
        ) from error


def pipelines_of_diffusers() -> list[str]:
    """Return the names of all pipelines of the installed diffusers."""
    found: Any = vars(import_module("diffusers.pipelines"))["_import_structure"].values()
    return sorted({name for names in found for name in names if name.endswith("Pipeline")})


def pipeline_name(path: str | Path, subfolder: str | None, revision: str | None) -> str:
    """Return the kind of pipeline in a folder or a repository on the Hub, from ``pipeline_kind``.

    Raises:
        DminError: there is none.
    """
    place = Path(path, subfolder or "")
    if not Path(path).exists() and (subfolder or not HUB.fullmatch(str(path))):
        raise DminError(
            f"model.path={place}: this folder does not exist. Give the one that save_pretrained "
            f"wrote (with model_index.json), or the name of one on the Hub."
        )
    try:
        where = str(place if Path(path).exists() or subfolder else path)
        index: Any = diffusers.DiffusionPipeline.load_config(where, revision=revision)
        return pipeline_kind(index, index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DminError(
            f"model.path={place} is not a diffusers pipeline ({' '.join(str(error).split())}). "
            f"Give the folder that save_pretrained wrote (with model_index.json), or the name of "
            f"one on the Hub."
        ) from error


def _refuse_part(folder: Path) -> NoReturn:
    """Refuse the folder of a single network, as trainers save checkpoints, with the remedy."""
    try:
        held = json.loads((folder / "config.json").read_text("utf-8")).get("_class_name", "model")
    except (OSError, ValueError, AttributeError):
        held = "model"
    of = sorted(name for name, family in all_families().items() if family.claims.network == held)
    known = f" (as in model={' or model='.join(of)})" if of else " (which no family has)"
    base = folder.parent if (folder.parent / "model_index.json").is_file() else "PIPELINE"
    raise DminError(
        f"model.path={folder} contains only a {held}{known}, without encoders and scheduler. Set "
        f"model.path={base}, the pipeline that it was trained in"
        + ("." if base == folder.parent else f", and model.ema={folder}, the trained weights.")
    )


def skeleton(pipeline: str) -> str:
    """Return a template of the code of a family for a pipeline's class."""
    found = _arguments(getattr(diffusers, pipeline, None), "__init__")
    part = "unet" if "unet" in found else "transformer"
    kind = str(found[part].annotation) if part in found else "TheNetwork"
    kind = kind.rpartition(".")[2].strip("'>")
    forward = ", ".join(_arguments(getattr(diffusers, kind, None), "forward")) or "unknown"
    encode = ", ".join(_arguments(getattr(diffusers, pipeline, None), "encode_prompt")) or "unknown"
    return f'''\
# my_family.py, then: dmin doctor --config-dir my_conf model=my_family (docs/own_models.md)
from dmin.models.families.flow import Flow  # or conditioning.LongCaptioned, of other processes
from dmin.models.relatives import Claims

class {pipeline.removesuffix("Pipeline")}(Flow):
    family = "my_family"
    claims = Claims("{kind}", ("{pipeline}",))
    network_name = "{part}"
    # encode_prompt takes {encode}
    encoding = {{"do_classifier_free_guidance": False}}
    encoded = ("encoder_hidden_states",)  # the network's names of its results

    def _told(self, noised, condition):
        # forward takes {forward}
        return dict(condition)'''


def _arguments(kind: Any, method: str) -> dict[str, inspect.Parameter]:
    """Return the arguments of a method of a diffusers class; none if a library is missing."""
    if kind is None or "dummy" in kind.__module__ or not hasattr(kind, method):
        return {}
    taken = dict(inspect.signature(getattr(kind, method)).parameters)
    return {name: value for name, value in taken.items() if name != "self"}
