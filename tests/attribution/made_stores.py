"""Stores written with given rows, and scores of them in float64."""

import numpy as np
import yaml
from hydra.utils import instantiate

from dmin.cli.config.groups import config_directory
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

TIMES = (900.0, 500.0, 100.0)


def made(
    path,
    features,
    dtype="float32",
    block_size=7,
    segment_bytes=4000,
    metadata=None,
    readout="loss",
    norms=None,
    losses=None,
    times=TIMES,
    **kept,
):
    """Write features [n, D, T, G, k] through the store."""
    n, draws, _, groups, dim = features.shape
    names = tuple(f"g{number}" for number in range(groups))
    layout = Layout((readout,), draws, times[: features.shape[2]], names, dim, dtype)
    manifest = Manifest(layout, {"weights": "ab"}, {"name": path.name}, n, block_size)
    generator = np.random.default_rng(n)
    with StoreWriter(path, manifest, segment_bytes=segment_bytes, **kept) as writer:
        for block in writer.pending():
            rows = manifest.block_rows(block)
            chosen = slice(rows.start, rows.stop)
            shape = (len(rows), *layout.row_shape[:3])
            writer.append(
                block,
                Rows(
                    ids=[f"{path.name}-{row}" for row in rows],
                    metadata=[metadata[row] if metadata else {} for row in rows],
                    features={readout: features[chosen]},
                    norms={
                        readout: generator.uniform(0.5, 2, shape).astype(np.float32)
                        if norms is None
                        else norms[chosen]
                    },
                    losses=np.zeros(shape[:3], np.float32) if losses is None else losses[chosen],
                ),
            )
    return Store(path)


def preset(name, **settings):
    """Make a method as its YAML has it, with some settings changed."""
    text = (config_directory() / f"method/{name}.yaml").read_text()
    return instantiate({**yaml.safe_load(text), **settings})


def drawn(n, draws=1, times=3, groups=1, dim=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, draws, times, groups, dim)).astype(np.float32)


def cosines(queries, train, weights=1.0):
    """DMin's score in float64, [Q, n, T]."""

    def unit(store):
        rows = store.features("loss").astype(np.float64)
        rows = rows.reshape(*rows.shape[:3], -1)
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    q, x = unit(queries), unit(train)
    return np.einsum("qdtk,ndtk->qnt", q, x) / q.shape[1] * weights


def real_scores(queries, train, scale, sign=1):
    """Inner products of prepared queries with scaled stored rows in long double, [Q, n]."""
    x = train.features("loss").astype(np.longdouble)
    if (scales := train.scales("loss")) is not None:
        stored = train.gather("loss", np.arange(len(train)))
        cut = stored.reshape(*scales.reshape(*x.shape[:3], -1).shape, -1)
        x = (scales.reshape(*cut.shape[:4], 1).astype(np.longdouble) * cut).reshape(x.shape)
    x = x.reshape(*x.shape[:3], -1)
    if scale == "unit":
        x = x / np.maximum(np.sqrt(np.square(x).sum(-1, keepdims=True)), np.longdouble(1e-12))
    elif scale == "norm":
        norms = np.square(train.norms("loss").astype(np.longdouble)).sum(-1)
        x = x * np.sqrt(norms)[..., None]
    q = queries.reshape(len(queries), -1).astype(np.longdouble)
    return sign * (q @ x.reshape(len(x), -1).T)
