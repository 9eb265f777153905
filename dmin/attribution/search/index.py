"""The interface of an index: finding the best rows without reading all of them."""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.runtime.errors import DminError
from dmin.store import Store


class Found(NamedTuple):
    """The k best of each query.

    Args:
        scores: float32 ``[Q, k]``, descending.
        rows: int64 ``[Q, k]``.
        read: rows of the store read exactly, ``[Q]``.
        tied: further rows with the same score as the last, ``[Q]``; None if unknown.
    """

    scores: Tensor
    rows: Tensor
    read: np.ndarray
    tied: Tensor | None = None


class Index(ABC):
    """A search for the best rows that does not read all of them."""

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
            k: rows per query, at most the number of rows (that ``keep`` allows).
            sign: −1 for the smallest scores.
            keep: bool ``[N]``: the rows allowed.
        """

    @abstractmethod
    def note(self) -> str:
        """Return a remark about the answers so far."""


def require_count(setting: str, value: object, least: int = 1) -> None:
    """Refuse a setting that is no whole number, or too small.

    Raises:
        DminError: it names the setting.
    """
    if not isinstance(value, Integral) or value < least:
        raise DminError(f"{setting}={value!r}: give a whole number, {least} or more.")
