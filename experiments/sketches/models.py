"""Three kinds of diffusion models, small enough to train in minutes, of pixels all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from dmin.data.digits import Digits
from dmin.data.shapes import Shapes
from dmin.diffusion.processes import DiscreteDiffusion, RectifiedFlow
from dmin.models.base import Condition, DiffusionModel, Prediction, class_labels
from dmin.models.families.ddpm import DDPM
from dmin.train import fit_trainer, train

COSINE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
}
WORDS, WIDTH = 10, 64  # of a caption: "a large red dotted star on a white background"


class PixelDiT(DiffusionModel):
    """DiT (adaLN, class labels) on 8 × 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = diffusers.DiTTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=1,
            out_channels=1,
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=24,
            num_embeds_ada_norm=10,
        )
        self.process = DiscreteDiffusion(diffusers.DDPMScheduler(**COSINE))

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        return 2 * batch["image"] - 1, {"class_labels": class_labels(batch["label"], 10)}

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        noised, target, weight = self.process(x0, noise, t)
        return Prediction(
            self.network(noised, timestep=t.long(), **condition).sample, target, weight
        )

    def log_snr(self, timesteps: Any) -> list[float]:
        return self.process.log_snr(timesteps)


class PixelMMDiT(DiffusionModel):
    """SD3's transformer on 16 × 16 captioned shapes; a word is a fixed random vector."""

    def __init__(self) -> None:
        super().__init__()
        self.network = diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=96,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
        )
        self.process = RectifiedFlow({"num_train_timesteps": 1000, "shift": 1.0})
        self.timesteps = self.process.timesteps

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        words = torch.stack([embedded(caption) for caption in batch["caption"]])
        condition = {"encoder_hidden_states": words, "pooled_projections": words.mean(1)}
        return 2 * batch["image"] - 1, condition

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        noised, target, weight = self.process(x0, noise, t)
        return Prediction(self.network(noised, timestep=t, **condition).sample, target, weight)

    def log_snr(self, timesteps: Any) -> list[float]:
        return self.process.log_snr(timesteps)


def embedded(caption: str) -> Tensor:
    """Return ``[WORDS, WIDTH]``, a vector drawn for each word, zeros after the last."""
    words = torch.zeros(WORDS, WIDTH)
    for i, word in enumerate(caption.split()):
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        words[i] = torch.randn(WIDTH, generator=generator)
    return words


def unet() -> DDPM:
    settings = Path(__file__).parents[2] / "conf" / "train" / "digits_unet.yaml"
    return instantiate(OmegaConf.load(settings).model, _convert_="all")()


def digits(split: str) -> Any:
    return Digits("train" if split == "train" else "heldout")


def shapes(split: str) -> Any:
    return Shapes(split, examples=2000, size=16)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[str], Any], dict[str, Any]]] = {
    "unet": (unet, digits, {"steps": 1500, "batch_size": 64, "learning_rate": 2e-3}),
    "dit": (PixelDiT, digits, {"steps": 1500, "batch_size": 64, "learning_rate": 1e-3}),
    "mmdit": (PixelMMDiT, shapes, {"steps": 1500, "batch_size": 32, "learning_rate": 1e-3}),
}


def trained(kind: str, cache: Path) -> Any:
    """Return the trained model of a kind; train it (minutes) unless the cache has it."""
    build, data, settings = KINDS[kind]
    file = cache / f"{kind}.pt"
    if not file.is_file():
        model = train(build, data("train"), **settings, trainer=fit_trainer(accelerator="cpu"))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.network.state_dict(), file)
    model = build()
    model.network.load_state_dict(torch.load(file))
    return model.eval()


if __name__ == "__main__":
    import sys

    for kind in sys.argv[1:] or KINDS:
        model = trained(kind, Path("outputs/sketches"))
        print(kind, sum(p.numel() for p in model.network.parameters()))
