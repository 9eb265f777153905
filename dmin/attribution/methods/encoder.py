"""Similarity in the feature space of a pretrained image encoder, such as CLIP or DINO."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import CosineMethod
from dmin.runtime.errors import DminError

# Of ImageNet: what encoders without a preprocessor_config.json are most often trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EncoderCosine(CosineMethod):
    """Cosine of image embeddings, ``cos(f(x_q), f(x_i))``: visual or semantic similarity.

    f is any image encoder that transformers' ``AutoModel`` loads: the projected image features of a
    model that has them (CLIP, Radford et al. 2021; SigLIP), else the pooled output, else the first
    token (DINO, Caron et al. 2021; DINOv2). Images are scaled to the encoder's size and normalised
    as its ``preprocessor_config.json`` says. Nothing is downloaded.

    Args:
        path: folder of the encoder, as written by ``save_pretrained`` or in a snapshot of the Hub.
        batch_size: images in one pass.
        device: that it runs on.

    Raises:
        DminError: the batch size is below one.
    """

    name = "encoder"
    requires = Requires(readouts=(), images=True)

    def __init__(self, path: str, batch_size: int = 64, device: str = "cpu") -> None:
        if batch_size < 1:
            raise DminError(f"method.batch_size={batch_size}: give at least one image.")
        self.path: Path = Path(path)
        self.batch_size = batch_size
        self.device = device

    def fit(self, train: FeatureSet) -> None:
        """Load the encoder.

        Raises:
            DminError: there is none, or it does not take images.
        """
        from transformers import AutoModel

        if not (self.path / "config.json").is_file():
            raise DminError(
                f"method.path={self.path}: there is no encoder (no config.json). Give the folder "
                f"of a model that transformers can load, such as a downloaded "
                f"clip-vit-base-patch32."
            )
        try:
            model: Any = AutoModel.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise DminError(
                f"method.path={self.path}: transformers cannot load it without running its custom "
                f"code ({' '.join(str(error).split())[:300]}). Give the folder of a model that "
                f"transformers supports."
            ) from error
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None)
        if size is None:
            raise DminError(
                f"method.path={self.path}: {type(model).__name__} does not take images of a known "
                f"size. Give an image encoder, such as CLIP or DINO."
            )
        self.model: Any = model.eval().to(self.device)
        self.size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        file = self.path / "preprocessor_config.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        self.size = _size(known) or self.size
        self.mean: Tensor = torch.tensor(known.get("image_mean", MEAN)).view(-1, 1, 1)
        self.std: Tensor = torch.tensor(known.get("image_std", STD)).view(-1, 1, 1)

    @torch.no_grad()
    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return unit embeddings, ``[Q, width]``."""
        images = queries.images
        assert images is not None
        if images.ndim == 5:  # of clips, the middle frame
            images = images[:, :, images.shape[2] // 2]
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found = []
        for part in images.split(self.batch_size):
            scaled = torch.nn.functional.interpolate(
                part, self.size, mode="bicubic", antialias=True
            ).clamp(0, 1)
            pixels = ((scaled - self.mean) / self.std).to(self.device)
            found.append(_features(self.model, pixels).float().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=1)


def _features(model: Any, pixels: Tensor) -> Tensor:
    """Return one vector an image, ``[n, width]``."""
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixels)
    else:
        found = model(pixel_values=pixels)
    if isinstance(found, Tensor):
        return found
    pooled = getattr(found, "pooler_output", None)
    whole: Tensor = found.last_hidden_state[:, 0] if pooled is None else pooled
    return whole.flatten(1)


def _size(known: dict[str, Any]) -> tuple[int, int] | None:
    """Return the height and width that a preprocessor produces, if known."""
    crop = known.get("crop_size") if known.get("do_center_crop") else None
    size = crop or known.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return size["height"], size["width"]
    return None
