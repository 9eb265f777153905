"""LoRA adapters of a network: loading, describing and taking them off."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dmin.runtime.errors import DminError

_LORA_IN_FILE = re.compile(r"lora_[AB]|lora[._](down|up)")  # in the formats of all trainers


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
    with safe_open(file, "pt") as opened:
        told = opened.metadata() or {}
    before = _adapter_keys(network)
    try:
        if (
            (file.parent / "adapter_config.json").is_file()
            or not hasattr(pipeline, "load_lora_weights")
            # Diffusers refuses tensors of α beside matrices in its own names.
            or _is_peft_with_alpha(state)
        ):
            _inject(network, state, told, file, name)
        else:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            _scale(network, state, told, name)
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


def _is_peft_with_alpha(state: dict[str, Tensor]) -> bool:
    own = all(key.startswith(("unet.", "transformer.")) for key in state)
    return own and any("lora_A" in k for k in state) and any(k.endswith(".alpha") for k in state)


def _header(told: dict[str, str]) -> dict[str, Any]:
    """Return what the header of an adapter's file says of its scale, by peft's names.

    Diffusers writes peft's whole config as JSON, others single values. α of kohya's ``ss_`` entries
    counts where the file has no tensor of it.
    """
    if re.search(r"split_qkv\W+true", told.get("ss_network_args", ""), re.IGNORECASE):
        raise ValueError(
            "its matrices of queries, keys and values are joined of several (split_qkv=True), and "
            "loaders then read a third or a quarter of its scale. Convert it to diffusers' format "
            "with the tools of its trainer"
        )
    whole = json.loads(told.get("lora_adapter_metadata") or "{}")
    named = {
        key.rpartition(".")[2]: value
        for key, value in whole.items()
        if not key.startswith("text_encoder")
    }
    for name, others in _IN_HEADER.items():
        value = next((told[key] for key in others if told.get(key) not in (None, "", "None")), None)
        if value is not None and name not in named:
            named[name] = float(value)
    return named


_IN_HEADER = {
    "lora_alpha": ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha"),
    "r": ("r", "lora_rank", "rank", "ss_network_dim", "network_dim"),
}


def _scale(network: nn.Module, state: dict[str, Tensor], told: dict[str, str], name: str) -> None:
    """Scale an adapter by the α of its header, which diffusers reads in its own form alone."""
    header = _header(told)
    alpha = header.get("lora_alpha")
    # Where peft's whole config or a tensor says it, the loader has read it.
    if alpha is None or "target_modules" in header or any(k.endswith("alpha") for k in state):
        return
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.lora_alpha[name] = alpha
            module.scaling[name] = alpha / module.r[name]
    configs: Any = network
    configs.peft_config[name].lora_alpha = alpha
    configs.peft_config[name].alpha_pattern = {}


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


def _inject(
    network: nn.Module, state: dict[str, Tensor], told: dict[str, str], file: Path, name: str
) -> None:
    """Load an adapter with peft alone, for networks that diffusers has no loader for."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    for prefix in ("base_model.model.", "transformer.", "unet."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in state.items() if k.endswith(".alpha")}
    state = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    if (file.parent / "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(str(file.parent))
        if config.megatron_config:  # peft would import whatever megatron_core names
            raise DminError(
                f"model.adapter={file}: adapter_config.json sets megatron_config, which names code "
                f"to run. Remove it: the weights do not need it."
            )
    else:
        ranks = {
            key.removesuffix(".lora_A.weight"): len(value)
            for key, value in state.items()
            if key.endswith(".lora_A.weight")
        }
        rank, header = next(iter(ranks.values()), 1), _header(told)
        common, by_layer = header.get("lora_alpha"), header.get("alpha_pattern") or {}
        # Where nothing tells α, diffusers, too, takes it to be the rank.
        each = {k: alphas.get(k, r if common is None else common) for k, r in ranks.items()}
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if common is None else common,
            target_modules=list(ranks),
            rank_pattern={key: r for key, r in ranks.items() if r != rank},
            alpha_pattern={
                **{k: alpha for k, alpha in each.items() if alpha != (common or rank)},
                **by_layer,
            },
            use_rslora=bool(header.get("use_rslora")),
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
