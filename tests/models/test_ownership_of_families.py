"""What families make of their examples comes from no data: it is found out once."""

import pytest
import torch
from models.families import FAMILIES, load

from dmin.collect.collector import Collector
from dmin.data import Example, collate
from dmin.diffusion import Stratified
from dmin.sketches import BlockCyclic


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_examined_once(name):
    model = load(name)
    size = FAMILIES[name].size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch = collate([Example(f"x{i}", x, i, f"a cat {i}") for i, x in enumerate(images)])
    with torch.no_grad():
        x0, condition = model.encode(batch)
    collector = Collector(model, BlockCyclic(64, block=16), Stratified(2))
    passes = collector.inputs(x0, condition, batch["id"]).all()
    collector.run(passes)
    assert not collector.ownership.routed
    before = collector.ownership.seconds
    collector.run(passes)
    assert collector.ownership.seconds == before
