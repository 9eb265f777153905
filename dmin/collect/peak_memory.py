"""The peak memory of a pass."""

import torch

from dmin.runtime.memory import peak_resident


class PeakMemory:
    """The memory of per-example gradients, as far as the device reports it.

    On a GPU: the largest ``peak during backward − allocated when forward was done`` of any pass,
    that is, beyond weights and activations (by torch's allocator, for this
    process). On a CPU it is the growth of the process's peak resident memory, which
    includes activations and the loading of examples.

    Attributes:
        bytes: the largest seen so far.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.start(torch.device(device))

    def start(self, device: torch.device) -> None:
        """Start measuring, on a device."""
        self.device = device
        self.bytes: int = 0
        self._held = 0
        self._start = allocated_bytes(device)

    @property
    def meaning(self) -> str:
        """A description of the number."""
        if self.device.type == "cuda":
            return "peak GPU memory of a backward pass beyond weights and activations"
        return "growth of the process's peak resident memory, activations included"

    def forward_done(self) -> None:
        """Record the memory before backward."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)

    def backward_done(self) -> None:
        """Record the memory of backward."""
        before = self._held if self.device.type == "cuda" else self._start
        self.bytes = max(self.bytes, peak_bytes(self.device) - before)


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes allocated on a GPU now; on a CPU, the process's peak so far."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_resident()


def peak_bytes(device: torch.device) -> int:
    """Return the peak allocation on a GPU since its reset; on a CPU, that of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
