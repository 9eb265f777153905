"""Tiles of output gradients and inputs, transformed by the Toom–Cook algorithm.

The gradient of a 3 × 3 convolution is formed in this domain (Winograd 1980; Lavin & Gray, arXiv
1509.09308): each 4 × 4 tile of output gradients costs 36 multiplications instead of 144 for the 9
entries of a kernel. The points 0, ±√½, ±√2, ∞ keep the error of single precision within three times
that of the plain sum.
"""

import numpy as np

from dmin.sketches.backends.cpu_kernels.vectors import WIDTH, at, compiled, sandwich


def toom_cook(points: list[float], outputs: int, taps: int) -> tuple[np.ndarray, ...]:
    """Return A, G, B with ``Σ_t d[t] a[i + t] = (Aᵀ [(G d) ∘ (B a)])[i]`` for i < outputs.

    Args:
        points: the outputs + taps − 2 finite evaluation points of the polynomials; ∞ is added.
        outputs: length of the result.
        taps: length of d.
    """
    size = outputs + taps - 1
    inverse = np.zeros((outputs, size))
    inverse[:, :-1] = np.power.outer(points, np.arange(outputs)).T
    inverse[-1, -1] = 1
    first = np.zeros((size, taps))
    first[:-1] = np.power.outer(points, np.arange(taps))
    first[-1, -1] = 1
    # B solves the identity for every pair of unit vectors.
    products = np.einsum("ix,xt->itx", inverse, first).reshape(-1, size)
    wanted = np.zeros((outputs, taps, size))
    for i in range(outputs):
        for t in range(taps):
            wanted[i, t, i + t] = 1
    second = np.linalg.lstsq(products, wanted.reshape(-1, size), rcond=None)[0]
    second[np.abs(second) < 1e-12] = 0
    return inverse, first, second


TILE = 4  # height and width of a tile of output gradients
POINTS = TILE + 2
PRODUCTS = POINTS * POINTS
_INVERSE, _FIRST, _SECOND = toom_cook([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)], 3, TILE)
to_kernel, _of_gradient, _of_input = map(sandwich, (_INVERSE, _FIRST, _SECOND))
# Measured cost of the transforms per gradient entry, in multiplications.
TRANSFORM_COST = 200


@compiled
def transform(x: np.ndarray, out: np.ndarray, inputs: bool) -> None:
    """Transform each 4 × 4 tile of packed output gradients, or 6 × 6 tile of packed inputs.

    Tiles of inputs overlap by two.

    Args:
        x: ``[panels, 4·tiles, 4·tiles', lanes]``, of inputs ``[panels, 4·tiles + 2, 4·tiles' + 2,
            lanes]``, with WIDTH more floats behind it in memory where lanes are not whole vectors.
        out: ``[panels, 36, tiles·tiles' + 1, lanes]``, likewise; the last tile is scratch. (It also
            avoids power-of-two strides, which map to few cache sets and are five times as slow.)
        inputs: whether x holds inputs, else output gradients.
    """
    panels, height, width, lanes = x.shape
    down, across = height // TILE, width // TILE
    tiles = out.shape[2]
    row, column = POINTS * tiles * lanes, tiles * lanes
    for p in range(panels):
        for i in range(down):
            for j in range(across):
                # Lanes beyond a panel are overwritten by the tile that comes after.
                for lane in range(0, lanes, WIDTH):
                    source = at(x, ((p * height + TILE * i) * width + TILE * j) * lanes + lane)
                    target = at(out, (p * PRODUCTS * tiles + i * across + j) * lanes + lane)
                    if inputs:
                        _of_input(source, width * lanes, lanes, target, row, column)
                    else:
                        _of_gradient(source, width * lanes, lanes, target, row, column)
