"""The score of each training example with itself: large if no other gradient is similar."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dmin.attribution.check import check_pair
from dmin.attribution.features import FeatureSet
from dmin.attribution.method import Method
from dmin.attribution.scores import as_feature_set
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly
from dmin.store import Store
from dmin.store.export import save_rows

FEW = 64  # examples by which it is seen whether a method distinguishes them


def self_influence(train: Store | FeatureSet, method: Method, rows: int = 32) -> np.ndarray:
    """Return each training example's score with itself as the query, float32 ``[N]``.

    Large for examples to which no other gradient is similar: rare, or labelled wrongly
    (Pruthi et al. 2020, arXiv 2002.08484). Methods of unit gradients give all examples the same
    score.
    """
    train = as_feature_set(train)
    check_pair(train, train, method)
    method.fit(train)
    return fitted_self_influence(train, method, np.arange(len(train)), rows)


def outlier_scores(train: FeatureSet, method: Method, name: str | None = None) -> np.ndarray:
    """Return the scores of :func:`self_influence`, by a method that distinguishes examples.

    Args:
        train: the examples.
        method: how to score.
        name: of the method in an error; its own name if None.

    Raises:
        DminError: the scores of a sample are all equal, as for unit gradients; checked
            before all are scored.
    """
    check_pair(train, train, method)
    method.fit(train)
    few = fitted_self_influence(train, method, evenly(len(train), FEW, ends=True))
    if np.ptp(few) <= 1e-3 * np.abs(few).max():
        raise DminError(
            f"method={name or method.name} gives every example the same score with itself "
            f"({few.mean():.4g}), since it compares only directions or pictures. Choose one that "
            f"also uses the norms of gradients: method=grad_dot, datainf or training_loss."
        )
    return fitted_self_influence(train, method, np.arange(len(train)))


def fitted_self_influence(
    train: FeatureSet, method: Method, chosen: Sequence[int] | np.ndarray, rows: int = 32
) -> np.ndarray:
    """Return the scores of chosen rows with themselves by a method fitted already, ``[chosen]``."""
    found = []
    for start in range(0, len(chosen), rows):
        block = train.block(chosen[start : start + rows], method.requires)
        found.append(method.score(method.transform_query(block), block).diagonal().float())
    return np.asarray(torch.cat(found).numpy())


def save_self_influence(store: Store, scores: np.ndarray, path: Path) -> np.ndarray:
    """Write each example's score with itself as CSV, the largest first.

    Args:
        store: of the training examples.
        scores: of each with itself, float32 ``[N]``.
        path: of the CSV: rank, id, score, and the metadata of each.

    Returns:
        Rows of the store, the largest score first; equal scores by row.
    """
    order = np.argsort(-scores, kind="stable")
    save_rows(store, order, {"score": [f"{score:.6g}" for score in scores]}, path)
    return order
