"""Check a family's conventions against the checkpoint's own sampler, without its weights.

For a dataset of a single x0 the optimal network is known: it returns the target of the loss.
If it replaces the real network, the pipeline must end at x0 and pass latents to the autoencoder
that, normalised as in training, are x0. A wrong sign or unit of time, direction,
order of tokens, scale of input or latents, or process leaves an error of about one.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dmin.models import vae
from dmin.models.conditioning import Captioned
from dmin.models.latent import LatentDiffusion
from dmin.models.vae import latent_channels


class _Decoded(Exception):
    """Carries the latents that the pipeline passed to the autoencoder."""


@torch.no_grad()
def sampling_error(model: LatentDiffusion, steps: int = 4, seed: int = 0) -> float:
    """Return ``‖x − x0‖ / ‖x0‖`` of the pipeline's result x with the optimal network for x0.

    It is about 1e-6, or up to 5e-2 if sampling stops at some noise or rounds its timesteps. It is
    about 1 or more, or NaN, if the family does not fit.

    Args:
        model: the model; it is restored, and its network is not called.
        steps: number of sampling steps.
        seed: seed of x0, uniform in ±1, and of sampling.
    """
    best = _BestNetwork(model, seed)
    prompt = "a photo" if isinstance(model, Captioned) else 0
    autoencoder = model.pipeline.vae
    with ExitStack() as undo, _replaced(autoencoder, "decode", _decoded):
        for name, network in model.networks.items():
            undo.enter_context(_replaced(network, "forward", partial(best, name)))
        if "strength" in model.sampled_with:  # otherwise part of the image is left
            whole = {**model.sampled_with, "strength": 1.0}
            undo.enter_context(_replaced(model, "sampled_with", whole))
        try:
            model.sample([prompt], [seed], steps, example_given(model))
        except _Decoded as reached:
            found = vae.normalised(autoencoder, reached.args[0].float(), model.shifted)
    return float((found.view_as(best.x0) - best.x0).norm() / best.x0.norm())


def example_given(model: LatentDiffusion, seed: int = 0) -> dict[str, Tensor] | None:
    """Return random images for a sampler that takes images; None for other models."""
    if not model.given_images:
        return None
    drawn, size = torch.Generator().manual_seed(seed), model._generated_size()
    grey = torch.rand(1, 1, *size, generator=drawn).expand(-1, 3, -1, -1)
    made = {"image": torch.rand(1, 3, *size, generator=drawn), "condition_image": grey}
    return {name: made[name] for name in model.given_images}


class _BestNetwork:
    """The optimal network of a family for a data set of one x0."""

    def __init__(self, model: LatentDiffusion, seed: int) -> None:
        self.model, self.seed = model, seed
        first = next(iter(model.networks.values()))
        self.names = list(inspect.signature(first.forward).parameters)
        config, own = first.config, vars(first).get("out_channels")
        out = own or config.get("out_channels") or config["in_channels"]
        self.learns_variance = out == 2 * config["in_channels"]
        self.x0 = torch.empty(0)
        frames = (model.sample_frames,) if model.sample_frames > 1 else ()
        self.sides = vae.latent_sides(model.pipeline.vae, (*frames, *model._generated_size()))

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Compute the output of a network, given by name, for the arguments of its ``forward``."""
        model, told = self.model, {**dict(zip(self.names, args, strict=False)), **kwargs}
        given = told[self.names[0]]
        sample = model._latents(given, (len(given), 1, *self.sides)).float()
        sample = sample[:, : latent_channels(model.pipeline.vae.config)]
        if not self.x0.numel():
            drawn = torch.Generator().manual_seed(self.seed)
            # Within the range to which some samplers clip.
            x0 = 2 * torch.rand(1, *sample.shape[1:], generator=drawn) - 1
            self.x0 = x0.to(sample)
        t = self._timestep(told[model.time_name]).to(sample.device).expand(len(sample))
        output = model.sign * model.process.optimum(self.x0, sample, t)
        if any(name in unused.split(".") for unused in model.unused_at(float(t[0]))):
            output = output * torch.nan  # the family claims another network for this timestep
        if self.learns_variance:
            output = torch.cat([output, torch.zeros_like(output)], 1)
        like = given[0] if isinstance(given, list) else given
        return Transformer2DModelOutput(sample=model._tokens(output.to(like.dtype)))

    def _timestep(self, told: Any) -> Tensor:
        """Return the sampler's timestep that is nearest to ``told`` in the network's unit."""
        scheduled = self.model.pipeline.scheduler.timesteps.float()
        claimed = self.model._time(self.model.process.time(scheduled)).float()
        time = torch.as_tensor(told).flatten()[0].to(claimed)
        return scheduled[(claimed - time).abs().argmin()]


def _decoded(latents: Tensor, *_: Any, **__: Any) -> None:
    raise _Decoded(latents)


@contextmanager
def _replaced(module: nn.Module, name: str, other: Any) -> Iterator[None]:
    """Context in which a method, or a class attribute, of a module is replaced."""
    own = vars(module).get(name)
    setattr(module, name, other)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)
