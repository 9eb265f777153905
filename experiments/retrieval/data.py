"""Rows to search: synthetic clusters, and the rows of a real store resampled to any number."""

import numpy as np
from numba import njit, prange

from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

BLOCK = 500
LATENT = 256


@njit(nogil=True, parallel=True)
def jitter(rows, sizes, key):
    """Add uniform noise of the given root mean square, drawn by a hash of (key, row, entry)."""
    n, width = rows.shape
    for i in prange(n):
        state = np.uint64(key) + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
        for j in range(width):
            state += np.uint64(0x9E3779B97F4A7C15)
            z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            unit = np.float32(z >> np.uint64(40)) * np.float32(2.0**-24) - np.float32(0.5)
            rows[i, j] += sizes * np.float32(3.4641016) * unit


def unit(rows):
    return rows / np.maximum(np.sqrt(np.square(rows).sum(-1, keepdims=True)), 1e-12)


class Synthetic:
    """20 classes, 256 directions with a spectrum j^-1/2, and a fifth of noise."""

    def __init__(self, times, dim):
        generator = np.random.default_rng(0)
        self.shape = (times, dim)
        scale = np.arange(1, LATENT + 1)[:, None] ** -0.5
        basis = generator.standard_normal((LATENT, times * dim), dtype=np.float32)
        self.basis = (basis * scale / np.sqrt(dim)).astype(np.float32)
        self.classes = 1.5 * generator.standard_normal((20, LATENT), dtype=np.float32)

    def rows(self, n, seed, queries=False):
        generator = np.random.default_rng(seed)
        own = generator.standard_normal((n, LATENT), dtype=np.float32)
        latent = own + self.classes[generator.integers(0, 20, n)]
        rows = unit((latent @ self.basis).reshape(n, *self.shape))
        flat = rows.reshape(n, -1)
        jitter(flat, np.float32(0.5 / np.sqrt(self.shape[1])), seed)
        return unit(rows)


class Resampled:
    """Rows of a real store: mixtures of a row and one of its 8 nearest, with noise of .3.

    A real row's nearest neighbour is at a cosine of .79 (digits); of these rows' it is higher, as
    it would be with more images of the same kind.
    """

    def __init__(self, times, dim, folder):
        train, held = (self._read(Store(folder / name), times, dim) for name in ("train", "held"))
        self.train, self.held = train, held
        flat = train.reshape(len(train), -1)
        self.near = np.argsort(-(flat @ flat.T), axis=1)[:, 1:9]
        self.shape = (times, dim)

    @staticmethod
    def _read(store, times, dim):
        """Take evenly spaced timesteps, and fold the sketch to the dimension."""
        rows = store.features("loss")[:, 0, :, 0]
        chosen = np.linspace(0, rows.shape[1] - 1, times).round().astype(int)
        rows = rows[:, chosen]
        return unit(rows.reshape(len(rows), times, -1, dim).sum(2))

    def rows(self, n, seed, queries=False):
        generator = np.random.default_rng(seed)
        if queries:
            rows = self.held[np.arange(n) % len(self.held)].copy()
        else:
            one = generator.integers(0, len(self.train), n)
            two = self.near[one, generator.integers(0, 8, n)]
            part = generator.uniform(0, 0.5, (n, 1, 1)).astype(np.float32)
            rows = unit((1 - part) * self.train[one] + part * self.train[two])
        flat = rows.reshape(n, -1)
        jitter(flat, np.float32(0.3 / np.sqrt(self.shape[1])), seed)
        return unit(rows)


def written(path, world, n, dtype="float16", queries=False):
    """Write n rows through the store (or the rest of them); return the seconds it took of that."""
    import time

    times, dim = world.shape
    layout = Layout(("loss",), 1, tuple(range(times)), ("model",), dim, dtype)
    manifest = Manifest(layout, {}, {"name": type(world).__name__}, n, BLOCK)
    seconds = 0.0
    with StoreWriter(path, manifest) as writer:
        for block in writer.pending():
            rows = manifest.block_rows(block)
            seed = block + 10**9 * queries
            features = world.rows(len(rows), seed, queries)[:, None, :, None]
            ones = np.ones((len(rows), 1, times, 1), np.float32)
            ids = [f"{row:07d}" for row in rows]
            start = time.perf_counter()
            writer.append(
                block, Rows(ids, [{}] * len(rows), {"loss": features}, {"loss": ones}, ones[..., 0])
            )
            seconds += time.perf_counter() - start
        start = time.perf_counter()
    return seconds + time.perf_counter() - start
