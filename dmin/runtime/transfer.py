"""Asynchronous copies between host and device, and moving modules on and off the device.

Copies go through pinned memory, with an event.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU receives it behind what it has to do.

    From memory that is not pinned the copy would wait until the device has done everything before.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        # Of devices but a GPU nobody says when it has come; one without numbers has it at once.
        return x.to(device, non_blocking=x.is_cuda or device.type == "meta")
    return x.pin_memory().to(device, non_blocking=True)


def in_double(x: Tensor) -> Tensor:
    """Return a tensor in double precision: on the host, if its device may have none."""
    return (x if x.device.type in ("cpu", "cuda") else x.cpu()).double()


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


@contextmanager
def kept_devices(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring modules back, in the end, to the devices they are on; the CPU without parameters."""
    homes = []
    for module in modules:
        first = next(module.parameters(), None)
        homes.append((module, torch.device("cpu") if first is None else first.device))
    try:
        yield
    finally:
        for module, home in homes:
            module.to(home)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device for a while; then on the CPU, as :func:`leave_device` has it."""
    modules = list(modules)
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        leave_device(modules)


def leave_device(modules: Iterable[nn.Module]) -> None:
    """Bring modules to the CPU, and give the memory they had to whoever needs it."""
    for module in modules:
        module.to("cpu")
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
