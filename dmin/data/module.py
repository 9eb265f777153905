"""Lightning data modules: shuffled batches for training, fixed blocks for collecting."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from dmin.data.base import Dataset, Example, by_shape, collate
from dmin.runtime.errors import DminError


class Blocks(Sampler[list[int]]):
    """Blocks of consecutive examples: the unit of collecting, resuming and sharing out.

    Rank r of w processes takes every w-th of the pending blocks, so the work of a rank is whole
    blocks and the numbers inside a block do not depend on who computes it.

    Args:
        blocks: numbers of the blocks still to do.
        block_size: examples per block (the last of the dataset may be shorter).
        examples: number of examples in the dataset.
        rank: this process.
        world: number of processes.
        even: give every process as many, by blocks that are not its own behind its own ones.

    Attributes:
        blocks: the blocks of this process.
        own: how many of them, from the first, are its own to do.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        block_size: int,
        examples: int,
        rank: int = 0,
        world: int = 1,
        even: bool = False,
    ) -> None:
        self.blocks = list(blocks)[rank::world]
        self.own: int = len(self.blocks)
        if even:
            lacking = -(-len(blocks) // world) - self.own
            self.blocks += (self.blocks or list(blocks))[-1:] * lacking
        self.block_size = block_size
        self.examples = examples

    def __len__(self) -> int:
        """Return the number of blocks this process takes."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each block's examples."""
        for block in self.blocks:
            start = block * self.block_size
            yield list(range(start, min(start + self.block_size, self.examples)))


class CollectData(lightning.LightningDataModule):
    """The pending blocks of a dataset, shared out over the processes of a trainer.

    Args:
        dataset: the examples.
        blocks: numbers of the blocks to do.
        block_size: examples per block.
        workers: processes that load examples; 0 loads in the main one.
        even: give every process as many blocks, see :class:`Blocks`.
    """

    def __init__(
        self,
        dataset: Dataset,
        blocks: Sequence[int],
        block_size: int,
        workers: int = 0,
        even: bool = False,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.blocks = blocks
        self.block_size = block_size
        self.workers = workers
        self.even = even

    def mine(self, rank: int, world: int) -> Blocks:
        """Return the blocks of one process."""
        return Blocks(self.blocks, self.block_size, len(self.dataset), rank, world, self.even)

    def examples(self, rank: int, world: int) -> int:
        """Return how many examples one process has to do."""
        mine = self.mine(rank, world)
        starts = [block * self.block_size for block in mine.blocks[: mine.own]]
        return sum(min(self.block_size, len(self.dataset) - start) for start in starts)

    def predict_dataloader(self) -> DataLoader[Example]:
        """Return a loader of this process's blocks, each a list of batches of one shape."""
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        return DataLoader(
            cast(Any, _Numbered(self.dataset)),
            batch_sampler=self.mine(rank, world),
            collate_fn=_collate_numbered,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),  # a copy to a GPU then waits for nothing
        )


class TrainData(lightning.LightningDataModule):
    """Batches drawn at random from a dataset, for a fixed number of steps.

    Args:
        dataset: the examples.
        batch_size: examples per step.
        steps: how many batches to draw; each epoch is a fresh permutation.
        seed: key of the permutations.
        workers: processes that load examples.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, steps: int, seed: int = 0, workers: int = 0
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.workers = workers

    def train_dataloader(self) -> DataLoader[Example]:
        """Return a loader of exactly ``steps`` batches, or of this process's share of each.

        Raises:
            DminError: a batch has fewer examples than there are processes.
        """
        size = min(self.batch_size, len(self.dataset))
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        if size < world:
            raise DminError(
                f"train.batch_size={self.batch_size}: a batch of {size} cannot be divided among "
                f"{world} processes. Raise it, or lower trainer.devices."
            )
        batches = _random_batches(len(self.dataset), size, self.steps, self.seed)
        batches = [batch[rank::world] for batch in batches]
        return DataLoader(
            cast(Any, self.dataset),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
        )


def _random_batches(examples: int, size: int, steps: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(examples, generator=generator).tolist()
        batches += [order[i : i + size] for i in range(0, examples - size + 1, size)]
    return batches[:steps]


class _Numbered(torch.utils.data.Dataset[tuple[int, Example]]):
    """Examples with their positions, so that a batch knows which block it is."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.dataset[index]


def _collate_numbered(items: Sequence[tuple[int, Example]]) -> list[dict[str, Any]]:
    examples = [example for _, example in items]
    return [
        {**collate([examples[i] for i in group]), "position": [items[i][0] for i in group]}
        for group in by_shape(examples)
    ]
