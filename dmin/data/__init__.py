"""Datasets with stable example ids."""

from dmin.data.base import Dataset, Example, Examples, collate, describe_dataset
from dmin.data.subset import Subset

__all__ = ["Dataset", "Example", "Examples", "Subset", "collate", "describe_dataset"]
