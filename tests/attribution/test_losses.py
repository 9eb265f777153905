"""Losses beside what is usual, their errors against many draws, and a gap that covers."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from dmin.attribution.losses import (
    loss_table,
    over_fitting,
    require_held_out,
    save_losses,
    usual_losses,
)
from dmin.runtime.errors import DminError


def drawn(images, draws=4, steps=5, seed=0, factor=1.0):
    """Losses: what a timestep has, what an image adds, what all share of a draw, and noise."""
    rng = np.random.default_rng(seed)
    level = np.geomspace(10, 0.01, steps)
    own = factor * np.exp(0.2 * rng.normal(size=(images, 1, 1)))
    shared = np.exp(0.5 * rng.normal(size=(1, draws, steps)))
    noise = np.exp(0.1 * rng.normal(size=(images, draws, steps)))
    return (level * own * shared * noise).astype(np.float32)


def test_the_planted_image_has_the_largest_loss_whatever_its_scale(tmp_path):
    losses = drawn(40)
    losses[17] *= 3
    table = loss_table(losses)
    assert table.relative.argmax() == 17 and table.relative[17] > 2
    assert table.relative == pytest.approx((losses / losses.mean(0)).mean((1, 2)), rel=1e-5)
    store = SimpleNamespace(ids=[f"i{n}" for n in range(40)], metadata=[{"loss": 1}] * 40)
    order = save_losses(store, table, tmp_path / "losses.csv")
    first = next(csv.DictReader((tmp_path / "losses.csv").open()))
    assert order[0] == 17 and first["id"] == "i17" and first["metadata_loss"] == "1"


def test_the_error_is_what_other_noise_changes():
    many = drawn(60, draws=400)
    quotients = (many / many.mean(0)).mean(2)  # of each draw
    true = quotients.std(1, ddof=1)
    for draws, low, high in ((4, 0.9, 1.1), (2, 0.85, 1.15), (1, 0.8, 1.2)):
        parts = [many[:, at : at + draws] for at in range(0, 400, draws)]
        found = np.stack([loss_table(part).error ** 2 for part in parts]).mean(0) ** 0.5
        ratio = found * np.sqrt(draws) / true
        assert low < np.median(ratio) < high
    mirrored = np.stack([many, 2 * many.mean() - many], 2).reshape(60, 800, 5)
    pairs = loss_table(mirrored, usual=np.ones_like(mirrored), paired=True)
    assert pairs.error.max() < 1e-4 and pairs.draws == 400  # what is odd cancels in each pair
    steady = np.linspace(1, 3, 5) * np.ones((3, 1, 1)) * np.array([1, 2, 3])[:, None, None]
    assert loss_table(steady).error == pytest.approx(0, abs=1e-12)


def test_images_are_held_to_their_own_bucket():
    losses = np.concatenate([drawn(10), drawn(12, factor=5, seed=1), drawn(2, factor=9, seed=2)])
    buckets = ["64x64"] * 10 + ["32x96"] * 12 + ["8x8"] * 2
    found = loss_table(losses, buckets)
    assert found.relative[:10].mean() == pytest.approx(1, abs=1e-5)
    assert found.relative[10:22].mean() == pytest.approx(1, abs=1e-5)
    assert found.relative[22:].mean() > 2  # too few to be usual: held to all
    usual = usual_losses(losses[:1], ["32x96"], losses, buckets)
    assert usual[0] == pytest.approx(losses[10:22].mean(0), rel=1e-5)


def test_a_gap_covers_what_is_there():
    inside = 0
    for seed in range(200):
        both = drawn(110, seed=seed)
        train = loss_table(both[:70])
        usual = usual_losses(both[70:], None, both[:70], None)
        gap = over_fitting(train, loss_table(both[70:], usual=usual))
        inside += gap.low <= 0 <= gap.high
    assert inside >= 182  # of 190 expected
    worse = loss_table(1.3 * both[70:], usual=usual)
    assert "over-fitted" in over_fitting(train, worse).spell()
    few = over_fitting(train, loss_table(both[70:90], usual=usual[:20]))
    assert few.low is None and "from 30 images on" in few.spell()


def test_images_that_were_trained_on_are_not_held_out():
    train, held = drawn(20), drawn(5, seed=3)
    require_held_out("abcde", held, list(map(str, range(20))), train)
    held[2] = train[7] * (1 + 1e-7)
    with pytest.raises(DminError, match=r"1 of 5 .*c is 7: the same loss"):
        require_held_out("abcde", held, list(map(str, range(20))), train)
