"""How well a model has learned each image: losses, their errors, and the gap to held-out images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmin.runtime.errors import DminError
from dmin.store import Store
from dmin.store.export import save_rows

FEW = 30  # images held out, from which on a gap has an interval
BUCKET = 8  # images of a bucket, from which on it has an expected loss of its own
SAME = 1e-5  # within it losses of one image agree, whatever batch it is computed in
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class LossTable:
    """The losses of n images.

    Args:
        loss: mean over timesteps and draws, ``[n]``.
        relative: mean ratio of the loss to that of images of the same bucket at the same timestep
            and
            draw, ``[n]``; 1 is typical.
        error: standard error of ``relative`` over draws of the noise, ``[n]``.
        draws: of the noise; with one draw, ``error`` is a bound (see :func:`loss_table`).
    """

    loss: np.ndarray
    relative: np.ndarray
    error: np.ndarray
    draws: int


@dataclass(frozen=True)
class Gap:
    """By how much the loss of held-out images exceeds that of the training images.

    Args:
        mean: of the relative losses of held-out images, minus that of the training images; .1 is 10
            %.
        low: of its 95 % interval; None for fewer than `FEW` held-out images.
        high: of the same.
        held: number of held-out images.
    """

    mean: float
    low: float | None
    high: float | None
    held: int

    def spell(self) -> str:
        """Return a description."""
        told = f"the loss of {self.held:,} held-out images is {self.mean:+.1%} against the training"
        if self.low is None or self.high is None:
            return f"{told} images'; an interval is given from {FEW} images on"
        sure = "over-fitted" if self.low > 0 else "no over-fitting is seen"
        return f"{told} images' (95 %: {self.low:+.1%} to {self.high:+.1%}): {sure}"


def loss_table(
    losses: np.ndarray,
    buckets: Sequence[str] | None = None,
    usual: np.ndarray | None = None,
    paired: bool = False,
) -> LossTable:
    """Return each image's mean loss, relative to that of similar images, and its standard error.

    ``r_i = mean_{t,d} L_i(t, ε_d) / m(t, ε_d)``, with m the mean over images: all see
    the same noise, so that the common effect of a draw cancels. ``SE² = Σ_t s²_t / (D
    T²)``, s²_t the variance of the ratios over D draws at timestep t. With one
    draw it is the variance of the ratios over timesteps divided by T, which also
    includes their change over timesteps and so is an upper bound.

    Args:
        losses: ``[n, D, T]``.
        buckets: of each image, such as its shape; None for one.
        usual: m, ``[n, D, T]``; by default that of the images' own buckets (`usual_losses`).
        paired: draws are antithetic, so that each pair counts as one.
    """
    usual = usual_losses(losses, buckets, losses, buckets) if usual is None else usual
    quotients = losses.astype(np.float64) / np.maximum(usual, TINY)
    if paired:
        quotients = quotients.reshape(len(losses), -1, 2, losses.shape[2]).mean(2)
    draws, steps = quotients.shape[1:]
    if draws > 1:
        variance = quotients.var(1, ddof=1).sum(1) / (draws * steps**2)
    else:
        spread = quotients[:, 0].var(1, ddof=1) if steps > 1 else np.full(len(losses), np.nan)
        variance = spread / steps
    relative = quotients.mean((1, 2))
    return LossTable(losses.mean((1, 2)), relative, np.sqrt(variance), draws)


def usual_losses(
    losses: np.ndarray,
    buckets: Sequence[str] | None,
    of: np.ndarray,
    of_buckets: Sequence[str] | None,
) -> np.ndarray:
    """Return the mean loss of images of the same bucket at each point, ``[n, D, T]``.

    Args:
        losses: ``[n, D, T]``, of the images in question.
        buckets: theirs; None for one.
        of: ``[N, D, T]``, of the reference images.
        of_buckets: theirs. For buckets of fewer than `BUCKET` images the mean over all images is
            used.
    """
    found = np.broadcast_to(of.mean(0, dtype=np.float64), losses.shape).copy()
    mine, theirs = np.asarray(buckets or []), np.asarray(of_buckets or [])
    for name, count in Counter(theirs.tolist()).items():
        if count >= BUCKET:
            found[np.flatnonzero(mine == name)] = of[theirs == name].mean(0, dtype=np.float64)
    return found


def require_held_out(
    held_ids: Sequence[str], held: np.ndarray, ids: Sequence[str], losses: np.ndarray
) -> None:
    """Refuse held-out images with the same loss as a training image at every point.

    Args:
        held_ids: of held-out images.
        held: their losses, ``[H, D, T]``.
        ids: of the training images.
        losses: theirs at the same noise, ``[N, D, T]``.

    Raises:
        DminError: there is one; it and its training image are named.
    """
    theirs = losses.reshape(len(losses), -1)
    found = []
    for id, mine in zip(held_ids, held.reshape(len(held), -1), strict=True):
        same = np.isclose(theirs, mine, rtol=SAME, atol=0).all(1)
        found += [f"{id} is {ids[int(same.argmax())]}"] if same.any() else []
    if found:
        told = f"{', '.join(found[:3])}{', …' if found[3:] else ''}"
        raise DminError(
            f"{len(found):,} of {len(held):,} held-out images are training images "
            f"({told}: the same loss at every timestep). Leave them out; the losses of the others "
            f"are kept."
        )


def over_fitting(train: LossTable, held: LossTable) -> Gap:
    """Return the gap between held-out images and training images, at the same noise.

    ``mean(r_held) − mean(r_train)``, both relative to the training images; the interval is that of
    Welch's t over images, of which both are samples.

    Raises:
        DminError: the two were not measured at the same points.
    """
    from scipy.stats import t as student

    if train.draws != held.draws:
        raise DminError(
            "losses of training and held-out images have different noise.draws: use the same."
        )
    mean = float(held.relative.mean() - train.relative.mean())
    if len(held.relative) < FEW or len(train.relative) < FEW:
        return Gap(mean, None, None, len(held.relative))
    parts = [each.var(ddof=1) / len(each) for each in (held.relative, train.relative)]
    error = float(np.sqrt(sum(parts)))
    weights = parts[0] ** 2 / (len(held.relative) - 1) + parts[1] ** 2 / (len(train.relative) - 1)
    freedom = error**4 / max(float(weights), 1e-300)
    reach = error * float(student.ppf(0.975, freedom))
    return Gap(mean, mean - reach, mean + reach, len(held.relative))


def save_losses(
    store: Store, table: LossTable, path: Path, buckets: Sequence[str] | None = None
) -> np.ndarray:
    """Write the losses as CSV, the largest relative loss first.

    Args:
        store: of the images.
        table: of their losses.
        path: of the CSV: rank, id, loss, relative, standard_error, bucket, and the metadata.
        buckets: of each image; None for one.

    Returns:
        Rows of the store in that order.
    """
    order = np.argsort(-table.relative, kind="stable")
    columns: dict[str, Sequence[str]] = {
        "loss": [f"{each:.6g}" for each in table.loss],
        "relative": [f"{each:.6g}" for each in table.relative],
        "standard_error": [f"{each:.3g}" for each in table.error],
    }
    save_rows(store, order, columns | ({} if buckets is None else {"bucket": buckets}), path)
    return order
