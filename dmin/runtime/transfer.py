"""Copies between host and device that nobody waits for: through pinned memory, with an event."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU receives it behind what it has to do.

    From memory that is not pinned the copy would wait until the device has done everything before.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device, non_blocking=True)
    return x.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Iterable[Tensor]) -> Callable[[], list[Tensor]]:
    """Have tensors copied to the host.

    Returns:
        A function that waits for the copies and returns them, to be called in any thread.
    """
    tensors = list(tensors)
    gpus = {x.device for x in tensors if x.is_cuda}
    if not gpus:
        return lambda: [x.cpu() for x in tensors]
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    events = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]

    def wait() -> list[Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait
