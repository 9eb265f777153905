"""Loading pipelines, other weights and LoRA adapters, with errors that say what to do."""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dmin.runtime.errors import DminError

DType = Literal["float32", "bfloat16"]
"""float16 is left out: gradients of a mean over pixels are smaller than it can hold."""

LORA = r"\.lora_[AB]\."
"""Regular expression of the parameters of LoRA adapters: for ``collect.params``."""

_IN_FILE = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""How the weights of components are named in single files of Stable Diffusion and Flux."""

_LORA_IN_FILE = re.compile(r"lora_[AB]|lora[._](down|up)")  # in the formats of all trainers


def load_pipeline(
    pipeline_class: Any,
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
        pipeline_class: of diffusers.
        path: folder saved by it, or the name of a repository on the Hub.
        variant: of the weight files, such as ``fp16``.
        revision: branch, tag or commit on the Hub.
        torch_dtype: ``float32`` or ``bfloat16``, of all weights.
        subfolder: folder inside ``path`` that holds the pipeline.
        single_file: ``.safetensors`` file with weights in the original layout; configs, tokenizers
            and whatever it does not hold (often all but the network) are then read from ``path``.
        components: to replace components of the checkpoint, such as ``safety_checker=None``.

    Raises:
        DminError: there is no such checkpoint, or it is another pipeline's.
    """
    if torch_dtype not in ("float32", "bfloat16"):
        raise DminError(
            f"model.torch_dtype={torch_dtype!r}: allowed are float32 and bfloat16 (float16 rounds "
            f"small gradients to zero)."
        )
    source = Path(path, subfolder) if subfolder else Path(path)
    is_local = Path(path).exists()
    is_hub = not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and not subfolder
    if not is_hub and not (source / "model_index.json").is_file():
        raise DminError(
            f"model.path={path}{f', model.subfolder={subfolder}' if subfolder else ''}: no "
            f"diffusers checkpoint there (no model_index.json). Give the folder that "
            f"{pipeline_class.__name__}.save_pretrained wrote, or the name of one on the Hub."
        )
    options = {"torch_dtype": getattr(torch, torch_dtype), "revision": revision, **components}
    try:
        with warnings.catch_warnings():
            # The new name of the argument is unknown to the oldest diffusers that dmin takes.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            if single_file is None:
                return pipeline_class.from_pretrained(
                    str(source if is_local else path), variant=variant, **options
                )
            where = str(source if is_local else path)
            return _from_single_file(pipeline_class, Path(single_file), where, options)
    except (OSError, ValueError, TypeError) as error:
        raise DminError(_why_not(path, source, pipeline_class, error)) from error


def _why_not(path: str | Path, source: Path, pipeline_class: Any, error: Exception) -> str:
    """Say why a checkpoint is not loaded: another pipeline's, not here, or what diffusers says."""
    wanted, index = pipeline_class.__name__, source / "model_index.json"
    if not index.is_file():
        return (
            f"model.path={path}: there is no such folder here, and it cannot be had from the Hub. "
            f"Give the folder that {wanted}.save_pretrained wrote, or check the name and the "
            f"connection: {error}"
        )
    held = json.loads(index.read_text()).get("_class_name", wanted)
    if held != wanted:
        return (
            f"model.path={path}: a {held}, where a {wanted} is needed. Choose the model=... that "
            f"loads it (docs/models.md)."
        )
    return f"model.path={path}: diffusers cannot load a {wanted} from it: {error}"


def _from_single_file(pipeline_class: Any, file: Path, source: str, options: dict[str, Any]) -> Any:
    """Load a pipeline from one file, and from a checkpoint what the file does not hold."""
    if not hasattr(pipeline_class, "from_single_file"):
        raise DminError(
            f"model.single_file={file}: diffusers cannot load {pipeline_class.__name__} from one "
            f"file. Convert it to diffusers' layout and give the folder as model.path."
        )
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise DminError(
            f"model.single_file={file} cannot be read as a .safetensors file ({error}). Files of "
            f"another kind can run code when they are read: convert them first."
        ) from error
    components = [name for name in inspect.signature(pipeline_class).parameters if name != "self"]
    lacking = [name for name in _IN_FILE if name in components and not _holds(keys, name)]
    beside = {}
    if lacking:
        # The rest is not wanted: nothing in its place.
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
            f"model.single_file={file}: diffusers cannot make a {pipeline_class.__name__} of it "
            f"with the configs of model.path={source} ({type(error).__name__}: {error}). Give the "
            f"file of such a model, and a checkpoint of its version and size as model.path."
        ) from error


def _holds(keys: Sequence[str], component: str) -> bool:
    """Say whether a file in the original layout holds the weights of a component."""
    return any(key.startswith(_IN_FILE[component]) for key in keys)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Replace all weights of a network, say by their moving average.

    Args:
        network: gets the weights.
        path: ``.safetensors`` file with its state dict; or a folder saved by the network's
            ``save_pretrained``, which is also what diffusers' ``EMAModel`` writes.

    Raises:
        DminError: no such file, or the weights are another network's.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        network_class: Any = type(network)
        state = network_class.from_pretrained(str(path)).state_dict()
    elif path.suffix == ".safetensors" and path.is_file():
        state = load_file(path)
    else:
        raise DminError(
            f"model.ema={path}: neither a .safetensors file nor a folder with config.json and "
            f"weights. Save the averaged weights with EMAModel.save_pretrained, or their state "
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


def load_adapters(
    network: nn.Module, paths: str | Path | Sequence[str | Path], pipeline: Any = None
) -> None:
    """Load LoRA adapters into a network, under names that do not depend on where they come from.

    They are called ``default``, ``default_1``, … and act together, so that the names of their
    parameters (and with them the sketch) are the same however an adapter was called in training.

    Args:
        network: gets the adapters; must not have any yet.
        paths: ``.safetensors`` file or a folder with one, in diffusers', kohya's or peft's format;
            several are added up.
        pipeline: whose ``load_lora_weights`` reads more formats, if it has one.

    Raises:
        DminError: no such file, not a LoRA of this network alone, or peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise DminError("model.adapter needs peft: pip install 'dmin[lora]'.") from error
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    names = ["default", *(f"default_{n}" for n in range(1, len(several)))]
    for path, name in zip(several, names, strict=False):
        _load_adapter(network, _adapter_file(Path(path)), name, pipeline)
    if len(several) > 1:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names)
    network.eval()


def _load_adapter(network: nn.Module, file: Path, name: str, pipeline: Any) -> None:
    state = load_file(file)
    _refuse_adapter(state, file)
    before = _adapter_keys(network)
    try:
        if (file.parent / "adapter_config.json").is_file() or not hasattr(
            pipeline, "load_lora_weights"
        ):
            _inject(network, state, file, name)
        else:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise DminError(
            f"model.adapter={file}: cannot be loaded into {type(network).__name__}: {error}"
        ) from error
    landed = len(_adapter_keys(network) - before)
    given = sum(bool(_LORA_IN_FILE.search(key)) for key in state)
    # Other trainers join layers that the network has apart: one matrix then fills several places.
    is_joined = not any("lora_A" in key for key in state)
    if landed < max(1, given) or (landed > given and not is_joined):
        raise DminError(
            f"model.adapter={file}: its {given} matrices fill {landed} places in "
            f"{type(network).__name__} (the first is {next(iter(state), 'none')}). Give an adapter "
            f"trained for this model."
        )


def _refuse_adapter(state: dict[str, Tensor], file: Path) -> None:
    text = [key for key in state if key.startswith(("text_encoder", "lora_te"))]
    if text:
        raise DminError(
            f"model.adapter={file}: it also adapts a text encoder ({len(text)} tensors, such as "
            f"{text[0]}), whose part of the gradient dmin does not take. Train the adapter on the "
            f"denoising network alone, or remove these tensors from the file if their effect may "
            f"be left out."
        )
    odd = [key for key in state if "dora_scale" in key or "lora_magnitude" in key]
    if odd:
        raise DminError(
            f"model.adapter={file}: a DoRA adapter ({odd[0]}), whose magnitudes would be ignored. "
            f"Use a plain LoRA."
        )


def _adapter_file(path: Path) -> Path:
    """Return the one weight file of an adapter."""
    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = [file for file in files if file.name in names] or files
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise DminError(
            f"model.adapter={path}: expected a .safetensors file, or a folder with just one; found "
            f"{', '.join(f.name for f in files) or 'none'}. An adapter on the Hub must be "
            f"downloaded first."
        )
    return files[0]


def _inject(network: nn.Module, state: dict[str, Tensor], file: Path, name: str) -> None:
    """Load an adapter with peft alone, for networks that diffusers has no loader for."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    for prefix in ("base_model.model.", "transformer.", "unet."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if (file.parent / "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(str(file.parent))
    else:
        ranks = {
            key.removesuffix(".lora_A.weight"): len(value)
            for key, value in state.items()
            if key.endswith(".lora_A.weight")
        }
        rank = next(iter(ranks.values()), 1)
        # Files of this kind do not tell alpha; diffusers, too, takes it to be the rank.
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(ranks),
            rank_pattern={key: r for key, r in ranks.items() if r != rank},
            alpha_pattern={key: r for key, r in ranks.items() if r != rank},
        )
    modules: Any = network
    inject_adapter_in_model(config, modules, name)
    result: Any = set_peft_model_state_dict(modules, state, name)
    if result.unexpected_keys:
        raise DminError(
            f"model.adapter={file}: {type(network).__name__} has no place for "
            f"{', '.join(result.unexpected_keys[:3])}. Give an adapter trained for this model."
        )


def without_adapter(network: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a network without its one adapter, and the adapter's weights; itself if it has none.

    Args:
        network: left as it is.
    """
    if not getattr(network, "peft_config", None):
        return network, {}
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import get_peft_model_state_dict

    layers: dict[str, Tensor] = get_peft_model_state_dict(network)
    plain = copy.deepcopy(network)
    recurse_remove_peft_layers(plain)
    del plain.peft_config
    plain._hf_peft_config_loaded = False
    return plain, layers


def describe_adapters(network: nn.Module) -> dict[str, Any]:
    """Return rank and scale of a network's adapters: α is no weight, but scales gradients."""
    configs = getattr(network, "peft_config", {})
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    return {
        name: {key: getattr(config, key, None) for key in names} for name, config in configs.items()
    }


def _adapter_keys(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if ".lora_" in name}


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
