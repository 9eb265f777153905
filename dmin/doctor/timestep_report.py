"""How well each timestep distinguishes examples, and which timesteps are blind.

At nearly pure noise, all images have nearly the same gradient: such a timestep adds the same
to all scores, and after normalisation it has the same weight as informative ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from dmin.runtime.sampling import evenly
from dmin.store import Store

# Blind: all cosines are nearly one, or nearly equal.
BLIND_COSINE, BLIND_SPREAD = 0.98, 0.01


class Timestep(NamedTuple):
    """How well one timestep distinguishes a sample of examples.

    Attributes:
        timestep: in the model's own unit.
        cosine: mean cosine of the gradients of two examples, over all pairs.
        spread: standard deviation of these cosines.
        share: of the variance of scores: ``Cov(c_t, s) / Var(s)`` over pairs, with c_t the cosine
            at this timestep and ``s = Σ_t c_t`` the score of DMin; the shares add up to one.
    """

    timestep: float
    cosine: float
    spread: float
    share: float

    @property
    def blind(self) -> bool:
        """Whether it hardly distinguishes examples."""
        return self.cosine > BLIND_COSINE or self.spread < BLIND_SPREAD


def timestep_report(rows: np.ndarray, timesteps: Sequence[float]) -> list[Timestep]:
    """Measure each timestep on the rows of some examples.

    Args:
        rows: ``[n, draw, T, group, dim]`` as in a store, n ≥ 3; normalised again here. Sketching
            adds noise of about ``(1 − ρ²) / √dim`` to each cosine ρ, and as much to the spread.
        timesteps: their values, ``[T]``.

    Returns:
        One entry per timestep, in order.
    """
    n, draws, steps = rows.shape[:3]
    flat = rows.reshape(n, draws, steps, -1).astype(np.float32)
    norms = np.linalg.norm(flat, axis=-1, keepdims=True)
    unit = flat / np.where(norms > 0, norms, 1)
    grams = np.einsum("adtk,bdtk->tab", unit, unit, optimize=True) / draws
    pairs = grams[:, *np.triu_indices(n, 1)].astype(np.float64)  # [T, pairs]
    scores = pairs.sum(0)
    variance = scores.var()
    shares = ((pairs - pairs.mean(1, keepdims=True)) * (scores - scores.mean())).mean(1)
    shares = shares / variance if variance > 0 else np.zeros(steps)
    return [
        Timestep(float(t), float(c.mean()), float(c.std()), float(share))
        for t, c, share in zip(timesteps, pairs, shares, strict=True)
    ]


def report_of(store: Store, readout: str = "loss", sample: int = 256) -> list[Timestep]:
    """Measure each timestep of a store on evenly spaced rows.

    Args:
        store: with three rows or more.
        readout: which of the store's readouts.
        sample: most rows used.
    """
    rows = store.rows(readout, evenly(len(store), sample, ends=True))
    return timestep_report(rows, store.layout.timesteps)


def report_table(report: Sequence[Timestep]) -> Table:
    """Return a report as a table for the terminal."""
    table = Table(title="How much each timestep distinguishes examples", title_justify="left")
    for heading in ("timestep", "mean cosine", "spread", "share of score variance", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for entry in report:
        table.add_row(
            f"{entry.timestep:g}",
            f"{entry.cosine:.3f}",
            f"{entry.spread:.3f}",
            f"{entry.share:.1%}",
            Text("blind" if entry.blind else "", "yellow"),
        )
    return table
