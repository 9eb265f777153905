"""The loss of ranking quality by 8-bit storage, measured on the rows that are written."""

import warnings
from collections.abc import Mapping

import numpy as np

from dmin.runtime.errors import DminWarning
from dmin.store.encoding import decode

MEASURED = 256  # rows compared per writer
STATED = 0.95  # fraction of the ten nearest neighbours that must remain


class RankingLoss:
    """Compares rows with their stored values, block by block; warns if neighbours change too much.

    Args:
        dtype: how rows are stored.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.rows: int = 0
        self._kept = 0.0

    def add(
        self, readout: str, given: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]
    ) -> None:
        """Compare the rows of a block, by readout, with the arrays that are stored."""
        features = np.asarray(given[readout][: MEASURED - self.rows], np.float32)
        if f"scales/{readout}" not in stored or len(features) < 4:
            return
        values, scales = (stored[f"{kind}/{readout}"] for kind in ("features", "scales"))
        read = decode(values[: len(features)], self.dtype, scales[: len(features)])
        self._kept += len(features) * neighbours_kept(features, read)
        self.rows += len(features)

    def warn(self) -> None:
        """Warn, once, if fewer neighbours remain than ``STATED``."""
        kept, self._kept = self._kept / max(1, self.rows), float(self.rows)
        if kept < STATED and self.rows:
            other = "int8_parts or float16" if self.dtype == "int8" else "float16"
            warnings.warn(
                f"{self.dtype} changes rankings: of the ten rows nearest to each of {self.rows}"
                f" that were compared, {100 * kept:.0f} % remain, less than "
                f"{100 * STATED:.0f} %, because a few values are far larger than the others. "
                f"Use {other} (collect.dtype).",
                DminWarning,
                stacklevel=3,
            )


def neighbours_kept(features: np.ndarray, stored: np.ndarray, k: int = 10) -> float:
    """Return the mean fraction of each row's k nearest rows that remain so after storing.

    Args:
        features: ``[n, draw, T, group, dim]``, n at least 2; compared by summed cosines.
        stored: the same, as read back.
        k: number of neighbours; at most n/2 are used.
    """
    k, near = min(k, len(features) // 2), []
    for rows in (features, stored):
        flat = rows.reshape(*rows.shape[:3], -1)
        length = np.linalg.norm(flat, axis=-1, keepdims=True)
        unit = (flat / np.where(length > 0, length, 1)).reshape(len(rows), -1)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        near.append(np.argsort(-cosines, axis=1, kind="stable")[:, :k])
    pairs = zip(near[0].tolist(), near[1].tolist(), strict=True)
    return float(np.mean([len({*one} & {*other}) / k for one, other in pairs]))
