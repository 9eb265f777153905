"""A small class-conditional UNet, trained by a loop that a kill costs three minutes at most."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmin.data.base import Dataset, collate
from dmin.diffusion.inputs import NoisedBatch, chosen_rows
from dmin.models import DDPM
from dmin.models.base import Condition, per_example_loss
from dmin.train import learn_labels

BATCH, RATE, WARMUP, DECAY, PATCH = 16, 1e-3, 200, 0.998, 2
NETWORK = {
    "sample_size": 32 // PATCH,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "block_out_channels": [48, 64, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}


class Patched(DDPM):
    """A DDPM whose places are patches of 2 × 2 pixels, which take less time than pixels."""

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return images as patches, in [-1, 1], and labels."""
        return super().encode({**batch, "image": pixel_unshuffle(batch["image"], PATCH)})

    def sample(self, prompts: Sequence[Any], seeds: Sequence[int], steps: int = 100) -> Tensor:
        """Generate, and put the patches together."""
        return pixel_shuffle(super().sample(prompts, seeds, steps), PATCH)


def untrained(data: Dataset) -> Patched:
    """Return the network as it starts."""
    torch.manual_seed(0)
    classes = len({data[i].label for i in range(len(data))})
    model = Patched.build({**NETWORK, "num_class_embeds": classes}, SCHEDULER)
    learn_labels(model, data)
    return model.eval()


def trained(data: Dataset, place: Path, steps: int) -> Patched:
    """Return the model after some steps, with averaged weights; goes on where it was stopped.

    The rate stays after its warm-up and each step draws its own batch, timesteps and noise, so a
    longer training goes on from a shorter one.

    Raises:
        SystemExit: more steps than asked for are kept.
    """
    model, average = untrained(data), untrained(data)
    optimizer = torch.optim.AdamW(model.network.parameters(), RATE, weight_decay=0.0)
    parts = {"network": model.network, "average": average.network, "optimizer": optimizer}
    kept = place / "training.pt"
    start, spent = _resume(kept, parts)
    if start > steps:
        raise SystemExit(f"{kept} is of {start} steps, more than --steps={steps}. Delete it.")
    x0, condition = model.encode(collate([data[i] for i in range(len(data))]))
    model.train()
    losses, saved, begun = [], time.monotonic(), time.process_time() - spent
    for step in range(start, steps):
        losses.append(_step(model, optimizer, x0, condition, step))
        _follow(average.network, model.network, min(DECAY, (1 + step) / (10 + step)))
        if time.monotonic() - saved > 150 or step + 1 == steps:
            spent, loss = time.process_time() - begun, sum(losses) / len(losses)
            print(f"step {step + 1} of {steps}, loss {loss:.4f}, {spent:.0f} s of CPU", flush=True)
            _save(kept, step + 1, spent, parts)
            losses, saved = [], time.monotonic()
    return average.eval()


def _step(model: DDPM, optimizer: Any, x0: Tensor, condition: Any, step: int) -> float:
    """Take one step; return its loss."""
    drawn = torch.Generator().manual_seed(step)
    rows = torch.randint(len(x0), (BATCH,), generator=drawn)
    t = torch.randint(1000, (BATCH,), generator=drawn)
    noise = torch.randn(BATCH, *x0.shape[1:], generator=drawn)
    batch = NoisedBatch(x0[rows], noise, t, chosen_rows(condition, rows))
    loss = per_example_loss(model.predict(*batch)).mean()
    optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _follow(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    pairs = zip(average.parameters(), network.parameters(), strict=True)
    for mean, now in pairs:
        mean.lerp_(now, 1 - decay)


def _save(kept: Path, step: int, spent: float, parts: dict[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    states = {name: copy.copy(part.state_dict()) for name, part in parts.items()}
    torch.save({"step": step, "seconds": spent, **states}, kept.with_suffix(".partial"))
    kept.with_suffix(".partial").rename(kept)


def _resume(kept: Path, parts: dict[str, Any]) -> tuple[int, float]:
    if not kept.is_file():
        return 0, 0.0
    found = torch.load(kept, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(found[name])
    return found["step"], found["seconds"]
