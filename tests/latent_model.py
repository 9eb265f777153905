"""A model with encoders that note when they work."""

import torch
from torch import nn

from dmin.models import DiffusionModel, Prediction


class Logged(nn.Module):
    """An encoder that notes when it works and when it is moved."""

    def __init__(self, name, layer, log):
        super().__init__()
        self.name, self.layer, self.log = name, layer, log

    def to(self, device):
        self.log.append((self.name, f"to {device}"))
        return super().to(device)

    def forward(self, x):
        self.log.append((self.name, len(x)))
        return self.layer(x)


class Latent(DiffusionModel):
    """A tiny "VAE" and a tiny "text encoder" in front of two layers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.log = []
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3))
        self._encoders = {
            "vae": Logged("vae", nn.Conv2d(1, 2, 2, 2), self.log),
            "text": Logged("text", nn.Embedding(10, 4), self.log),
        }

    @property
    def encoders(self):
        return self._encoders

    def encode(self, batch):
        labels = torch.tensor(batch["label"], device=batch["image"].device)
        text = self.encoders["text"](labels)
        # As a VAE's latents come on a CPU: with channels last.
        x0 = self.encoders["vae"](batch["image"]).to(memory_format=torch.channels_last)
        return x0, {"text": text, "half": text.view(-1, 2, 2)}

    def predict(self, x0, noise, t, condition):
        self.log.append(("network", len(x0)))
        noised = x0 + noise * (t / 1000).view(-1, 1, 1, 1)
        text = condition["text"].mean(1) + condition["half"].sum((1, 2))
        given = torch.cat([noised, text.view(-1, 1, 1, 1).expand_as(noised[:, :1])], 1)
        return Prediction(self.network(given), noise[..., 1:-1, 1:-1], torch.ones(len(x0)))
