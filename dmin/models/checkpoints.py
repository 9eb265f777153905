"""Load pipelines and replacement weights, with errors that say what to do."""

import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmin.models.adapters.quantised import plain
from dmin.models.recognition import HUB, PICKLES, refuse_pickle, tensor_names
from dmin.models.relatives import check_checkpoint, pipeline_of
from dmin.runtime.errors import DminError

DType = Literal["float32", "bfloat16", "float64"]
"""Not float16, which rounds gradients of a mean over pixels to zero."""

_SHAPES_ALONE: ContextVar[bool] = ContextVar("shapes_alone", default=False)

_IN_FILE = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        *("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    ),
    # The second encoder of the base model, the only one of the refiner.
    "text_encoder_2": (
        *("conditioner.embedders.1.", "conditioner.embedders.0.model.", "text_encoders.clip_g."),
    ),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""Prefixes of the components' weights in single files of Stable Diffusion and Flux."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Context in which pipelines are loaded on ``meta``, with shapes but no weights."""
    token = _SHAPES_ALONE.set(True)
    try:
        yield
    finally:
        _SHAPES_ALONE.reset(token)


def load_pipeline(
    family: str,
    path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    torch_dtype: DType = "float32",
    subfolder: str | None = None,
    single_file: str | Path | None = None,
    **components: Any,
) -> Any:
    """Load a pipeline with its own ``from_pretrained`` or ``from_single_file``.

    Args:
        family: name of the family in ``model=``.
        path: folder of a saved pipeline, or name of a repository on the Hub.
        variant: variant of the weight files, such as ``fp16``.
        revision: branch, tag or commit on the Hub.
        torch_dtype: dtype of all weights: ``float32``, ``bfloat16`` or ``float64``.
        subfolder: folder inside ``path`` with the pipeline.
        single_file: ``.safetensors`` file with weights in the original layout; configs, tokenizers
            and missing components (often all but the network) are then read from ``path``.
        components: replacements of the checkpoint's components, such as ``safety_checker=None``,
            or functions that read them from its path.

    Raises:
        DminError: there is no such checkpoint, or it belongs to another pipeline.
    """
    if torch_dtype not in get_args(DType):
        raise DminError(
            f"model.torch_dtype={torch_dtype!r}: allowed are float32, bfloat16 and float64 "
            f"(float16 rounds small gradients to zero)."
        )
    pipeline_class = pipeline_of(family)
    source = Path(path, subfolder) if subfolder else Path(path)
    is_local = Path(path).exists()
    is_hub = not is_local and HUB.fullmatch(str(path)) and not subfolder
    if not is_hub and not (source / "model_index.json").is_file():
        raise DminError(
            f"model.path={path}{f', model.subfolder={subfolder}' if subfolder else ''}: there "
            f"is no diffusers checkpoint (no model_index.json). Give the folder that "
            f"{pipeline_class.__name__}.save_pretrained wrote, or the name of one on the Hub."
        )
    if is_local:
        _refuse_code(source)
        _check_variant(source, variant)
    options = {"torch_dtype": getattr(torch, torch_dtype), "revision": revision, **components}
    file = None if single_file is None else Path(single_file)
    try:
        where = str(source if is_local else path)
        pipeline_class = check_checkpoint(family, where, revision)
        read = {name: made for name, made in components.items() if callable(made)}
        options |= {name: made(where, revision=revision) for name, made in read.items()}
        with ExitStack() as stack:
            if _SHAPES_ALONE.get():
                options |= _shapes(pipeline_class, where, options)
                file = variant = None
            elif is_local:
                own, file = stack.enter_context(plain(source, file, options["torch_dtype"]))
                where = str(own)
            stack.enter_context(warnings.catch_warnings())
            # The oldest supported diffusers does not know the argument's new name.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            if file is not None:
                return _from_single_file(pipeline_class, file, where, options)
            found = pipeline_class.from_pretrained(where, variant=variant, **options)
            _refuse_quantised(found, path)
            return found
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, ImportError, LookupError, RuntimeError) as error:
        raise DminError(_why_not(path, source, pipeline_class, error)) from error


def _refuse_quantised(pipeline: Any, path: str | Path) -> None:
    """Refuse quantised weights of a repository: only local folders are dequantised."""
    for name, part in pipeline.components.items():
        if getattr(part, "hf_quantizer", None) is not None:
            raise DminError(
                f"model.path={path}: the weights of its {name} are quantised. Download the "
                f"checkpoint and give its folder: its weights are then dequantised."
            )


def _shapes(pipeline_class: Any, where: str, options: dict[str, Any]) -> dict[str, nn.Module]:
    """Return the modules of a checkpoint on ``meta``, made from their configs."""
    found: dict[str, nn.Module] = {}
    for name, entry in pipeline_class.load_config(where, revision=options["revision"]).items():
        if not isinstance(entry, list) or None in entry or name in options:
            continue
        library, kind = entry
        own = library in ("diffusers", "transformers")
        kind = getattr(import_module(library if own else f"diffusers.pipelines.{library}"), kind)
        if not issubclass(kind, nn.Module):
            continue
        place = {"subfolder": name, "revision": options["revision"]}
        with torch.device("meta"):
            if hasattr(kind, "load_config"):
                made = kind.from_config(kind.load_config(where, **place))
            else:
                made = kind(kind.config_class.from_pretrained(where, **place))
        found[name] = nn.Module.to(made, options["torch_dtype"])
    return found


def _refuse_code(source: Path) -> None:
    """Refuse a checkpoint with code of its own, which some versions of diffusers would run."""
    try:
        index = json.loads((source / "model_index.json").read_text())
    except (OSError, ValueError):
        return  # diffusers reports the error
    entries = index if isinstance(index, dict) else {}
    parts = {n: e[0] for n, e in entries.items() if isinstance(e, list) and e and n[:1] != "_"}
    for name, library in parts.items():
        known = str(library) in ("diffusers", "transformers", "None") or (
            str(library).isidentifier() and find_spec(f"diffusers.pipelines.{library}") is not None
        )
        if not known or (source / name / f"{library}.py").is_file():
            raise DminError(
                f"model.path={source}: {name} needs code of {library!r}, not of diffusers or "
                f"transformers, and such code is not run. Load the pipeline in Python, and "
                f"pass it to dmin.from_pipeline."
            )


def _check_variant(source: Path, variant: str | None) -> None:
    """Refuse a checkpoint that does not have weights of the given variant."""
    found: dict[str, set[str | None]] = {}
    for file in source.glob("*/*"):
        if known := _WEIGHTS.fullmatch(file.name):
            found.setdefault(file.parent.name, set()).add(known[1])
    there = sorted({name for each in found.values() for name in each if name})
    lacking = [folder for folder, held in sorted(found.items()) if not held & {None, variant}]
    if lacking or (variant is not None and found and variant not in there):
        say = f"model.variant={there[0]}" if there else "model.variant=null"
        raise DminError(
            f"model.variant={'null' if variant is None else variant}: the weights in "
            f"{', '.join(lacking or sorted(found))} of {source} exist only "
            f"{f'as variant {there[0]}' if there else 'without a variant'}. Set {say} (they are "
            "loaded in model.torch_dtype in any case)."
        )


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.([a-z]\w*))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def _why_not(path: str | Path, source: Path, pipeline_class: Any, error: Exception) -> str:
    """Return why a checkpoint cannot be loaded."""
    wanted, index = pipeline_class.__name__, source / "model_index.json"
    if not index.is_file():
        return (
            f"model.path={path}: there is no such folder here, and it cannot be downloaded from "
            f"the Hub. Give the folder that {wanted}.save_pretrained wrote, or check the name and "
            f"the connection: {error}"
        )
    return f"model.path={path}: diffusers cannot load a {wanted} from it: {error}"


def _from_single_file(pipeline_class: Any, file: Path, source: str, options: dict[str, Any]) -> Any:
    """Load a pipeline from one file, and missing components from a checkpoint."""
    if not hasattr(pipeline_class, "from_single_file"):
        raise DminError(
            f"model.single_file={file}: diffusers cannot load {pipeline_class.__name__} from one "
            f"file. Convert it to diffusers' layout and give the folder as model.path."
        )
    if file.suffix in PICKLES:
        refuse_pickle(file, "model.single_file")
    keys = tensor_names(file)
    components = [name for name in inspect.signature(pipeline_class).parameters if name != "self"]
    lacking = [name for name in _IN_FILE if name in components and not _holds(keys, name)]
    beside = {}
    if lacking:
        # Do not load the other components.
        rest = {
            name: None
            for name in ("unet", "transformer", *_IN_FILE)
            if name in components and name not in lacking
        }
        try:
            donor = pipeline_class.from_pretrained(source, **{**options, **rest})
        except (OSError, ValueError, TypeError) as error:
            raise DminError(
                f"model.single_file={file} holds no {', '.join(lacking)}, which cannot be loaded "
                f"from model.path={source} either: {error}"
            ) from error
        beside = {name: getattr(donor, name) for name in lacking}
    try:
        return pipeline_class.from_single_file(str(file), config=source, **{**options, **beside})
    except (SingleFileComponentError, KeyError, IndexError, RuntimeError) as error:
        raise DminError(
            f"model.single_file={file}: diffusers cannot load it as a {pipeline_class.__name__} "
            f"with the configs of model.path={source} ({type(error).__name__}: {error}). Give a "
            "file of such a model, and a checkpoint of the same version and size as model.path."
        ) from error


def _holds(keys: Sequence[str], component: str) -> bool:
    """Return whether a file in the original layout has the weights of a component."""
    return any(key.startswith(_IN_FILE[component]) for key in keys)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Replace all weights of a network, for instance by their moving average.

    Args:
        network: the network.
        path: ``.safetensors`` file with its state dict; or a folder written by the network's
            ``save_pretrained``, or by diffusers' ``EMAModel``.

    Raises:
        DminError: there is no such file, or the weights belong to another network.
    """
    if _SHAPES_ALONE.get():
        return
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        network_class: Any = type(network)
        state = network_class.from_pretrained(str(path)).state_dict()
    elif path.suffix == ".safetensors" and path.is_file():
        state = load_file(path)
    else:
        raise DminError(
            f"model.ema={path}: neither a .safetensors file nor a folder with config.json and "
            f"weights. Save the EMA weights with EMAModel.save_pretrained, or their state "
            f"dict with safetensors.torch.save_file."
        )
    own = network.state_dict()
    wrong = [name for name in {*own, *state} if _shape(own, name) != _shape(state, name)]
    if wrong:
        raise DminError(
            f"model.ema={path}: not the weights of this {type(network).__name__}: {len(wrong)} "
            f"entries are missing, unknown or of another shape ({', '.join(sorted(wrong)[:3])}). "
            f"Give the weights of the same network as model.path."
        )
    network.load_state_dict(state)


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
