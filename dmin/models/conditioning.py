"""Base classes of latent diffusion models conditioned on captions, and on image sizes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from dmin.models.base import Condition
from dmin.models.text_encoders import TextConditioned
from dmin.runtime.errors import DminError


class Captioned(TextConditioned):
    """Conditioned on captions.

    Args:
        pipeline: a diffusers pipeline with all its components.
        empty_captions: ``raise`` an error for an empty caption, or ``keep`` it, as the model's
            unconditional case.
        sample_size: height and width of generated images in pixels; None for the model's default.
        settings: settings of the base classes.
    """

    # Further arguments of the pipeline's encode_prompt, and the network's names of its results;
    # None for results that are not used.
    encoding: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False}
    encoded: ClassVar[tuple[str | None, ...]]

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        empty_captions: Literal["raise", "keep"] = "raise",
        sample_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        if empty_captions not in ("raise", "keep"):
            raise DminError(f"model.empty_captions={empty_captions!r}: allowed are raise and keep.")
        self.empty_captions = empty_captions
        self.sample_size: tuple[int, int] | None = _pair(sample_size, "sample_size")

    @classmethod
    def reads_captions(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether examples need captions: not if the prompt is always dropped."""
        asked = (settings.get(name) for name in ("query_guidance", "query_without"))
        return any(each is not None for each in asked) or settings.get("prompt_dropout", 0) < 1

    def describe_sampling(self) -> dict[str, Any]:
        """Return sampler, guidance, size and the encoders' digests."""
        return {**super().describe_sampling(), "size": self._generated_size()}

    def _prompts(self, batch: Mapping[str, Any]) -> list[str]:
        for name, caption in zip(batch["id"], batch["caption"], strict=True):
            if caption is None:
                raise DminError(
                    f"example {name!r} has no caption, and {type(self).__name__} is conditioned on "
                    f"captions. Add it to the data (column text of metadata.jsonl)."
                )
            if not caption.strip() and self.empty_captions == "raise":
                raise DminError(
                    f"example {name!r} has an empty caption. Add one, or set "
                    f"model.empty_captions=keep if the model was trained without captions too."
                )
        return list(batch["caption"])

    def _embed(self, prompts: Sequence[Any]) -> Condition:
        return self._encode(prompts, **self.encoding)

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        """Return the text encoders' results for prompts, by the network's names."""
        texts, device = self._texts(prompts), self._text_device
        found = self.pipeline.encode_prompt(texts, device=device, **told)
        return {name: x for name, x in zip(self.encoded, found, strict=False) if name}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        height, width = self._generated_size()
        asked = {"prompt": self._texts(prompts), "height": height, "width": width}
        return {**super()._sampling(prompts), **asked}

    def _generated_size(self) -> tuple[int, int]:
        return super()._generated_size() if self.sample_size is None else self.sample_size

    @staticmethod
    def _texts(prompts: Sequence[Any]) -> list[str]:
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise DminError(f"prompt {wrong[0]!r} is not text. Put captions in quotes.")
        return list(prompts)

    @property
    def _text_device(self) -> torch.device:
        """The device of the text encoders."""
        parts = self.pipeline.components.items()
        encoders = (e for name, e in parts if name.startswith("text_encoder"))
        modules = (e for e in encoders if isinstance(e, nn.Module))
        return next(parameter.device for e in modules for parameter in e.parameters())


class LongCaptioned(Captioned):
    """Conditioned on captions of a chosen length, as T5 and language models allow.

    Args:
        pipeline: a diffusers pipeline with all its components.
        max_sequence_length: most tokens of a caption; None for the family's default.
        settings: settings of the base classes.
    """

    own_length: int

    def __init__(
        self, pipeline: Any, *args: Any, max_sequence_length: int | None = None, **settings: Any
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        own = self.own_length if max_sequence_length is None else max_sequence_length
        self.max_sequence_length: int = own

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        return {**super().describe(), "max_sequence_length": self.max_sequence_length}

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        return super()._encode(prompts, max_sequence_length=self.max_sequence_length, **told)

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        length = {"max_sequence_length": self.max_sequence_length}
        return {**super()._sampling(prompts), **length}


class MicroConditioning(NamedTuple):
    """The sizes of an image as conditions; height before width, top before left."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


SIZE_COLUMNS = {
    "original": ("original_height", "original_width"),
    "crop": ("crop_top", "crop_left"),
}


class SizeConditioning(Captioned):
    """Also conditioned on the sizes of images (micro-conditioning, Podell et al. 2023).

    Args:
        pipeline: a diffusers pipeline with all its components.
        sizes_from: source of an example's original size and crop. ``image``: the size of its file
            before the data's scaling and cropping, and the position of that crop. ``metadata``:
            the columns original_height, original_width, crop_top and crop_left, for files that
            were scaled and cropped before. ``cut``: the size of the image after cropping, and no
            crop, as some trainers do.
        original_size: height and width before scaling, for all examples.
        crop: top and left of the crop in the scaled image, for all examples.
        target_size: height and width after cropping; None for those of the image.
        settings: settings of the base classes.
    """

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        sizes_from: Literal["image", "metadata", "cut"] = "image",
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        if sizes_from not in ("image", "metadata", "cut"):
            raise DminError(
                f"model.sizes_from={sizes_from!r}: allowed are image, metadata and cut."
            )
        self.sizes_from = sizes_from
        if sizes_from == "metadata":
            self.metadata_columns: Sequence[str] = [
                name for pair in SIZE_COLUMNS.values() for name in pair
            ]
        self.original_size: tuple[int, int] | None = _pair(original_size, "original_size")
        self.crop: tuple[int, int] | None = _pair(crop, "crop")
        self.target_size: tuple[int, int] | None = _pair(target_size, "target_size")

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, including the sizes."""
        sizes = {"original_size": self.original_size, "target_size": self.target_size}
        told = {**sizes, "crop": self.crop, "sizes_from": self.sizes_from}
        return {**super().describe(), **told}

    def facts_of_samples(self) -> dict[str, Any]:
        """Return the sizes used in sampling, as columns of metadata."""
        size = self._generated_size()
        told = {"original": self.original_size or size, "crop": self.crop or (0, 0)}
        return {
            column: value
            for name, columns in SIZE_COLUMNS.items()
            for column, value in zip(columns, told[name], strict=True)
        }

    def _micro_conditioning(self, batch: Mapping[str, Any]) -> list[MicroConditioning]:
        """Return the sizes of each image as conditions."""
        height, width = batch["image"].shape[-2:]
        count = len(batch["image"])
        return [
            MicroConditioning(
                self.original_size or self._size_of(batch, i, "original") or (height, width),
                self.crop or self._size_of(batch, i, "crop") or (0, 0),
                self.target_size or (height, width),
            )
            for i in range(count)
        ]

    def _size_of(self, batch: Mapping[str, Any], i: int, name: str) -> tuple[int, int] | None:
        """Return the original size or the crop of one example, as ``sizes_from`` selects."""
        if self.sizes_from == "cut":
            return None
        if self.sizes_from == "image":
            sizes = batch["sizes"][i]
            return None if sizes is None else getattr(sizes, name)
        facts, columns = batch["metadata"][i], SIZE_COLUMNS[name]
        found = [facts.get(column) for column in columns]
        if not all(isinstance(value, int) and value >= 0 for value in found):
            raise DminError(
                f"example {batch['id'][i]!r} has {', '.join(columns)} = {found} in its metadata, "
                f"where model.sizes_from=metadata needs whole numbers of pixels. Add the columns, "
                f"or set model.sizes_from=image."
            )
        return found[0], found[1]

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        size = self._generated_size()
        return {
            **super()._sampling(prompts),
            "original_size": self.original_size or size,
            "crops_coords_top_left": self.crop or (0, 0),
            "target_size": self.target_size or size,
        }


def _pair(values: Sequence[int] | None, name: str) -> tuple[int, int] | None:
    if values is None:
        return None
    if len(values) != 2:
        raise DminError(f"model.{name}={list(values)}: give two numbers, such as [512, 512].")
    return int(values[0]), int(values[1])
