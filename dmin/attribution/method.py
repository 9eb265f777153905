"""The interface of an attribution method: a score for each pair of query and training example."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct


class Method(ABC):
    """Scores every pair of a query and a training example; a larger score is more influence.

    Scores must not depend on how the training side is cut into blocks.
    """

    name: str
    requires: Requires = Requires()
    by_query: bool = True  # False: it scores an example alike for every query
    timesteps: tuple[float, ...] | None = None  # of the store, that scores are of; None: all

    def check(self) -> None:  # noqa: B027 (most methods need nothing but their features)
        """Refuse invalid settings, before anything is computed."""

    def fit(self, train: FeatureSet) -> None:  # noqa: B027 (most methods learn nothing)
        """Read all training examples once, before any score."""

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Prepare the queries once; what it returns is handed to :meth:`score`.

        Where it returns an :class:`InnerProduct`, the store is scanned at the speed of memory, or
        searched by an index; :meth:`score` must agree with that.
        """
        return queries

    @abstractmethod
    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return the scores ``[queries, n]`` of a block of n training examples."""

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what each group of layers adds at each timestep, or None if undefined.

        A score that is one inner product is the sum of its groups' inner products. If an inner
        product ``u = Σ_g u_g`` is raised to a power, a group gets the share ``u_g / u`` of the
        result: its Aumann–Shapley value, what it adds when all groups are scaled up together from
        zero (Aumann & Shapley, "Values of Non-Atomic Games", 1974); for a square also its Shapley
        value. Shares add up to the score and are negative for a group of opposite sign.

        Returns:
            ``[queries, n, T, G]``; G is 1 if only timesteps can be separated.
        """
        return None

    def limit(self, queries: Any, sign: int = 1) -> Tensor | None:
        """Return the largest score that any example could have, ``[Q]``; None if there is no bound.

        Args:
            queries: as prepared.
            sign: −1 for the smallest instead.
        """
        bound = queries.bound() if isinstance(queries, InnerProduct) else None
        return None if bound is None else sign * bound

    def notes(self) -> dict[str, str]:
        """Return results of fitting that help to read the scores, by topic."""
        return {}


class CosineMethod(Method):
    """A method whose scores are inner products of unit vectors, computed alike for both sides."""

    @abstractmethod
    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return one unit vector an example, ``[Q, m]``."""

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return queries @ self.transform_query(train).T

    def limit(self, queries: Tensor, sign: int = 1) -> Tensor:
        """Return ±1."""
        return torch.full((len(queries),), float(sign))


class InnerProductMethod(Method):
    """A method whose scores are one inner product with rows of the store."""

    @abstractmethod
    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return the vectors that rows are multiplied with."""

    def score(self, queries: InnerProduct, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return queries.scores(train)

    def contributions(self, queries: InnerProduct, train: ExampleBlock) -> Tensor:
        """Return what each group of layers adds at each timestep, ``[Q, n, T, G]``."""
        return queries.contributions(train)
