"""Noise is a function of its key: the same everywhere, and frozen."""

import subprocess
import sys

import pytest
import torch

from dmin.diffusion.noise import PerExampleNoise, SharedNoise
from dmin.runtime.errors import DminError

SHAPE = (3, 8, 8)


def test_golden_values():
    """Stores hold gradients under this noise: were it to change, they would be worthless."""
    found = SharedNoise(seed=0)(SHAPE, 500)[0, 0, :4]
    torch.testing.assert_close(
        found, torch.tensor([-1.794585, 0.19392, -0.825237, -0.429874]), rtol=0, atol=1e-5
    )
    found = SharedNoise(seed=3, draws=2)((16,), 0.25, 1)[:4]
    torch.testing.assert_close(
        found, torch.tensor([1.553511, 0.609126, -0.910113, 0.943932]), rtol=0, atol=1e-5
    )
    found = PerExampleNoise(seed=0)(SHAPE, 500, 0, "cat")[0, 0, :4]
    torch.testing.assert_close(
        found, torch.tensor([0.984891, -0.40284, -0.304969, 0.693714]), rtol=0, atol=1e-5
    )


def test_each_part_of_the_key_counts():
    noise, other = SharedNoise(seed=0, draws=2), SharedNoise(seed=1)
    drawn = [noise(SHAPE, 500), noise(SHAPE, 499), noise(SHAPE, 500, 1), other(SHAPE, 500)]
    drawn += [noise(SHAPE, 0.5), PerExampleNoise()(SHAPE, 500)]
    flat = torch.stack([x.flatten() for x in drawn])
    cosines = torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T
    assert (cosines - torch.eye(len(drawn))).abs().max() < 0.4  # 192 numbers: σ = 0.07


def test_it_is_standard_normal_float32_on_the_cpu():
    drawn = SharedNoise()((4, 64, 64), 500)
    assert (drawn.dtype, drawn.device.type, drawn.shape) == (torch.float32, "cpu", (4, 64, 64))
    assert abs(drawn.mean()) < 0.04 and abs(drawn.std() - 1) < 0.03


def test_the_default_dtype_has_no_say():
    """Lightning sets it to what trainer.precision says, and other types draw other numbers."""
    expected = SharedNoise()(SHAPE, 7)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(SharedNoise()(SHAPE, 7), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_integers_and_floats_name_the_same_timestep():
    noise = SharedNoise()
    assert torch.equal(noise(SHAPE, 500), noise(SHAPE, 500.0))
    assert torch.equal(noise(SHAPE, 500), noise(list(SHAPE), torch.tensor(500).item()))


def test_it_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    first, expected = SharedNoise()(SHAPE, 500), torch.randn(3)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.randn(3), expected, rtol=0, atol=0)
    assert torch.equal(SharedNoise()(SHAPE, 500), first)


@pytest.mark.slow
def test_another_process_draws_the_same():
    code = "from dmin.diffusion.noise import SharedNoise; print(SharedNoise(5)((9,), 7.5).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(SharedNoise(5)((9,), 7.5).tolist())


def test_settings_are_described():
    assert SharedNoise(2, 3).describe() == {"kind": "shared", "seed": 2, "draws": 3}


@pytest.mark.parametrize("kind", [SharedNoise, PerExampleNoise])
def test_no_draws_are_refused(kind):
    with pytest.raises(DminError, match=r"noise\.draws=0: at least one"):
        kind(draws=0)


def test_a_field_has_the_same_noise_at_the_same_place_of_every_shape():
    field = SharedNoise(shapes="field")
    large = field((4, 150, 131), 500)
    for height, width in ((150, 131), (64, 64), (7, 128), (1, 1), (65, 2)):
        top, left = 75 - height // 2, 65 - width // 2
        part = large[:, top : top + height, left : left + width]
        assert torch.equal(field((4, height, width), 500), part)
    assert abs(large.mean()) < 0.02 and abs(large.std() - 1) < 0.02
    # No tile repeats another.
    assert not torch.equal(large[:, 11:75, 1:65], large[:, 75:139, 65:129])
    assert not torch.equal(field(SHAPE, 500), field(SHAPE, 501))
    pairs = SharedNoise(draws=2, antithetic=True, shapes="field")
    assert torch.equal(pairs(SHAPE, 1, 0), -pairs(SHAPE, 1, 1))
    with pytest.raises(DminError, match=r"noise\.shapes=field needs .* noises \[16\]"):
        field((16,), 500)


def test_what_shapes_share_changes_nothing_for_one_shape_unless_it_is_a_field():
    one, own, field = (SharedNoise(shapes=shapes) for shapes in ("one", "own", "field"))
    assert torch.equal(one(SHAPE, 3), own(SHAPE, 3)) and one.describe() == own.describe()
    assert field.describe() == {**one.describe(), "shapes": "field"}
    with pytest.raises(DminError, match=r"noise\.shapes='two': choose one of one, field, own"):
        SharedNoise(shapes="two")
