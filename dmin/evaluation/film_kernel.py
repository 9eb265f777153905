"""Trains one FiLM network from start to end inside a core's own cache.

What a step of such a network reads and writes, its weights and both moments of AdamW included, fits
the second level of cache. Models trained one after another, a core each, are many times faster than
operations over stacks of them, which stream every intermediate through memory. The oracle is
:class:`~dmin.evaluation.ensemble.Ensemble`'s own path through torch.

The module is imported when first needed: it compiles once and is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # those of torch's AdamW
TIME, LABEL, LAYERS = 0, 4, 5  # where the tensors of each kind begin: see offsets()


def _jit(function: Callable) -> Any:
    """Compile a function when it is first called; keep it on disk where there is a place."""
    settings: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    }
    try:
        return njit(cache=True, **settings)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(**settings)(function)


@_jit
def _affine(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """``out = x Wᵀ + b``."""
    np.dot(x, weight.T, out)
    for row in range(len(out)):
        for j in range(len(bias)):
            out[row, j] += bias[j]


@_jit
def _silu(x: Any, out: Any) -> None:
    for row in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[row, j] = x[row, j] / (np.float32(1) + np.exp(-x[row, j]))


@_jit
def _through_silu(x: Any, above: Any) -> None:
    """Multiply what arrives from above by the slope of SiLU at x."""
    one = np.float32(1)
    for row in range(x.shape[0]):
        for j in range(x.shape[1]):
            s = one / (one + np.exp(-x[row, j]))
            above[row, j] *= s * (one + x[row, j] * (one - s))


@_jit
def _affine_gradient(above: Any, x: Any, weight: Any, bias: Any) -> None:
    """Write the gradients of a layer's weight and bias."""
    np.dot(above.T, x, weight)
    bias[:] = 0
    for row in range(len(above)):
        for j in range(len(bias)):
            bias[j] += above[row, j]


@_jit
def _adamw(theta: Any, grad: Any, moments: Any, mean: Any, rate: Any, step: int, keep: Any) -> None:
    """One step of AdamW without decay, and of the moving average of the weights."""
    first, second = np.float32(BETA1), np.float32(BETA2)
    size = np.float32(rate / (1 - BETA1 ** (step + 1)))
    root = np.float32(1 / np.sqrt(1 - BETA2 ** (step + 1)))
    tiny, one, new = np.float32(TINY), np.float32(1), np.float32(1 - keep)
    if step == 0:
        new = one  # the average starts from the weights after the first step
    m, v = moments[0], moments[1]
    for j in range(len(theta)):
        m[j] += (one - first) * (grad[j] - m[j])
        v[j] = second * v[j] + (one - second) * grad[j] * grad[j]
        theta[j] -= size * m[j] / (np.sqrt(v[j]) * root + tiny)
        mean[j] += new * (theta[j] - mean[j])


@_jit
def train(
    theta: Any,
    offsets: Any,
    sizes: Any,
    examples: Any,
    labels: Any,
    order: Any,
    noise: Any,
    drawn: Any,
    angles: Any,
    mix: Any,
    rates: Any,
    keep: float,
) -> Any:
    """Train one network; return the moving average of its weights, and each step's loss.

    Args:
        theta: float32 ``[P]``, all weights one after another; overwritten.
        offsets: where each tensor begins: the timestep's two layers, labels, then weight and bias
            of each layer, of each FiLM, and of the last layer; and P.
        sizes: pixels, width, depth, embedding.
        examples: float32 ``[N, pixels]``.
        labels: int64 ``[N]``; −1 for a network without classes.
        order: int64 ``[steps, batch]``, the examples of each step.
        noise: float32 ``[steps, batch, pixels]``.
        drawn: int64 ``[steps, batch]``, the rung of each timestep.
        angles: float32 ``[rungs, embedding]``, what stands for a timestep.
        mix: float32 ``[rungs, 5]``: shares of image and noise in the sample and in the target, and
            the weight of the loss.
        rates: float64 ``[steps]``, learning rates.
        keep: decay of the moving average.
    """
    pixels, width, depth, embedding = sizes
    steps, batch = order.shape
    films, last = LAYERS + 2 * depth, LAYERS + 4 * depth
    grad, mean = np.zeros_like(theta), np.zeros_like(theta)
    moments = np.zeros((2, len(theta)), np.float32)
    losses = np.zeros(steps)
    sample = np.empty((batch, pixels), np.float32)
    error, output = np.empty_like(sample), np.empty_like(sample)
    e = np.empty((batch, embedding), np.float32)
    u, s, before, c, dc, part = (
        np.empty_like(e), np.empty_like(e), np.empty_like(e), np.empty_like(e), np.empty_like(e),
        np.empty_like(e),
    )  # fmt: skip
    z = np.empty((depth, batch, width), np.float32)
    y, h, f = np.empty_like(z), np.empty_like(z), np.empty((depth, batch, 2 * width), np.float32)
    dh, dz, through = np.empty_like(z[0]), np.empty_like(z[0]), np.empty_like(z[0])
    df = np.empty((batch, 2 * width), np.float32)
    one = np.float32(1)
    for step in range(steps):
        for b in range(batch):
            rung, example = drawn[step, b], order[step, b]
            e[b] = angles[rung]
            for j in range(pixels):
                sample[b, j] = (
                    mix[rung, 0] * examples[example, j] + mix[rung, 1] * noise[step, b, j]
                )
        # Forward.
        _affine(e, _matrix(theta, offsets, TIME, embedding), _vector(theta, offsets, TIME + 1), u)
        _silu(u, s)
        second = _matrix(theta, offsets, TIME + 2, embedding)
        _affine(s, second, _vector(theta, offsets, TIME + 3), before)
        for b in range(batch):
            label = labels[order[step, b]]
            if label >= 0:
                place = offsets[LABEL] + label * embedding
                for j in range(embedding):
                    before[b, j] += theta[place + j]
        _silu(before, c)
        for layer in range(depth):
            weight = _matrix(theta, offsets, LAYERS + 2 * layer, width)
            bias = _vector(theta, offsets, LAYERS + 2 * layer + 1)
            _affine(sample if layer == 0 else h[layer - 1], weight, bias, z[layer])
            weight = _matrix(theta, offsets, films + 2 * layer, 2 * width)
            bias = _vector(theta, offsets, films + 2 * layer + 1)
            _affine(c, weight, bias, f[layer])
            for b in range(batch):
                for j in range(width):
                    a = (one + f[layer, b, j]) * z[layer, b, j] + f[layer, b, width + j]
                    y[layer, b, j] = a
                    h[layer, b, j] = a / (one + np.exp(-a))
                    if layer > 0:
                        h[layer, b, j] += h[layer - 1, b, j]
        leave = _matrix(theta, offsets, last, pixels)
        _affine(h[depth - 1], leave, _vector(theta, offsets, last + 1), output)
        for b in range(batch):
            rung, example = drawn[step, b], order[step, b]
            scale, square = np.float32(2) * mix[rung, 4] / np.float32(pixels * batch), np.float32(0)
            for j in range(pixels):
                target = mix[rung, 2] * examples[example, j] + mix[rung, 3] * noise[step, b, j]
                off = output[b, j] - target
                square += off * off
                error[b, j] = scale * off
            losses[step] += mix[rung, 4] * square / (pixels * batch)
        # Backward.
        _affine_gradient(
            error,
            h[depth - 1],
            _matrix(grad, offsets, last, pixels),
            _vector(grad, offsets, last + 1),
        )
        np.dot(error, leave, dh)
        dc[:] = 0
        for layer in range(depth - 1, -1, -1):
            through[:] = dh
            _through_silu(y[layer], through)
            for b in range(batch):
                for j in range(width):
                    dy = through[b, j]
                    dz[b, j] = dy * (one + f[layer, b, j])
                    df[b, j] = dy * z[layer, b, j]
                    df[b, width + j] = dy
            number = films + 2 * layer
            _affine_gradient(
                df, c, _matrix(grad, offsets, number, 2 * width), _vector(grad, offsets, number + 1)
            )
            np.dot(df, _matrix(theta, offsets, number, 2 * width), part)
            dc += part
            number = LAYERS + 2 * layer
            _affine_gradient(
                dz,
                sample if layer == 0 else h[layer - 1],
                _matrix(grad, offsets, number, width),
                _vector(grad, offsets, number + 1),
            )
            if layer > 0:
                np.dot(dz, _matrix(theta, offsets, number, width), through)
                dh += through
        _through_silu(before, dc)
        grad[offsets[LABEL] : offsets[LABEL + 1]] = 0
        for b in range(batch):
            label = labels[order[step, b]]
            if label >= 0:
                place = offsets[LABEL] + label * embedding
                for j in range(embedding):
                    grad[place + j] += dc[b, j]
        _affine_gradient(
            dc,
            s,
            _matrix(grad, offsets, TIME + 2, embedding),
            _vector(grad, offsets, TIME + 3),
        )
        np.dot(dc, second, part)
        _through_silu(u, part)
        _affine_gradient(
            part, e, _matrix(grad, offsets, TIME, embedding), _vector(grad, offsets, TIME + 1)
        )
        _adamw(theta, grad, moments, mean, rates[step], step, keep)
    return mean, losses


@_jit
def _vector(flat: Any, offsets: Any, number: int) -> Any:
    return flat[offsets[number] : offsets[number + 1]]


@_jit
def _matrix(flat: Any, offsets: Any, number: int, rows: int) -> Any:
    size = offsets[number + 1] - offsets[number]
    return flat[offsets[number] : offsets[number + 1]].reshape(rows, size // rows)
