"""Qwen-Image: a transformer on packed latents of a video autoencoder and an LLM's embeddings.

In Qwen-Image-Edit the LLM also sees the image to edit, whose tokens follow the noised ones.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import PaddedCaptioned
from dmin.models.families.image_conditions import BESIDE, ImageTokens
from dmin.models.relatives import Claims, variants
from dmin.runtime.errors import DminError

AREA = 1024 * 1024
_PIPELINE = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"


class QwenImage(PaddedCaptioned):
    """Qwen-Image (Wu et al. 2025); ``guidance_scale`` is its pipeline's ``true_cfg_scale``."""

    family = "qwen_image"
    claims: ClassVar[Claims] = Claims(
        "QwenImageTransformer2DModel",
        variants("QwenImage")[:2],
        packing=4,
        keys=("transformer_blocks.0.img_mlp.", "txt_norm."),
        vae=("AutoencoderKLQwenImage",),
    )
    time_unit = "sigma"
    encoding: ClassVar[dict[str, Any]] = {}
    encoded = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def _no_prompt(self) -> Condition:
        return self._embed([" "])

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        batch, _, height, width = noised.shape
        return {"img_shapes": [[(1, height // 2, width // 2)]] * batch, **condition}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)
        scale = asked.pop("guidance_scale", None)
        guided = {} if scale is None else {"true_cfg_scale": scale}
        return {**asked, **guided, "negative_prompt": [" "] * len(prompts)}


def processor_of_images(path: str, **place: Any) -> Any:
    """Return the processor of a checkpoint without its video part, which needs torchvision."""
    from transformers import Qwen2VLProcessor

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, **rest: Any) -> None:
        Qwen2VLProcessor.__init__(self, image_processor, tokenizer, **rest)

    of_images = {"__init__": init, "attributes": ["image_processor", "tokenizer"]}
    kind: Any = type("Qwen2VLProcessor", (Qwen2VLProcessor,), of_images)
    kind.__module__ = Qwen2VLProcessor.__module__  # used when a pipeline saves it
    return kind.from_pretrained(path, subfolder="processor", **place)


class QwenImageEdit(QwenImage, ImageTokens):
    """Qwen-Image-Edit (Wu et al. 2025); no prompt is a space, encoded with the example's image.

    Args:
        pipeline: a diffusers pipeline with all its components.
        condition_area: approximate number of pixels to which the image to edit is scaled for text
            encoder and network, with its aspect ratio, as in sampling; the pipeline uses 1024².
        settings: settings of the base classes. ``max_sequence_length`` includes the image's tokens
            (about 1369 for 1024² pixels); longer sequences are refused, not truncated.
    """

    family = "qwen_image_edit"
    claims = QwenImage.claims._replace(pipelines=("QwenImageEditPipeline",))
    components: ClassVar[dict[str, Any]] = {"processor": processor_of_images}
    own_length: int = 2048

    def __init__(self, pipeline: Any, *, condition_area: int = AREA, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self.condition_area = condition_area
        self._seen: Mapping[str, Any] | None = None  # the batch whose prompts are encoded

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, including ``condition_area``."""
        return {**super().describe(), "condition_area": self.condition_area}

    def sample(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        steps: int = 50,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Generate one image at a time; for several the pipeline does not scale those to edit.

        Arguments and result are those of :meth:`dmin.models.pipeline.PipelineModel.sample`.
        """
        if given is None:
            return super().sample(prompts, seeds, steps)
        found = []
        with _scaling_to(self.condition_area):
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                own = {name: images[i : i + 1] for name, images in given.items()}
                found.append(super().sample([prompt], [seed], steps, own))
        return torch.cat(found)

    def _prompted(self, batch: Mapping[str, Any]) -> Condition:
        seeing = copy.copy(self)
        seeing._seen = batch
        return super(QwenImageEdit, seeing)._prompted(batch)

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        if self._seen is None:
            raise DminError(
                "the text encoder of QwenImageEdit also takes the image to edit, so a prompt "
                "alone cannot be encoded. Encode examples with their images: model.encode(batch)."
            )
        images = self._scaled(self._seen)
        texts = self._texts(prompts) * (len(images) // len(prompts))  # no prompt: one for all
        return super()._encode(list(zip(texts, images, strict=True)), **told)

    def _alone(self, prompt: Any, **told: Any) -> Tensor:
        text, image = prompt
        row = super()._alone(text, image=image, **told)
        if len(row) > self.max_sequence_length:
            raise DminError(
                f"model.max_sequence_length={self.max_sequence_length}: {text[:40]!r} with its "
                f"image has {len(row)} tokens, and the pipeline does not truncate. Set it to "
                f"{len(row)} or more, for all examples."
            )
        return row

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        told = super()._told(noised, condition)
        height, width = condition[BESIDE].shape[2:]
        shapes = [*told["img_shapes"][0], (1, height // 2, width // 2)]
        return {**told, "img_shapes": [shapes] * len(noised)}

    def _pictures(self, batch: Mapping[str, Any]) -> list[Any]:
        process = self.pipeline.image_processor
        found: list[Any] = process.numpy_to_pil(process.pt_to_numpy(self._condition_image(batch)))
        return found

    def _scaled(self, batch: Mapping[str, Any]) -> list[Any]:
        """Return the images to edit as Pillow images, scaled as by the pipeline."""
        pictures = self._pictures(batch)
        width, height = pictures[0].size
        with _scaling_to(self.condition_area) as sides:
            width, height, _ = sides(AREA, width / height)
        return [self.pipeline.image_processor.resize(each, height, width) for each in pictures]

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        process = self.pipeline.image_processor
        return self._encoded_image(process.numpy_to_pt(process.pil_to_numpy(self._scaled(batch))))

    def _call(self, images: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": self._pictures(images)[0]}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)
        return {name: asked[name] for name in asked if name != "max_sequence_length"}


@contextmanager
def _scaling_to(area: int) -> Iterator[Any]:
    """Context in which the pipeline, whose area is fixed in its code, scales to another area."""
    module: Any = import_module(_PIPELINE)
    own = module.calculate_dimensions

    def sides(_: int, ratio: float) -> Any:
        found = own(max(area, 0), ratio)
        if not all(found[:2]):
            raise DminError(
                f"model.condition_area={area}: images to edit are scaled to that many pixels, "
                f"in steps of 32, which is too few. Give more; the pipeline uses {AREA}."
            )
        return found

    module.calculate_dimensions = sides
    try:
        yield sides
    finally:
        module.calculate_dimensions = own
