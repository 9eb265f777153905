"""A store of features (compressed per-example gradients): HDF5 segments under one manifest.

::

    store/
      manifest.json                       what was computed, and of which dataset
      segment-<first block>-<digest>.h5   sealed, immutable, named by its digest
      growth-<number>.json                examples were added: how many, and what the dataset is now
      removed-<digest>.json               rows that are no longer shown
      forgotten-<digest>.json             hashes of ids that were removed before it was made
      metadata.jsonl                      metadata that replace those of the segments
      catalog.kept                        cache written by the first opening, rebuilt if missing
      progress/                           heartbeats of the processes at work on it
      *.tmp                               leftovers of killed writers, never read

The unit of work is a *block*: ``block_size`` consecutive examples of the dataset. A segment holds
whole blocks, so every block in the store is finished, and missing ones can be computed. Stores with
equal manifests are merged by copying their segments into one directory.

This package does not import torch.
"""

from dmin.store.comparison import check_comparable
from dmin.store.manifest import Layout, Manifest
from dmin.store.reader import Block, Store
from dmin.store.writer import Rows, StoreWriter

__all__ = ["Block", "Layout", "Manifest", "Rows", "Store", "StoreWriter", "check_comparable"]
