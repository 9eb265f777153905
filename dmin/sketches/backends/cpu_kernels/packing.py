"""Pack channels into panels that are read sequentially."""

import numpy as np

from dmin.sketches.backends.cpu_kernels.vectors import WIDTH, at, compiled, inlined, transpose


@inlined
def enough(scratch, size):  # type: ignore[no-untyped-def]
    """Return ``scratch`` if it has at least ``size`` floats, else newly allocated memory."""
    return scratch if len(scratch) >= size else np.empty(size, np.float32)


@compiled
def pack(x: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    """Lay out channels × pixels in panels of channels, with a border of zeros.

    Args:
        x: ``[channels, height, width]``, contiguous.
        top: rows of zeros above.
        left: columns of zeros on the left.
        out: ``[panels, height', width', panel]``, zeros, with WIDTH more floats behind it in
            memory. Pixels that do not fit are left out.
    """
    # Pixels are contiguous in x, channels are contiguous in panels. WIDTH × WIDTH squares are
    # transposed in registers, so that whole vectors are read and written.
    channels, panel = x.shape[0], out.shape[3]
    height, width = min(x.shape[1], out.shape[1] - top), min(x.shape[2], out.shape[2] - left)
    for p in range(out.shape[0]):
        for first in range(p * panel, min((p + 1) * panel, channels), WIDTH):
            lane = first - p * panel
            count = min(panel - lane, channels - first, WIDTH)
            whole = width // WIDTH * WIDTH if first + WIDTH <= channels else 0
            for i in range(height):
                source = (first * x.shape[1] + i) * x.shape[2]
                target = ((p * out.shape[1] + top + i) * out.shape[2] + left) * panel + lane
                for j in range(0, whole, WIDTH):
                    transpose(
                        at(x, source + j),
                        x.shape[1] * x.shape[2],
                        at(out, target + j * panel),
                        panel,
                    )
                # A vector longer than a panel overwrites part of the next pixel, which is written
                # later; behind the end of a line, zeros are restored.
                behind = target // panel + whole
                if whole and panel < WIDTH and behind < out.size // panel:
                    line, j = behind // out.shape[2], behind % out.shape[2]
                    for c in range(WIDTH - panel):
                        out[line // out.shape[1], line % out.shape[1], j, c] = 0
                for c in range(count):
                    for j in range(whole, width):
                        out[p, top + i, left + j, lane + c] = x[first + c, i, j]


@compiled
def pack_rows(x: np.ndarray, out: np.ndarray) -> None:
    """Lay out positions × channels (contiguous) in panels ``[panels, positions, panel]``."""
    positions, channels = x.shape
    panel = out.shape[2]
    for p in range(out.shape[0]):
        first = p * panel
        count = min(panel, channels - first)
        for i in range(positions):
            for c in range(count):
                out[p, i, c] = x[i, first + c]
