"""Wan 2.1 and 2.2: transformers of videos; an image is a video of one frame."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmin.models import vae
from dmin.models.adapters import describe_adapters
from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims
from dmin.runtime.errors import DminError

HIGH, LOW = "transformer", "transformer_2"


class Wan(Flow):
    """Wan text to video (Wan team 2025), for clips, or for images as single frames.

    Wan 2.2 has two networks: ``transformer`` for noisy timesteps, from a boundary on, and
    ``transformer_2`` for those below. The gradient at a timestep is that of its network.

    Args:
        pipeline: a diffusers pipeline with all its components.
        sample_frames: number of generated frames: 1 for images, or 4n + 1.
        settings: settings of the base classes.
    """

    family = "wan"
    claims: ClassVar[Claims] = Claims(
        "WanTransformer3DModel",
        ("WanPipeline",),
        keys=("head.modulation", "patch_embedding."),
        vae=("AutoencoderKLWan",),
    )
    of_frames = True
    encoded = ("encoder_hidden_states",)

    def __init__(self, pipeline: Any, *, sample_frames: int = 1, **settings: Any) -> None:
        ratio, second = pipeline.config.get("boundary_ratio"), pipeline.transformer_2
        if pipeline.config.get("expand_timesteps"):
            raise DminError(
                "model.path: Wan 2.2 of 5 billion weights (TI2V) is not supported. Give a "
                "checkpoint of Wan 2.1, or of Wan 2.2 with its two networks."
            )
        if pipeline.transformer is None or (second is None) != (ratio is None):
            raise DminError(
                f"model.path: boundary_ratio={ratio} requires two networks, but this checkpoint "
                f"has {HIGH} and {LOW} as "
                f"{[type(n).__name__ for n in (pipeline.transformer, second)]}. Give a complete "
                "checkpoint."
            )
        steps = pipeline.scheduler.config.num_train_timesteps
        self.boundary: float = 0.0 if ratio is None else ratio * steps
        super().__init__(pipeline, **settings)
        check = vae.frame_step(pipeline.vae), "what is generated", "model.sample_frames"
        vae.check_frames(sample_frames, *check)
        self.sample_frames = sample_frames

    @classmethod
    def networks_of(cls, pipeline: Any) -> dict[str, Any]:
        """Return the one network, or both."""
        found = {HIGH: pipeline.transformer, LOW: pipeline.transformer_2}
        return {name: network for name, network in found.items() if network is not None}

    def unused_at(self, t: float) -> tuple[str, ...]:
        """Return the prefix of the parameters of the network that timestep t does not use."""
        if len(self.networks) == 1:
            return ()
        inside = "network." if self.encodes_inside else ""
        return (f"{inside}{LOW if torch.tensor(t) >= self.boundary else HIGH}.",)

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        if len(self.networks) == 1:
            return super().describe()
        adapters = {name: describe_adapters(each) for name, each in self.networks.items()}
        return {**super().describe(), "boundary": self.boundary, "adapters": adapters}

    def describe_sampling(self) -> dict[str, Any]:
        """Return what generated images or clips depend on."""
        frames = {"frames": self.sample_frames} if self.sample_frames > 1 else {}
        return {**super().describe_sampling(), **frames}

    def _whole(self, networks: Mapping[str, Any]) -> nn.Module:
        one = len(networks) == 1
        return super()._whole(networks) if one else ByTimestep(self.boundary, networks)

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        return {**super()._sampling(prompts), "num_frames": self.sample_frames}


class ByTimestep(nn.Module):
    """Two networks, each for a part of the timesteps.

    Args:
        boundary: the first network is used at timesteps t ≥ boundary.
        networks: both networks, by name.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, boundary: float, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.boundary = boundary
        for name, network in networks.items():
            self.add_module(name, network)

    @property
    def config(self) -> Any:
        """The settings of the first network, which the second shares."""
        return next(self.children()).config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, except some that stay in float32."""
        first: Any = next(self.children())
        found: torch.dtype = first.dtype
        return found

    def enable_gradient_checkpointing(self, on: bool = True) -> None:
        """Have both networks recompute their activations in backward."""
        for network in self.children():
            getattr(network, f"{'en' if on else 'dis'}able_gradient_checkpointing")()

    def disable_gradient_checkpointing(self) -> None:
        """Have both networks keep their activations."""
        self.enable_gradient_checkpointing(False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the output of the network for each timestep."""
        first, second = self.children()
        given = hidden_states, timestep, encoder_hidden_states
        is_first = timestep >= self.boundary
        with torch._C.DisableTorchFunction():  # the choice of a network does not order rows
            every, some = bool(is_first.all()), bool(is_first.any())
        if every or not some:
            return ((first if every else second)(*given, return_dict=False)[0],)
        said = [
            network(*(x[its] for x in given), return_dict=False)[0]
            for network, its in ((first, is_first), (second, ~is_first))
        ]
        order = torch.cat([is_first.nonzero(), (~is_first).nonzero()])[:, 0].argsort()
        return (torch.cat(said)[order],)
