"""DiT: a transformer on latents, conditioned on classes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.labels import class_labels
from dmin.models.latent import LearnedVariance
from dmin.models.relatives import Claims


class DiT(LearnedVariance):
    """Diffusion Transformer (Peebles & Xie 2023); predicts ε. Its prompts are class labels."""

    family = "dit"
    claims: ClassVar[Claims] = Claims("DiTTransformer2DModel", ("DiTPipeline",))
    externally_called = ("transformer_blocks.0.norm1.emb",)  # for the last layer's conditioning

    def _prompts(self, batch: Mapping[str, Any]) -> Sequence[Any]:
        return batch["label"]

    def _embed(self, prompts: Sequence[Any]) -> Condition:
        classes = self.network.config.num_embeds_ada_norm
        return {"class_labels": class_labels(prompts, classes)}

    def _no_prompt(self) -> Condition:
        return {"class_labels": torch.tensor([self.network.config.num_embeds_ada_norm])}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        labels: Tensor = self._embed(prompts)["class_labels"]
        return {**super()._sampling(prompts), "class_labels": labels.tolist()}
