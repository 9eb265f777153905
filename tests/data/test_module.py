"""Blocks to collect and batches to train on: each example where it should be, once."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from dmin.data import Example, Examples, collate
from dmin.data.module import Blocks, CollectData, TrainData
from dmin.runtime.errors import DminError

DATA = Examples([Example(f"e{n}", torch.full((1, 2, 2), n / 40)) for n in range(26)])


def process(module, rank, world):
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return module


@pytest.mark.parametrize("block_size", [1, 8, 13, 26, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_out_the_blocks(block_size, world):
    blocks = range(-(-26 // block_size))
    shares = [Blocks(blocks, block_size, 26, rank, world) for rank in range(world)]
    taken = [positions for share in shares for positions in share]
    assert sorted(itertools.chain(*taken)) == list(range(26))
    assert sum(map(len, shares)) == len(taken) == len(blocks)
    for positions in taken:
        block = positions[0] // block_size
        end = min(26, (block + 1) * block_size)
        assert positions == list(range(block * block_size, end))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_only_pending_blocks_are_taken():
    assert list(Blocks([1, 3], 8, 26)) == [list(range(8, 16)), [24, 25]]


@pytest.mark.parametrize("workers", [0, 2])
def test_collecting_gives_positions_and_ids_that_belong_together(workers):
    loaders = [
        process(CollectData(DATA, [0, 2, 3], 8, workers), rank, 2).predict_dataloader()
        for rank in range(2)
    ]
    batches = [batch for loader in loaders for (batch,) in loader]
    assert [batch["position"][0] for batch in batches] == [0, 24, 16]
    for batch in batches:
        assert batch["id"] == [f"e{n}" for n in batch["position"]]
        assert torch.equal(batch["image"][:, 0, 0, 0], torch.tensor(batch["position"]) / 40)


def test_a_block_has_a_batch_for_each_shape():
    wide, tall = torch.zeros(1, 2, 4), torch.zeros(1, 4, 2)
    images = [wide, tall, tall, wide, tall, tall]
    data = Examples([Example(f"e{n}", image) for n, image in enumerate(images)])
    first, second = CollectData(data, [0, 1], 4).predict_dataloader()
    assert [batch["id"] for batch in first] == [["e0", "e3"], ["e1", "e2"]]
    assert [batch["position"] for batch in first] == [[0, 3], [1, 2]]
    assert [batch["image"].shape for batch in first] == [(2, 1, 2, 4), (2, 1, 4, 2)]
    assert [batch["position"] for batch in second] == [[4, 5]]


def drawn(steps, **settings):
    loader = TrainData(DATA, 8, steps, **settings).train_dataloader()
    return [batch["id"] for batch in loader]


def test_an_epoch_shows_no_example_twice_and_drops_fewer_than_a_batch():
    batches = drawn(9)
    assert len(batches) == 9 and all(len(batch) == 8 for batch in batches)
    epochs = [set(itertools.chain(*batches[start : start + 3])) for start in (0, 3, 6)]
    assert all(len(epoch) == 24 for epoch in epochs)
    assert batches[:3] != batches[3:6]


def test_an_epoch_of_whole_batches_shows_every_example_once():
    loader = TrainData(DATA, 13, 2).train_dataloader()
    assert sorted(itertools.chain(*(batch["id"] for batch in loader))) == sorted(
        e.id for e in DATA.examples
    )


def test_the_draw_is_keyed_by_its_seed_alone():
    assert drawn(5) == drawn(5, workers=2) == drawn(8)[:5]
    assert drawn(5) != drawn(5, seed=1)


def test_a_batch_larger_than_the_dataset_is_the_dataset():
    batches = list(TrainData(DATA, 100, 3).train_dataloader())
    assert [len(batch["id"]) for batch in batches] == [26] * 3


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_out_every_batch(world):
    whole = drawn(4)
    shares = [
        [b["id"] for b in process(TrainData(DATA, 8, 4), rank, world).train_dataloader()]
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        assert sorted(itertools.chain(*(share[step] for share in shares))) == sorted(batch)


def test_a_batch_that_some_process_would_get_nothing_of_is_refused():
    with pytest.raises(DminError, match=r"batch of 8 .* 9 processes"):
        process(TrainData(DATA, 8, 4), 0, 9).train_dataloader()


def test_collate_keeps_everything_in_order():
    examples = [Example("a", torch.zeros(1, 2, 2), 3, "text", {"x": 1}), DATA[1]]
    batch = collate(examples)
    assert batch["id"] == ["a", "e1"] and batch["label"] == [3, None]
    assert batch["caption"] == ["text", None]
    assert batch["metadata"] == [{"label": 3, "caption": "text", "x": 1}, {}]
    assert torch.equal(batch["image"], torch.stack([e.image for e in examples]))
