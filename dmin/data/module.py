"""Lightning data modules: shuffled batches for training, fixed blocks for collecting."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from dmin.data.base import Dataset, Example, by_shape, collate
from dmin.data.ids import one_of_each_shape
from dmin.runtime.errors import DminError


class Blocks(Sampler[list[int]]):
    """Blocks of consecutive examples: the unit of collecting, resuming and distribution.

    Rank r of w processes takes every w-th of the pending blocks. A rank thus computes whole
    blocks, and the results of a block do not depend on which rank computes it.

    Args:
        blocks: numbers of the pending blocks.
        block_size: examples per block (the last of the dataset may be shorter).
        examples: number of examples in the dataset.
        rank: rank of this process.
        world: number of processes.
        even: give all processes equally many blocks, by repeating a block after the own ones.

    Attributes:
        blocks: the blocks of this process.
        own: number of leading blocks that this process has to seal; the others are repetitions.
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
        """Return the number of blocks of this process."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each block's examples."""
        for block in self.blocks:
            start = block * self.block_size
            yield list(range(start, min(start + self.block_size, self.examples)))


class CollectData(lightning.LightningDataModule):
    """The pending blocks of a dataset, distributed over the processes of a trainer.

    Args:
        dataset: the examples.
        blocks: numbers of the pending blocks.
        block_size: examples per block.
        workers: number of processes that load examples; 0 loads in the main process.
        even: give all processes equally many blocks, see :class:`Blocks`.
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
        """Return the number of examples that one process has to compute."""
        mine = self.mine(rank, world)
        starts = [block * self.block_size for block in mine.blocks[: mine.own]]
        return sum(min(self.block_size, len(self.dataset) - start) for start in starts)

    def one_of_each_shape(self) -> list[list[dict[str, Any]]]:
        """Return a block of one example for each shape, if the dataset knows of several."""
        places = one_of_each_shape(self.dataset)
        return [_collate_numbered([(place, self.dataset[place])]) for place in places]

    def predict_dataloader(self) -> DataLoader[Example]:
        """Return a loader of this process's blocks, each a list of batches of one shape."""
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        return DataLoader(
            cast(Any, _Numbered(self.dataset)),
            batch_sampler=self.mine(rank, world),
            collate_fn=_collate_numbered,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),  # for asynchronous copies to a GPU
        )


class TrainData(lightning.LightningDataModule):
    """Batches drawn at random from a dataset, for a fixed number of steps.

    Args:
        dataset: the examples.
        batch_size: examples per step.
        steps: number of batches to draw; each epoch is a new permutation.
        seed: key of the permutations.
        workers: number of processes that load examples.
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
        """Return a loader of exactly ``steps`` batches, or of this process's part of each.

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
    """Examples with their positions, from which a batch's block follows."""

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
