"""Stable Diffusion XL: a larger UNet, also conditioned on image sizes; and its refiner."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.diffusion.process import Process
from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import SizeConditioning
from dmin.models.families.image_conditions import SampledFromImages
from dmin.models.latent import DROPPED
from dmin.models.relatives import SCORED, UNET, Claims, variants
from dmin.runtime.errors import DminError, DminWarning


class StableDiffusionXL(SizeConditioning):
    """Stable Diffusion XL (Podell et al. 2023); predicts ε or v.

    Models derived from it with Karras' preconditioning (Playground 2.5, CosXL), or as a flow, are
    recognised by the scheduler.
    """

    family = "stable_diffusion_xl"
    claims: ClassVar[Claims] = Claims(
        UNET,
        variants("StableDiffusionXL"),
        takes={"addition_embed_type": ("text_time",)},
        keys=("conditioner.embedders.1.",),
    )
    processes: ClassVar[tuple[type[Process], ...]] = (DiscreteDiffusion, EDM, RectifiedFlow)
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    encoded = ("encoder_hidden_states", None, "text_embeds")
    numbers: ClassVar[int] = 6  # size conditions of an image

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        config = self.network.config
        text = pipeline.text_encoder_2.config.projection_dim
        told = self.numbers * (config.addition_time_embed_dim or 0) + text
        if config.projection_class_embeddings_input_dim not in (None, told):
            raise DminError(
                f"model.path: this network takes {config.projection_class_embeddings_input_dim} "
                f"additional numbers, but {self.numbers} of the image (a refiner has five, the "
                f"base model six) and the pooled text make {told}. Set {SCORED} of its "
                "model_index.json to true for a refiner, to false for others."
            )

    def _no_prompt(self) -> Condition:
        nothing = super()._no_prompt()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return nothing
        return {name: torch.zeros_like(value) for name, value in nothing.items()}

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        rows = [[*m.original, *m.crop, *m.target] for m in self._micro_conditioning(batch)]
        return {"time_ids": batch["image"].new_tensor(rows)}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        added = {k: condition[k] for k in ("text_embeds", "time_ids")}
        text = condition["encoder_hidden_states"]
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}


class StableDiffusionXLRefiner(StableDiffusionXL, SampledFromImages):
    """The refiner (Podell et al. 2023, 2.5): trained at low noise, takes an aesthetic score.

    It has one text encoder, OpenCLIP's, and its sampler starts from an image.

    Args:
        pipeline: a diffusers pipeline with all its components.
        aesthetic_score: score of all images, about 1 to 10, also in sampling; None for 6, the
            pipeline's default, with a warning.
        score_column: column of the metadata with a score for each image; ``aesthetic_score`` is
            used for images without one, if it is given.
        trained_below: it was trained at timesteps below this one; None for 200, as the published
            refiner, with a warning.
        settings: settings of :class:`StableDiffusionXL`.

    Raises:
        DminError: no timestep is left, or a setting or an encoder does not belong to a refiner.
    """

    family = "stable_diffusion_xl_refiner"
    claims = StableDiffusionXL.claims._replace(
        pipelines=(f"StableDiffusionXLImg2ImgPipeline with {SCORED}",),
        keys=("conditioner.embedders.0.model.",),
        without=("text_encoder", "tokenizer"),
    )
    processes = (DiscreteDiffusion,)
    numbers = 5
    sampled_with: ClassVar[dict[str, Any]] = {"strength": 0.3}  # the pipeline's own

    def __init__(
        self,
        pipeline: Any,
        *,
        aesthetic_score: float | None = None,
        score_column: str | None = None,
        trained_below: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        below = 200 if trained_below is None else trained_below
        self.timesteps = [t for t in self.timesteps if t < below]
        if not self.timesteps:
            raise DminError(
                f"model.trained_below={below}: give a timestep, 1 or more; the published refiner "
                f"was trained below 200."
            )
        if self.target_size is not None:
            raise DminError(
                f"model.target_size={list(self.target_size)}: a refiner takes none. Leave it out."
            )
        if aesthetic_score is not None and not math.isfinite(aesthetic_score):
            raise DminError(
                f"model.aesthetic_score={aesthetic_score}: give a number, such as the pipeline's 6."
            )
        if pipeline.text_encoder is not None:
            raise DminError(
                "model.path: this refiner has a text_encoder, but was trained with text_encoder_2 "
                "alone. Set text_encoder and tokenizer of its model_index.json to [null, null]."
            )
        self.aesthetic_score, self.score_column = aesthetic_score, score_column
        if score_column is not None:
            self.metadata_columns = [*self.metadata_columns, score_column]
        assumed = {
            "every image gets the aesthetic score 6, the pipeline's default (set "
            "model.aesthetic_score=6, or model.score_column=NAME of the metadata)": (
                aesthetic_score is None and score_column is None
            ),
            "only timesteps below 200 are used, at which the published one was trained (set "
            "model.trained_below=200, or 1000 for all)": trained_below is None,
        }
        if told := "; ".join(text for text, holds in assumed.items() if holds):
            warnings.warn(f"SDXL's refiner: {told}.", DminWarning, stacklevel=2)

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return latents and condition; the unconditional one has a low score."""
        x0, condition = super().encode(batch)
        if self.guidance is None:
            return x0, condition
        sizes = condition["time_ids"][:, :-1]
        low = sizes.new_full((len(sizes), 1), _LOW)
        return x0, {**condition, f"{DROPPED}time_ids": torch.cat([sizes, low], 1)}

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, including the score."""
        told = {"aesthetic_score": self._score, "score_column": self.score_column}
        return {**super().describe(), **told}

    def describe_sampling(self) -> dict[str, Any]:
        """Return sampler, guidance, size, score and the encoders' digests."""
        return {**super().describe_sampling(), "aesthetic_score": self._score}

    def sample(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        steps: int = 50,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Refine the given images; the arguments are those of all pipelines."""
        whole = math.ceil(steps / self.sampled_with["strength"])  # it runs the last ones
        return super().sample(prompts, seeds, whole, given)

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)  # the image determines the size
        told = {"aesthetic_score": self._score, "negative_aesthetic_score": _LOW}
        kept = {name: asked[name] for name in asked if name not in ("height", "width")}
        return {**kept, **told}

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        sizes = super()._sizes(batch)["time_ids"][:, :4]
        scores = sizes.new_tensor([self._score_of(batch, i) for i in range(len(sizes))])
        return {"time_ids": torch.cat([sizes, scores[:, None]], 1)}

    def _score_of(self, batch: Mapping[str, Any], i: int) -> float:
        """Return the score that is passed to the network for one example."""
        if self.score_column is None:
            return self._score
        score = batch["metadata"][i].get(self.score_column, self.aesthetic_score)
        if isinstance(score, int | float) and math.isfinite(score):
            return float(score)
        raise DminError(
            f"example {batch['id'][i]!r} has {self.score_column} = {score!r} in its metadata, "
            f"where model.score_column={self.score_column} needs a number. Add it, or set "
            f"model.aesthetic_score=NUMBER for images without one."
        )

    @property
    def _score(self) -> float:
        return 6.0 if self.aesthetic_score is None else float(self.aesthetic_score)


_LOW = 2.5  # the pipeline's score for the unconditional prediction of guidance
