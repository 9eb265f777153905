"""Schedules choose from the model's timesteps; DMin's as published."""

import pytest

from dmin.diffusion.timesteps import DMinCubic, Explicit, Stratified
from dmin.runtime.errors import DminError

DDPM = range(999, -1, -1)


def test_the_published_schedule_of_ddpm():
    assert DMinCubic(10)(DDPM) == (999, 998, 991, 972, 935, 874, 783, 656, 487, 270)


def test_the_published_schedule_of_sd1():
    chosen = DMinCubic(10, skip_first=True)(DDPM)
    assert chosen == (998, 992, 973, 936, 875, 784, 657, 488, 271, 0)


def test_the_published_schedule_of_sd1_is_read_off_its_sampler():
    diffusers = pytest.importorskip("diffusers")
    sampler = diffusers.PNDMScheduler(skip_prk_steps=True)
    sampler.set_timesteps(1000)
    rungs = [1000 * i**3 // 10**3 for i in range(1, 11)]
    assert DMinCubic(10, skip_first=True)(DDPM) == tuple(sampler.timesteps[rungs].tolist())


def test_the_published_schedule_of_sd3_in_sigmas():
    """Shift 3 over a thousand even sigmas."""
    even = [1 - i / 1000 for i in range(1000)]
    timesteps = [3 * s / (1 + 2 * s) for s in even]
    published = (1.0, 0.9997, 0.9973, 0.9908, 0.978, 0.955, 0.916, 0.852, 0.741, 0.527)
    assert DMinCubic(10)(timesteps) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("num", [1, 2, 5, 10, 17, 100, 999])
def test_cubic_rungs_are_exact(num):
    """⌊N·(i/T)³⌋ in integers, free of what floating point makes of 729.0000000000001."""
    chosen = DMinCubic(num).choose(DDPM)
    assert chosen == tuple(999 - 1000 * i**3 // num**3 for i in range(num))


def test_stratified_takes_the_middles():
    assert Stratified(10)(DDPM) == (949, 849, 749, 649, 549, 449, 349, 249, 149, 49)
    assert Stratified(1)(DDPM) == (499,)
    assert Stratified(3)([5.0, 3.0, 1.0]) == (5.0, 3.0, 1.0)
    assert Stratified(1000)(DDPM) == tuple(DDPM)


@pytest.mark.parametrize("num", [1, 3, 7, 10, 64, 333])
def test_stratified_has_one_in_each_part_noisiest_first(num):
    chosen = Stratified(num)(DDPM)
    assert list(chosen) == sorted(chosen, reverse=True)
    assert [int((999 - t) * num / 1000) for t in chosen] == list(range(num))


def test_explicit_timesteps_are_put_in_order():
    assert Explicit([10, 500, 20])(DDPM) == (500, 20, 10)
    assert Explicit((0.25, 0.75))([0.75, 0.5, 0.25]) == (0.75, 0.25)


def test_explicit_timesteps_must_be_the_models():
    with pytest.raises(DminError, match=r"has \[1000\], which the model does not have.* 0 to 999"):
        Explicit([500, 1000])(DDPM)
    with pytest.raises(DminError, match=r"has \[0.5\]"):
        Explicit([0.5])(DDPM)


def test_no_timesteps_are_refused():
    for schedule in (Stratified, DMinCubic):
        with pytest.raises(DminError, match=r"timesteps\.num=0"):
            schedule(0)
    with pytest.raises(DminError, match=r"timesteps\.values=\[\]"):
        Explicit([])


def test_repeated_timesteps_are_refused():
    with pytest.raises(DminError, match=r"contain duplicates.*timesteps\.num lower"):
        Stratified(11)(range(9, -1, -1))
    with pytest.raises(DminError, match="contain duplicates"):
        DMinCubic(20)(DDPM)
    with pytest.raises(DminError, match=r"contain duplicates.*list each once"):
        Explicit([500, 500])(DDPM)
