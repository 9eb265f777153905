"""Datasets with stable example ids."""

from dmin.data.base import Dataset, Example, Examples, collate, describe_dataset

__all__ = ["Dataset", "Example", "Examples", "collate", "describe_dataset"]
