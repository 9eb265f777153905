"""The interface of an index: finding the best rows without reading all of them."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.store import Store


class Found(NamedTuple):
    """The k best of each query.

    Args:
        scores: float32 ``[Q, k]``, descending.
        rows: int64 ``[Q, k]``.
        read: rows of the store read exactly, ``[Q]``.
        tied: further rows whose score equals the last, ``[Q]``; None where an index cannot tell.
    """

    scores: Tensor
    rows: Tensor
    read: np.ndarray
    tied: Tensor | None = None


class Index(ABC):
    """A way to the best rows that does not read all of them."""

    @abstractmethod
    def search(
        self,
        linear: InnerProduct,
        store: Store,
        k: int,
        sign: int = 1,
        keep: np.ndarray | None = None,
    ) -> Found:
        """Return the k rows of largest ``sign · score``.

        Args:
            linear: the queries, and how rows are scaled.
            store: the rows.
            k: rows a query, at most as many as there are (and ``keep`` leaves).
            sign: −1 for the smallest scores.
            keep: bool ``[N]``: the rows allowed.
        """

    @abstractmethod
    def note(self) -> str:
        """Return what is to be known of the answers so far."""
