"""A store of features (compressed per-example gradients): HDF5 segments under one manifest.

::

    store/
      manifest.json                       what was computed, and of which dataset
      segment-<first block>-<digest>.h5   sealed, immutable, named after its own bytes
      growth-<number>.json                examples were added: how many, and what the dataset is now
      removed-<digest>.json               rows that are shown no more
      forgotten-<digest>.json             hashes of ids that what it was made of shows no more
      metadata.jsonl                      metadata that are later than those of the segments
      catalog.kept                        kept of the first opening, made again where it is missing
      progress/                           who works on it: small files without any part in it
      *.tmp                               leftovers of killed writers, never read

The unit of work is a *block*: ``block_size`` consecutive examples of the dataset. A segment holds
whole blocks, so what is there is finished, and what is missing can be computed again. Stores with
equal manifests are merged by copying their segments into one directory.

Nothing here imports torch.
"""

from dmin.store.comparison import check_comparable
from dmin.store.manifest import Layout, Manifest
from dmin.store.reader import Block, Store
from dmin.store.writer import Rows, StoreWriter

__all__ = ["Block", "Layout", "Manifest", "Rows", "Store", "StoreWriter", "check_comparable"]
