"""The rows that methods multiply and curvature is fitted on: gradients of a block, arranged."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock
from dmin.attribution.method import InnerProduct
from dmin.store import Layout


def unit_rows(block: ExampleBlock, readout: str = "loss") -> Tensor:
    """Return the unit gradient at each draw and timestep, ``[n, D, T, G·k]``."""
    return torch.nn.functional.normalize(block.features[readout].flatten(3), dim=-1)


def summed_rows(block: ExampleBlock, readout: str = "loss") -> Tensor:
    """Return the gradients summed over draws and timesteps, ``[n, G, k]``.

    Rows of a store are of unit length over all groups; their norms undo that.
    """
    length = block.norms[readout].square().sum(-1).sqrt()  # [n, D, T]
    return torch.einsum("ndt,ndtgk->ngk", length, block.features[readout])


def over_rows(queries: Tensor, layout: Layout, readout: str = "loss") -> InnerProduct:
    """Return inner products with :func:`summed_rows` as ones with the rows of the store.

    Args:
        queries: ``[Q, G·k]`` or ``[Q, G, k]``.
        layout: of the stores.
        readout: which rows.
    """
    draws, steps, groups, dim = layout.row_shape
    rows = queries.view(-1, 1, 1, groups, dim).expand(-1, draws, steps, -1, -1)
    return InnerProduct(rows, "norm", readout)
