"""Identify a checkpoint by the classes and settings it names; unsupported variants are refused.

All of these are in small JSON files, read before any weight.
"""

import inspect
import pkgutil
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from dmin.models.schedulers import diffusers_name
from dmin.models.vae import latent_channels
from dmin.runtime.errors import DminError

_AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC", "AsymmetricAutoencoderKL")


class Claims(NamedTuple):
    """The components of a family's checkpoints: the attribute ``claims`` of the family."""

    network: str  # class of the network
    # Kinds (`pipeline_kind`) with the same network and training; all are loaded as the first.
    pipelines: tuple[str, ...]
    own: tuple[str, ...] = ()  # further kinds, each loaded as its own class
    takes: Mapping[str, Collection[Any]] = {}  # supported values of settings in MORE_INPUTS
    packing: int = 1  # latent pixels in one vector of the network's input
    keys: tuple[str, ...] = ()  # parts of tensor names, all of which a single file contains
    vae: tuple[str, ...] = _AUTOENCODERS
    without: tuple[str, ...] = ()  # components that a complete checkpoint may lack
    gives: tuple[str, ...] = ()  # required arguments of the network beyond latents, time and text
    beside: tuple[int, int] = (0, 0)  # (a, b): a · (latent channels) + b further input channels


def variants(name: str) -> tuple[str, ...]:
    """Return the pipelines of a family that differ only in sampling."""
    return tuple(f"{name}{variant}Pipeline" for variant in ("", "Img2Img", "PAG"))


UNET, ANY = "UNet2DConditionModel", range(1, 10**9)
SCORED = "requires_aesthetics_score"
FAMILIES: dict[str, Any] = {}
"""Classes by their name in ``model=``; each is added when it is defined."""


def all_families() -> dict[str, Any]:
    """Return the class of every family, after importing all of them."""
    package = import_module(f"{__package__}.families")
    for found in pkgutil.iter_modules(package.__path__):
        import_module(f"{package.__name__}.{found.name}")
    return FAMILIES


def claimants(pipeline: str) -> list[str]:
    """Return the families that claim a pipeline's class: one, or none."""
    of = {name: family.claims for name, family in all_families().items()}
    return [name for name, held in of.items() if pipeline in (*held.pipelines, *held.own)]


REASONS = {
    "ControlNet": "a second network conditions it on a control image, which is not supported",
    "Control": "its network also takes the latents of a control image, which is not supported",
    "Adapter": "a second network conditions it on a control image, which is not supported",
    "Kontext": "its network also takes the tokens of an image to edit",
    "Fill": "its network also takes a mask and the latents of a masked image",
    "Inpaint": "its network also takes a mask and the latents of a masked image",
    "InstructPix2Pix": "its network also takes the latents of an image to edit",
    "Depth2Img": "its network also takes a depth map",
    "Redux": "its network takes an image instead of a caption",
    "ImageVariation": "its network takes an image instead of a caption",
    "GLIGEN": "its network also takes boxes and their content",
    "Upscale": "its network also takes a small image and its noise level",
    "SuperResolution": "its network also takes a small image",
    "LDM": "its latents are those of a VQ autoencoder",
    "Sprint": "it is distilled: its loss needs a derivative along the flow, and a teacher",
    "Consistency": "it is distilled: its loss needs a teacher or two timesteps",
    "KV": "its sampler reuses keys and values of images to edit",
    "QwenImageEditPlus": "its text encoder sees several images, at another size than its network",
    "Edit": "its network also takes the tokens of an image to edit",
    "Layered": "its network generates several layers of an image at once",
    "Omni": "its network also takes images to edit",
    "ImageToVideo": "its network also takes the latents of a first frame",
    "ScoreSde": "its network predicts a score in continuous time",
    "Video": "it makes videos",
}
"""Part of a pipeline's name → why no family supports it."""

MORE_INPUTS = {
    "class_embed_type": "classes or noise levels",
    "num_class_embeds": "classes",
    "addition_embed_type": "conditions besides text",
    "encoder_hid_dim_type": "the embedding of an image",
    "time_cond_proj_dim": "the guidance scale",
    "guidance_embeds": "the guidance scale",
    "image_dim": "the embedding of an image",
    "siglip_feat_dim": "the embedding of an image",
    "use_additional_t_cond": "which layers an image has",
}
"""Setting of a network → the input that it adds; families name supported values in ``takes``."""


def pipeline_kind(index: Mapping[str, Any], name: Any = None) -> str:
    """Return the kind of a pipeline: its class, and a flag that means another network.

    Args:
        index: its settings, as in ``model_index.json``.
        name: name of its class; None for that in the index.
    """
    held = name or index.get("_class_name", "pipeline without a name")
    held = held if isinstance(held, str) else str(held[-1])
    return f"{held} with {SCORED}" if index.get(SCORED) else held


def kind_in_hand(pipeline: Any) -> str:
    """Return the kind of a loaded pipeline, see :func:`pipeline_kind`."""
    return pipeline_kind(pipeline.config, diffusers_name(pipeline))


def check_pipeline(held: str, family: str, what: str) -> None:
    """Refuse a pipeline that a family does not claim.

    Args:
        held: its kind, see :func:`pipeline_kind`.
        family: name of the family in ``model=``.
        what: the checkpoint or object, for the message.

    Raises:
        DminError: the message has the family that claims it, or the reason why none does.
    """
    claims = FAMILIES[family].claims
    if held in (*claims.pipelines, *claims.own):
        return
    if found := claimants(held):
        rest = f"Choose model={found[0]}, the model=... that loads it (docs/models.md)."
    else:
        rest = (
            f"dmin does not support it: {reason(held) or 'no family opens it'}. Give the text- or "
            "class-to-image checkpoint it was made from, or write your own model "
            "(docs/own_models.md)."
        )
    raise DminError(f"{what}: a {held}, but model={family} needs a {claims.pipelines[0]}. {rest}")


def reason(pipeline: str) -> str | None:
    """Return why no family is trained as a pipeline; None if a family could be written."""
    return next((why for part, why in REASONS.items() if part in pipeline), None)


def pipeline_of(family: str) -> Any:
    """Return the diffusers class with which a family's checkpoints are loaded."""
    return getattr(diffusers, FAMILIES[family].claims.pipelines[0].split()[0])


def check_checkpoint(family: str, path: str, revision: str | None) -> Any:
    """Refuse a checkpoint whose JSON files do not fit a family.

    Args:
        family: name of the family in ``model=``.
        path: folder, or name on the Hub.
        revision: branch, tag or commit on the Hub.

    Returns:
        The diffusers class with which to load it.

    Raises:
        DminError: pipeline, network or autoencoder differ, or a component would not be used.
    """
    what = f"model.path={path}"
    pipeline_class = pipeline_of(family)
    index = _settings(pipeline_class.load_config(path, revision=revision))
    held = pipeline_kind(index)
    check_pipeline(held, family, what)
    if held in FAMILIES[family].claims.own:
        pipeline_class = getattr(diffusers, held)
    parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    configs: dict[str, Any] = {}
    for name, component in parts.items():
        if name not in inspect.signature(pipeline_class.__init__).parameters:
            raise DminError(
                f"{what}: it has a {name} ({component}), which {pipeline_class.__name__} does "
                f"not use. Give the checkpoint that its network was trained in."
            )
        check_component(name, component, family, what)
        if name in ("vae", *_NETWORKS):
            configs[name] = _config(getattr(diffusers, component), path, name, revision)
    local = Path(path).is_dir()  # there transformers invents a tokenizer that has no folder
    there = {n for n in parts if not (local and n.startswith(_TEXTS)) or Path(path, n).is_dir()}
    check_whole(family, pipeline_class, there, what)
    networks = [name for name in _NETWORKS if name in parts]
    if not networks:
        raise DminError(
            f"{what}: it has no network ({' or '.join(_NETWORKS)}). Give a complete checkpoint."
        )
    channels = latent_channels(configs["vae"]) if "vae" in configs else None
    for name in networks:
        check_inputs(family, getattr(diffusers, parts[name]), configs[name], channels)
    return pipeline_class


def check_whole(family: str, pipeline_class: Any, there: Collection[str], what: str) -> None:
    """Refuse a pipeline without an encoder, a tokenizer or a scheduler that it needs.

    Args:
        family: name of the family in ``model=``.
        pipeline_class: class whose constructor names the components.
        there: names of the existing components.
        what: the checkpoint or object, for the message.
    """
    taken = inspect.signature(pipeline_class.__init__).parameters
    needed = {name for name in taken if name.startswith(_NEEDED)}
    if lacking := needed - {*there, *FAMILIES[family].claims.without}:
        raise DminError(
            f"{what} has no {' and no '.join(sorted(lacking))}, which model={family} needs. Give "
            f"all that save_pretrained of a {pipeline_class.__name__} writes."
        )


def _config(kind: Any, path: str, name: str, revision: str | None) -> Any:
    """Return the settings of a component; early checkpoints have no folder for it."""
    try:
        return _settings(kind.load_config(path, subfolder=name, revision=revision))
    except OSError:
        return _settings(kind.load_config(path, revision=revision))


def _settings(found: Any) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    raise ValueError(f"a config is a {type(found).__name__}, not a mapping of settings")


def check_component(name: str, component: str, family: str, what: str) -> None:
    """Refuse a network or autoencoder that is not a family's; arguments as above.

    Raises:
        DminError: its class differs.
    """
    claims = FAMILIES[family].claims
    network = (claims.network,)
    wanted = {**dict.fromkeys(_NETWORKS, network), "vae": claims.vae}.get(name)
    if wanted and component not in wanted:
        raise DminError(
            f"{what}: its {name} is a {component}, but model={family} needs {' or '.join(wanted)}. "
            "Choose the model=... that has it, or write your own model (docs/own_models.md)."
        )


def check_inputs(
    family: str, kind: Any, config: Mapping[str, Any], latent_channels: int | None
) -> None:
    """Refuse a network with inputs that a family does not provide.

    Args:
        family: name of the family in ``model=``.
        kind: class of the network.
        config: its settings.
        latent_channels: latent channels of the autoencoder; None without an autoencoder.

    Raises:
        DminError: it has further inputs, or another number of output channels.
    """
    claims = FAMILIES[family].claims
    channels = seen = config.get("in_channels")
    if latent_channels is not None:
        channels = claims.packing * latent_channels
        seen = channels + claims.packing * (claims.beside[0] * latent_channels + claims.beside[1])
    more = [
        f"{what} ({name}={config[name]})"
        for name, what in MORE_INPUTS.items()
        if config.get(name) not in (None, False) and config[name] not in claims.takes.get(name, ())
    ]
    if config.get("in_channels", seen) != seen:
        more.append(f"{config['in_channels']} channels for {seen}")
    given = (*_GIVEN, *claims.gives)
    more += [
        f"the argument {p.name}"
        for p in inspect.signature(kind.forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given
    ]
    if more:
        raise DminError(
            f"model.path: this {kind.__name__} has inputs that model={family} does not provide: "
            f"{', '.join(more)}. Give the checkpoint of a {claims.pipelines[0]}."
        )
    out = config.get("out_channels") or seen
    if out not in (channels, 2 * (channels or 0), (channels or 0) // claims.packing):
        raise DminError(
            f"model.path: this {kind.__name__} returns {out} channels for {channels} channels of "
            "x_t: a prediction has as many, or twice as many with a learned variance. Give the "
            "checkpoint of a denoiser or a flow."
        )


_NETWORKS = ("unet", "transformer", "transformer_2")
_TEXTS = ("text_encoder", "tokenizer")
_NEEDED = ("vae", "scheduler", *_TEXTS)
_GIVEN = ("self", "sample", "hidden_states", "timestep", "encoder_hidden_states")
