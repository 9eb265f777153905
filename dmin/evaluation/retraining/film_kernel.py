"""Train one FiLM network from start to end within the cache of one core.

All that a step of such a network reads and writes, including its weights and both moments of AdamW,
fits into the L2 cache. Training models one after another on each core is many times faster
than operations over stacked models, which stream every intermediate through memory. Measured on the
digits' models, two cores: torch takes 9 times the processor time or more for 64 models at once, 36
times for 16, and ``benchmark=digits`` trains some hundreds in its six minutes. The oracle is
:class:`~dmin.evaluation.retraining.ensemble.Ensemble`'s own path through torch.

The module is imported when first needed; it is compiled once and cached on disk.
"""

from collections import namedtuple
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dmin.runtime.jit import compiled

BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # defaults of torch's AdamW
TIME, LABEL, LAYERS = 0, 4, 5  # index of the first tensor of each kind: see film_training


class Net(NamedTuple):
    """The network: the offset of each of its tensors, and its sizes."""

    offsets: Any
    pixels: int
    width: int
    depth: int
    embedding: int


Kept = namedtuple("Kept", "sample output error e u s before c dc part z f y h dh dz through df")
"""Buffers of a step, ``[batch, ...]``, or ``[depth, batch, ...]`` if there is one per layer.

The timestep's embedding is ``e → u → s = SiLU(u) → before → c = SiLU(before)``, a layer is
``h → z → y = (1 + f₁) z + f₂ → h + SiLU(y)`` with ``f`` from ``c``; ``d…`` are gradients.
"""


_jit = partial(
    compiled, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"}, inline="never"
)
_part = partial(_jit, inline="always")  # inlined, the compiler knows that arrays do not overlap


@_jit
def _vector(flat: Any, offsets: Any, number: int) -> Any:
    return flat[offsets[number] : offsets[number + 1]]


@_jit
def _matrix(flat: Any, offsets: Any, number: int, rows: int) -> Any:
    return _vector(flat, offsets, number).reshape(rows, -1)


@_jit
def _affine(theta: Any, offsets: Any, number: int, x: Any, out: Any) -> None:
    """``out = x Wᵀ + b``, with W the tensor with that index and b the next one."""
    bias = _vector(theta, offsets, number + 1)
    np.dot(x, _matrix(theta, offsets, number, out.shape[1]).T, out)
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
    """Multiply the gradient ``above`` by the derivative of SiLU at x, in place."""
    one = np.float32(1)
    for row in range(x.shape[0]):
        for j in range(x.shape[1]):
            s = one / (one + np.exp(-x[row, j]))
            above[row, j] *= s * (one + x[row, j] * (one - s))


@_jit
def _affine_gradient(grad: Any, offsets: Any, number: int, x: Any, above: Any) -> None:
    """Write the gradients of a layer's weight and bias."""
    bias = _vector(grad, offsets, number + 1)
    np.dot(above.T, x, _matrix(grad, offsets, number, above.shape[1]))
    bias[:] = 0
    for row in range(len(above)):
        for j in range(len(bias)):
            bias[j] += above[row, j]


@_jit
def _adamw(theta: Any, grad: Any, moments: Any, mean: Any, rate: Any, step: int, keep: Any) -> None:
    """One step of AdamW without weight decay, and of the moving average of the weights."""
    first, second = np.float32(BETA1), np.float32(BETA2)
    size = np.float32(rate / (1 - BETA1 ** (step + 1)))
    root = np.float32(1 / np.sqrt(1 - BETA2 ** (step + 1)))
    tiny, one = np.float32(TINY), np.float32(1)
    new = np.float32(1 - keep) if step else one  # it starts from the first step's weights
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
            of each layer, of each FiLM, and of the last layer; then P.
        sizes: pixels, width, depth, embedding.
        examples: float32 ``[N, pixels]``.
        labels: int64 ``[N]``; −1 for a network without classes.
        order: int64 ``[steps, batch]``, the examples of each step.
        noise: float32 ``[steps, batch, pixels]``.
        drawn: int64 ``[steps, batch]``, the index of each timestep.
        angles: float32 ``[levels, embedding]``, the sinusoidal embedding of each timestep.
        mix: float32 ``[levels, 5]``: coefficients of image and noise in the sample and in the
            target, and the weight of the loss.
        rates: float64 ``[steps]``, learning rates.
        keep: decay of the moving average.
    """
    steps, batch = order.shape
    net = Net(offsets, sizes[0], sizes[1], sizes[2], sizes[3])
    kept = _room(net, batch)
    grad, mean = np.zeros_like(theta), np.zeros_like(theta)
    moments = np.zeros((2, len(theta)), np.float32)
    losses = np.zeros(steps)
    for step in range(steps):
        chosen, levels, drawn_noise = order[step], drawn[step], noise[step]
        _sample(kept, examples, chosen, drawn_noise, levels, angles, mix)
        _forward(theta, net, kept, labels, chosen)
        losses[step] = _compare(kept, examples, chosen, drawn_noise, levels, mix)
        _backward(theta, grad, net, kept, labels, chosen)
        _adamw(theta, grad, moments, mean, rates[step], step, keep)
    return mean, losses


@_part
def _room(net: Any, batch: int) -> Any:
    """Allocate the buffers of a step."""
    image, thin, broad = (batch, net.pixels), (batch, net.embedding), (batch, net.width)
    deep, films = (net.depth, batch, net.width), (net.depth, batch, 2 * net.width)
    of = np.float32
    sample, output, error = np.empty(image, of), np.empty(image, of), np.empty(image, of)
    e, u, s, before = np.empty(thin, of), np.empty(thin, of), np.empty(thin, of), np.empty(thin, of)
    c, dc, part = np.empty(thin, of), np.empty(thin, of), np.empty(thin, of)
    z, f, y, h = np.empty(deep, of), np.empty(films, of), np.empty(deep, of), np.empty(deep, of)
    dh, dz, through = np.empty(broad, of), np.empty(broad, of), np.empty(broad, of)
    df = np.empty((batch, 2 * net.width), of)
    return Kept(
        sample, output, error, e, u, s, before, c, dc, part, z, f, y, h, dh, dz, through, df
    )


@_part
def _sample(
    kept: Any, examples: Any, chosen: Any, noise: Any, levels: Any, angles: Any, mix: Any
) -> None:
    """Mix images and noise, and look up the embeddings of their timesteps."""
    sample, e = kept.sample, kept.e
    for b in range(len(chosen)):
        level, example = levels[b], chosen[b]
        e[b] = angles[level]
        for j in range(sample.shape[1]):
            sample[b, j] = mix[level, 0] * examples[example, j] + mix[level, 1] * noise[b, j]


@_part
def _forward(theta: Any, net: Any, kept: Any, labels: Any, chosen: Any) -> None:
    """Run the forward pass: fill in all activations, the output last."""
    one, at, width, all_h = np.float32(1), net.offsets, net.width, kept.h
    _affine(theta, at, TIME, kept.e, kept.u)
    _silu(kept.u, kept.s)
    _affine(theta, at, TIME + 2, kept.s, kept.before)
    for b in range(len(chosen)):
        label = labels[chosen[b]]
        if label >= 0:
            place = at[LABEL] + label * net.embedding
            for j in range(net.embedding):
                kept.before[b, j] += theta[place + j]
    _silu(kept.before, kept.c)
    for layer in range(net.depth):
        z, f, y, h = kept.z[layer], kept.f[layer], kept.y[layer], all_h[layer]
        number = LAYERS + 2 * layer
        _affine(theta, at, number, kept.sample if layer == 0 else all_h[layer - 1], z)
        _affine(theta, at, number + 2 * net.depth, kept.c, f)
        for b in range(len(chosen)):
            for j in range(width):
                a = (one + f[b, j]) * z[b, j] + f[b, width + j]
                y[b, j] = a
                h[b, j] = a / (one + np.exp(-a))
                if layer > 0:
                    h[b, j] += all_h[layer - 1, b, j]
    _affine(theta, at, LAYERS + 4 * net.depth, all_h[net.depth - 1], kept.output)


@_part
def _compare(kept: Any, examples: Any, chosen: Any, noise: Any, levels: Any, mix: Any) -> float:
    """Return the batch's loss, and fill in its gradient with respect to the output."""
    output, error = kept.output, kept.error
    batch, pixels = output.shape
    loss = 0.0
    for b in range(batch):
        level, example = levels[b], chosen[b]
        scale, square = np.float32(2) * mix[level, 4] / np.float32(pixels * batch), np.float32(0)
        for j in range(pixels):
            target = mix[level, 2] * examples[example, j] + mix[level, 3] * noise[b, j]
            off = output[b, j] - target
            square += off * off
            error[b, j] = scale * off
        loss += mix[level, 4] * square / (pixels * batch)
    return loss


@_part
def _backward(theta: Any, grad: Any, net: Any, kept: Any, labels: Any, chosen: Any) -> None:
    """Fill in the gradient of all weights, from the last layer to the timestep's."""
    one, at, width = np.float32(1), net.offsets, net.width
    dh, dz, df, dc, through = kept.dh, kept.dz, kept.df, kept.dc, kept.through
    last = LAYERS + 4 * net.depth
    _affine_gradient(grad, at, last, kept.h[net.depth - 1], kept.error)
    np.dot(kept.error, _matrix(theta, at, last, net.pixels), dh)
    dc[:] = 0
    for layer in range(net.depth - 1, -1, -1):
        z, f = kept.z[layer], kept.f[layer]
        through[:] = dh
        _through_silu(kept.y[layer], through)
        for b in range(len(chosen)):
            for j in range(width):
                dy = through[b, j]
                dz[b, j] = dy * (one + f[b, j])
                df[b, j] = dy * z[b, j]
                df[b, width + j] = dy
        number = LAYERS + 2 * layer
        film = number + 2 * net.depth
        _affine_gradient(grad, at, film, kept.c, df)
        np.dot(df, _matrix(theta, at, film, 2 * width), kept.part)
        dc += kept.part
        below = kept.sample if layer == 0 else kept.h[layer - 1]
        _affine_gradient(grad, at, number, below, dz)
        if layer > 0:
            np.dot(dz, _matrix(theta, at, number, width), through)
            dh += through
    _backward_time(theta, grad, net, kept, labels, chosen)


@_part
def _backward_time(theta: Any, grad: Any, net: Any, kept: Any, labels: Any, chosen: Any) -> None:
    """Fill in the gradient of the labels' and the timestep's weights; ``dc`` is overwritten."""
    at, embedding, dc, part = net.offsets, net.embedding, kept.dc, kept.part
    _through_silu(kept.before, dc)
    grad[at[LABEL] : at[LABEL + 1]] = 0
    for b in range(len(chosen)):
        label = labels[chosen[b]]
        if label >= 0:
            place = at[LABEL] + label * embedding
            for j in range(embedding):
                grad[place + j] += dc[b, j]
    _affine_gradient(grad, at, TIME + 2, kept.s, dc)
    np.dot(dc, _matrix(theta, at, TIME + 2, embedding), part)
    _through_silu(kept.u, part)
    _affine_gradient(grad, at, TIME, kept.e, part)
