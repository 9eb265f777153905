"""Loops that form per-example gradients in registers and fold them while they are in the cache.

A weight gradient is a sum of outer products ``Σ_p d_p ⊗ a_p``. Both sides are packed into
panels that are read sequentially: :data:`ROWS` output gradients, :data:`COLUMNS` inputs. Their
product stays in registers (:func:`~vectors.tile`) and is folded before it leaves the cache, so that
no gradient is ever written to memory.

Everything is single precision; :class:`~dmin.sketches.base.FormedSketch` does the same in torch.
The package is imported when first needed; it is compiled once and cached on disk. Numba invalidates
its cache only by a function's own file: after changing a function that others call, remove
``__pycache__/*.nbi`` here.
"""

from dmin.sketches.backends.cpu_kernels.counting import add_products, count_sketch
from dmin.sketches.backends.cpu_kernels.folding import (
    Fold,
    add_parts,
    fold_formed,
    fold_vectors,
    hashed_map,
    scatter,
)
from dmin.sketches.backends.cpu_kernels.forming import (
    Walk,
    fold_planes,
    fold_tokens,
    form_and_fold,
    form_transformed_and_fold,
)
from dmin.sketches.backends.cpu_kernels.packing import pack, pack_rows
from dmin.sketches.backends.cpu_kernels.toom_cook import (
    PRODUCTS,
    TILE,
    TRANSFORM_COST,
    toom_cook,
    transform,
)
from dmin.sketches.backends.cpu_kernels.vectors import COLUMNS, ROWS, WIDTH

__all__ = [
    "COLUMNS",
    "PRODUCTS",
    "ROWS",
    "TILE",
    "TRANSFORM_COST",
    "WIDTH",
    "Fold",
    "Walk",
    "add_parts",
    "add_products",
    "count_sketch",
    "fold_formed",
    "fold_planes",
    "fold_tokens",
    "fold_vectors",
    "form_and_fold",
    "form_transformed_and_fold",
    "hashed_map",
    "pack",
    "pack_rows",
    "scatter",
    "toom_cook",
    "transform",
]
