"""What families make of their examples comes from no data: it is found out once."""

import pytest
import torch
from models.families import EVERY, load
from models.test_families import examples

from dmin.collect.collector import Collector
from dmin.data import collate
from dmin.diffusion import Stratified
from dmin.sketches import BlockCyclic

# The lengths of captions decide where rows stand: each pass is examined.
ROUTED = {"z_image", "lumina_2"}


@pytest.mark.parametrize("name", EVERY)
def test_a_family_is_examined_once(name):
    model = load(name)
    with torch.no_grad():
        batch = collate(examples(EVERY[name], 2).examples)
        x0, condition = model.encode(batch)
    collector = Collector(model, BlockCyclic(64, block=16), Stratified(2))
    inputs = collector.inputs(x0, condition, batch["id"])
    for pairs in collector.networks.together(inputs):
        passes = inputs.at(pairs)
        collector.run(passes)
        assert collector.ownership.routed == (name in ROUTED)
        if name in ROUTED:
            return
        before = collector.ownership.seconds
        collector.run(passes)
        assert collector.ownership.seconds == before
