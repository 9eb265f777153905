"""Count sketches of a layer's inputs and output gradients, and products of their spectra."""

import numpy as np

from dmin.sketches.backends.cpu_kernels.vectors import compiled


@compiled
def count_sketch(  # type: ignore[no-untyped-def]
    x, walk, first, last, bucket, sign, out
):
    """Compute count sketches of the inputs that some output positions read.

    Args:
        x: ``[pixels, channels]``.
        walk: which pixels each position reads.
        first: the first position.
        last: one past the last position.
        bucket: int32 ``[taps · channels]``.
        sign: float32 ``[taps · channels]``.
        out: ``[last − first, k]``, zeros.
    """
    channels = x.shape[1]
    for p in range(first, last):
        under = (p // walk.length) * walk.line_step + (p % walk.length) * walk.step
        for tap in range(len(walk.starts)):
            pixel = under + walk.starts[tap]
            for c in range(channels):
                j = tap * channels + c
                out[p - first, bucket[j]] += sign[j] * x[pixel, c]


@compiled
def add_products(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> None:
    """``total += Σ_p left[p] · right[p]`` for complex spectra ``[positions, k // 2 + 1]``."""
    for p in range(left.shape[0]):
        for j in range(left.shape[1]):
            total[j] += left[p, j] * right[p, j]
