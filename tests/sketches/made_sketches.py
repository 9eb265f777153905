"""Sketches of every family at a size for tests, and gradients for them."""

import inspect
from math import prod
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches import Sketch

CONF = {path.stem: path for path in Path(__file__).parents[2].glob("conf/sketch/*.yaml")}
K = 32
KINDS = {name: get_class(OmegaConf.load(path)["_target_"]) for name, path in CONF.items()}
SEEDED = sorted(
    name for name, kind in KINDS.items() if "seed" in inspect.signature(kind).parameters
)

every_sketch = pytest.mark.parametrize("name", sorted(CONF))
every_random_sketch = pytest.mark.parametrize("name", SEEDED)


def build(name: str, dim: int = K, seed: int = 0, **settings) -> Sketch:
    """The sketch of a YAML, at a size for tests; what a family does not take is left out."""
    found = OmegaConf.to_container(OmegaConf.load(CONF[name]))
    kind = get_class(found.pop("_target_"))
    small = {"dim": dim, "seed": seed, "block": 8, "keep": 600, "from_size": 1, "from_kernel": 1}
    if name == "auto":  # some matrices by one map, some by the other
        small |= {"from_size": 650}
    small |= settings
    return kind(**(found | {key: value for key, value in small.items() if key in found}))


def parameters_of(**shapes) -> Parameters:
    return Parameters(tuple(Parameter(name, shape) for name, shape in shapes.items()))


# A fold at fixed strides collides along whole columns where the width is k or divides it.
SHAPES = {
    "conv": (10, 3, 3, 3),
    "depthwise": (12, 1, 3, 3),
    "half": (40, K // 2),
    "same": (20, K),
    "double": (10, 2 * K),
    "row": (1, 3 * K),
    "bias": (33,),
    "scalar": (),
}
ALL = parameters_of(**SHAPES)


def gradients(batch: int, parameters: Parameters = ALL, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, *shape, generator=generator, dtype=dtype)
        for name, shape, _ in parameters.entries
    }


def flat(gradients, parameters: Parameters = ALL):
    parts = [gradients[name].reshape(len(gradients[name]), -1) for name in parameters.by_name]
    return torch.cat(parts, 1)


def matrix(sketch: Sketch):
    """The map as a dense matrix ``[P, groups, k]``: what it makes of the identity."""
    rows = []
    for name, shape, _ in sketch.parameters.entries:
        identity = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape)
        rows.append(sketch.of({name: identity}))
    return torch.cat(rows)


def residues(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows folded to a smaller k: ``y[c] = Σ_{j mod k' = c} x[j]``."""
    return rows.unflatten(-1, (-1, dim)).sum(-2)
