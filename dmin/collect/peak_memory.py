"""The peak memory of a pass."""

import torch

from dmin.runtime.memory import peak_resident


class PeakMemory:
    """The memory that per-example gradients take, as far as the device can tell.

    On a GPU: the largest ``peak during backward − allocated when forward was done`` of any pass, so
    beyond weights and activations (torch's allocator; another process's memory does not count). On
    a CPU no such thing can be measured: there it is by how much the process's peak resident memory
    grew, activations and the loading of examples included.

    Attributes:
        bytes: the largest seen so far.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.start(torch.device(device))

    def start(self, device: torch.device) -> None:
        """Begin anew, on a device."""
        self.device = device
        self.bytes: int = 0
        self._held = 0
        self._start = allocated_bytes(device)

    @property
    def meaning(self) -> str:
        """What the number is, in words."""
        if self.device.type == "cuda":
            return "peak GPU memory of a backward pass beyond weights and activations"
        return "growth of the process's peak resident memory, activations included"

    def forward_done(self) -> None:
        """Note what stands in memory before backward."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)

    def backward_done(self) -> None:
        """Note what backward took."""
        before = self._held if self.device.type == "cuda" else self._start
        self.bytes = max(self.bytes, peak_bytes(self.device) - before)


def allocated_bytes(device: torch.device) -> int:
    """Return what is allocated on a GPU now; on a CPU, the process's peak so far."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_resident()


def peak_bytes(device: torch.device) -> int:
    """Return the most that was allocated on a GPU since its reset; on a CPU, by the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
