"""The diffusion process a model was trained with, from the class of its checkpoint's scheduler."""

import inspect
from typing import Any

import torch
from diffusers import DDPMScheduler

from dmin.diffusion.loss import LossSettings
from dmin.diffusion.process import Process
from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.runtime.errors import DminError

_DISCRETE = (
    *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "EulerDiscrete"),
    *("EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE"),
    *("DPMSolverMultistepInverse", "DPMSolverSinglestep", "UniPCMultistep", "SASolver"),
    *("RePaint", "UnCLIP", "CogVideoXDDIM", "CogVideoXDPM"),
)
_EDM = ("EDMEuler", "EDMDPMSolverMultistep")
_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
_DISTILLED = "it samples distilled networks, whose loss needs a teacher or two timesteps"
_TOKENS = "it samples discrete tokens, whose loss is a cross entropy"
_REFUSED = {
    "LCM": _DISTILLED,
    "TCD": _DISTILLED,
    "FlowMatchLCM": _DISTILLED,
    "FlowMapEulerDiscrete": _DISTILLED,
    "Piflow": _DISTILLED,
    "LTXEulerAncestralRF": _DISTILLED,
    "CMStochasticIterative": _DISTILLED,
    "ConsistencyDecoder": _DISTILLED,
    "SCM": "the loss of TrigFlow needs a derivative of the network along the flow, and a teacher",
    "Amused": _TOKENS,
    "VQDiffusion": _TOKENS,
    "BlockRefinement": _TOKENS,
    "DiscreteDDIM": _TOKENS,
    "EntropyBound": _TOKENS,
    "ScoreSdeVe": "scores −ε/σ of images in [0, 1] are predicted, which is not supported",
    "ScoreSdeVp": "its networks predict a score in continuous time, which is not supported",
    "KarrasVe": "it scales images and noise in a way that is not supported",
    "IPNDM": "its noise levels are those of audio networks, which are not supported",
    "DDPMWuerstchen": "its time is a ratio of a cosine, which is not supported",
    "CosineDPMSolverMultistep": "its time is an arc tangent of σ, which is not supported",
}


def process_of(
    scheduler: Any, settings: LossSettings | None = None, shift: float | None = None
) -> Process:
    """Return the process that a network was trained with.

    The class of the scheduler decides, then its settings, but never a missing setting. Classes of
    diffusers that are not listed are refused.

    Args:
        scheduler: the checkpoint's diffusers scheduler, which is not changed.
        settings: settings of the loss.
        shift: as for :class:`RectifiedFlow`.

    Raises:
        DminError: the process is not supported, or settings contradict each other.
    """
    name = diffusers_name(scheduler).removesuffix("Scheduler")
    if name not in (*_DISCRETE, *_EDM, *_FLOW):
        why = _REFUSED.get(name, "dmin does not know the loss of the networks that it samples")
        raise DminError(
            f"scheduler {name}Scheduler: {why}. If this network was trained as a denoiser or a "
            f"flow, put the scheduler of its training (DDPMScheduler, EDMEulerScheduler, "
            f"FlowMatchEulerDiscreteScheduler) in the checkpoint's folder scheduler."
        )
    found = _found(scheduler, name, shift)
    if shift is not None and not isinstance(found, RectifiedFlow):
        raise DminError(
            f"model.shift={shift}: this checkpoint's {name}Scheduler belongs to a "
            f"{type(found).__name__}, which does not have this setting. Set it to null."
        )
    _require_levels(found, name)
    return found.trained_with(settings or LossSettings())


def _require_levels(process: Process, name: str) -> None:
    """Refuse settings without timesteps, or with a timestep that has no noise level."""
    t = torch.tensor(list(process.timesteps), dtype=torch.float64)
    levels = process.levels(t, t[:, None])
    signal = levels.alpha + levels.sigma  # NaN if ᾱ is not in [0, 1]
    if not len(t) or not bool((signal.isfinite() & (signal > 0)).all()):
        raise DminError(
            f"scheduler {name}Scheduler: its settings give {len(t)} timesteps, "
            f"{int((~signal.isfinite()).sum())} of them without a valid noise level. Fix "
            "num_train_timesteps, betas (each between 0 and 1) or shift in the checkpoint's "
            "scheduler/scheduler_config.json."
        )


def _found(scheduler: Any, name: str, shift: float | None) -> Process:
    config = scheduler.config
    kind, is_flow = config.get("prediction_type", "epsilon"), config.get("use_flow_sigmas", False)
    # Euler sampling with continuous noise levels, as in Stable Video Diffusion.
    continuous = name == "EulerDiscrete" and config.get("timestep_type") == "continuous"
    if name in _EDM or (continuous and kind == "v_prediction"):
        return EDM(_karras(scheduler), config["sigma_data"] if name in _EDM else 1, kind)
    if name in _FLOW:
        return RectifiedFlow(_one_way(scheduler), shift)
    if is_flow != (kind == "flow_prediction"):
        raise DminError(
            f"scheduler.use_flow_sigmas={is_flow} with prediction_type={kind!r} ({name}Scheduler): "
            f"a flow needs true and flow_prediction; a diffusion false and epsilon, v_prediction "
            f"or sample. Fix the checkpoint's scheduler/scheduler_config.json."
        )
    if is_flow:
        return RectifiedFlow(config, shift)
    return DiscreteDiffusion(_as_trained(scheduler))


def _karras(scheduler: Any) -> list[float]:
    """Return all timesteps ``ln σ / 4``, noisiest first."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(fresh.config.num_train_timesteps)
    found: list[float] = fresh.timesteps.tolist()
    return found


def _one_way(scheduler: Any) -> Any:
    """Return the settings of a flow; refuse an inverted one, or one without many timesteps."""
    config = scheduler.config
    if config.get("invert_sigmas") or config["num_train_timesteps"] < 2:
        raise DminError(
            f"scheduler.invert_sigmas={config.get('invert_sigmas')} with "
            f"num_train_timesteps={config['num_train_timesteps']}: no family supports an inverted "
            "flow or a single timestep. Set invert_sigmas=false, and num_train_timesteps usually "
            "to 1000."
        )
    return config


def _as_trained(scheduler: Any) -> Any:
    """Return a scheduler whose ᾱ agrees with its settings.

    The config may have a terminal SNR of zero that the current scheduler's class ignores.
    """
    config, name = scheduler.config, "rescale_betas_zero_snr"
    if config.get(name) and name not in inspect.signature(type(scheduler).__init__).parameters:
        made_of = inspect.signature(DDPMScheduler).parameters
        return DDPMScheduler(**{k: v for k, v in config.items() if k in made_of})
    return scheduler


def diffusers_name(found: Any) -> str:
    """Return the name of an object's class, or of the diffusers class from which it is derived."""
    names = [c.__name__ for c in type(found).__mro__ if c.__module__.startswith("diffusers.")]
    return (names or [type(found).__name__])[0]


def check_variance(wanted: bool, network: Any, process: Any) -> None:
    """Refuse the loss of a learned variance for a network without one.

    Args:
        wanted: whether the loss is requested.
        network: a diffusers network, with its config.
        process: the process of its training.

    Raises:
        DminError: the loss is requested, and there is no learned variance or no loss for it.
    """
    channels, out = network.config["in_channels"], network.config.get("out_channels")
    out = vars(network).get("out_channels") or out
    if wanted and (out != 2 * channels or not hasattr(process, "variance_bound")):
        raise DminError(
            f"model.variance_loss=true, but this {type(network).__name__} predicts no variance "
            f"({out} channels out for {channels} in), or is no discrete diffusion. Set it to false."
        )
