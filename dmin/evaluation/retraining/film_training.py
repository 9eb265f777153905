"""Training many FiLM networks on a CPU: one after another on each core, by compiled loops.

:class:`~dmin.evaluation.retraining.ensemble.Ensemble` uses it for models of this kind;
all others are trained together by torch.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from dmin.models.base import DiffusionModel
from dmin.models.toy.mlp import MLP, FiLMNetwork

Stacked = dict[str, Tensor]


def can_train(model: DiffusionModel, device: torch.device) -> bool:
    """Return whether these loops compute a model's loss: not for subclasses, nor on a GPU."""
    return type(model) is MLP and type(model.network) is FiLMNetwork and device.type == "cpu"


def train_films(
    model: MLP,
    start: Mapping[str, Tensor],
    examples: tuple[Tensor, Tensor | None],
    orders: Sequence[Tensor],
    draws: tuple[Tensor, Tensor],
    rates: Sequence[float],
    ema_decay: float,
) -> tuple[Stacked, np.ndarray]:
    """Return the moving averages of the weights, ``[models, ...]``, and losses ``[models, steps]``.

    Args:
        model: gives network and diffusion process.
        start: initial weights of all models, by name.
        examples: inputs of the model ``[N, ...]``, and labels ``[N]`` or None.
        orders: for each model the examples of each step, ``[steps, batch]``.
        draws: noise ``[steps, batch, ...]`` and timesteps ``[steps, batch]``, for all models.
        rates: the learning rate of each step.
        ema_decay: of the moving average.
    """
    # Imported here because Numba compiles at import.
    from dmin.evaluation.retraining.film_kernel import train

    network: FiLMNetwork = model.network
    names = _names(network)
    lengths = [start[name].numel() if name in start else 0 for name in names]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = torch.cat([start[name].detach().reshape(-1) for name in names if name in start])
    x0, labels = examples
    noise, t = draws
    timesteps = torch.tensor(list(model.timesteps))
    first, depth = network.layers[0], len(network.layers)
    sizes = first.in_features, first.out_features, depth, network.time[0].in_features
    shared = (
        x0.flatten(1).contiguous().numpy(),
        np.full(len(x0), -1) if labels is None else labels.long().numpy(),
    )
    drawn = (
        noise.flatten(2).contiguous().numpy(),
        _places(t, timesteps).numpy(),
        network.angles(timesteps).float().contiguous().numpy(),
        _mix(model, timesteps).numpy(),
        np.array(rates, dtype=np.float64),
        float(ema_decay),
    )

    def one(order: Tensor) -> Any:
        steps = order.contiguous().numpy()
        return train(flat.clone().numpy(), offsets, sizes, *shared, steps, *drawn)

    threads = max(1, min(torch.get_num_threads(), len(orders)))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        trained = list(pool.map(one, orders))
    weights = torch.from_numpy(np.stack([mean for mean, _ in trained]))
    stacked = {
        name: weights[:, begin:end].reshape(len(orders), *start[name].shape)
        for name, begin, end in zip(names, offsets[:-1], offsets[1:], strict=True)
        if name in start
    }
    return stacked, np.stack([losses for _, losses in trained])


def _names(network: FiLMNetwork) -> list[str]:
    """Return the names of parameters in the order of the loops; labels are always included."""
    of = ("weight", "bias")
    depth = range(len(network.layers))
    return [
        *(f"time.{layer}.{kind}" for layer in (0, 2) for kind in of),
        "label.weight",
        *(f"layers.{layer}.{kind}" for layer in depth for kind in of),
        *(f"films.{layer}.{kind}" for layer in depth for kind in of),
        *(f"leave.{kind}" for kind in of),
    ]


def _places(t: Tensor, timesteps: Tensor) -> Tensor:
    """Return the index of each timestep among all timesteps."""
    order = timesteps.argsort()
    return order[torch.searchsorted(timesteps[order], t)]


def _mix(model: MLP, timesteps: Tensor) -> Tensor:
    """Return the coefficients of image and noise in sample and target, for each timestep."""
    one, none = torch.ones(len(timesteps), 1), torch.zeros(len(timesteps), 1)
    image, noise = model.process(one, none, timesteps), model.process(none, one, timesteps)
    parts = [image.sample, noise.sample, image.target, noise.target, image.weight[:, None]]
    return torch.cat(parts, dim=1).float().contiguous()
