"""How a store is collected: numbers out of range and unknown names are refused at once."""

import pytest

from dmin.collect import CollectOptions, GradientCollector
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic


@pytest.mark.parametrize(
    "wrong", [{"block_size": 0}, {"workers": -1}, {"seal_seconds": -0.5}, {"wait": float("nan")}]
)
def test_numbers_out_of_range_are_refused_by_name(wrong, ddpm, digits, tmp_path):
    ((name, value),) = wrong.items()
    collector = GradientCollector(ddpm, BlockCyclic(256), Stratified(2))
    with pytest.raises(DminError, match=f"collect.{name}={value}: give . or more"):
        collector.collect(digits, tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_an_unknown_name_is_refused(ddpm, digits, tmp_path):
    collector = GradientCollector(ddpm, BlockCyclic(256), Stratified(2))
    with pytest.raises(TypeError, match="block_sizes"):
        collector.collect(digits, tmp_path / "s", block_sizes=3)


def test_options_are_values():
    assert CollectOptions(block_size=4) == CollectOptions(block_size=4) != CollectOptions()
