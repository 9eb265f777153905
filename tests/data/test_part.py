"""The part of a picture that is asked about: where it lies, and what cannot be one."""

import numpy as np
import pytest
import torch
from examples_on_disk import encoded

from dmin.data.part import Part, dimmed
from dmin.data.pictures import Pictures
from dmin.data.pixels import Pixels
from dmin.runtime.errors import DminError


def grey(height, width, values=0):
    return encoded(np.full((height, width, 3), values, np.uint8))


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "a.png").write_bytes(grey(8, 16))
    return tmp_path / "a.png"


@pytest.mark.parametrize("region", [[4, 2, 8, 3], [0.25, 0.25, 0.5, 0.375]])
def test_a_region_is_in_pixels_or_in_shares(picture, region):
    (example,) = Pictures(picture, region=region)
    expected = torch.zeros(1, 8, 16)
    expected[:, 2:5, 4:12] = 1
    assert torch.allclose(example.mask, expected / expected.mean())
    assert "at (" in example.metadata["part"]
    pale = dimmed(example.image, example.mask)
    assert pale[:, 2:5, 4:12].max() == 0 and pale[:, 0].min() == 0.75


def test_a_part_is_cut_and_scaled_as_its_picture(picture):
    (example,) = Pictures(picture, size=4, region=[0, 0, 8, 8])  # 8 × 8 in the middle: 4 to 12
    assert example.mask.shape == (1, 4, 4)
    assert example.mask[0, :, 0].min() > 1.9 and example.mask[0, :, 3].max() < 0.1
    with pytest.raises(DminError, match=r"almost none of it is left .*data\.crop=none"):
        Pictures(picture, size=4, region=[0, 0, 2, 8])
    (whole,) = Pictures(picture, size=4, crop="none", region=[0, 0, 4, 8])
    assert whole.mask[0, :, 0].min() > 3.5


def test_masks_of_any_size_have_soft_edges(picture, tmp_path):
    values = np.zeros((4, 8, 3), np.uint8)
    values[:, 4:] = 255
    (tmp_path / "masks").mkdir()
    for place in (tmp_path / "mask.png", tmp_path / "masks/a.png"):
        place.write_bytes(encoded(values))
    one, all_of_them = (
        Pictures(picture, mask=place)[0] for place in (tmp_path / "mask.png", tmp_path / "masks")
    )
    assert torch.equal(one.mask, all_of_them.mask)
    across = one.mask[0, 4]
    assert across[0] == 0 and 0 < across[7] < across[8] < across[15]
    assert one.mask.mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"region": [0, 0, 1, 1]}, "whole numbers of pixels, or shares"),
        ({"region": [0.5, 0, 4, 4]}, "whole numbers of pixels, or shares"),
        ({"region": [0, 0, 4]}, "x, y, width and height"),
        ({"region": [-1, 0, 4, 4]}, "none of them negative"),
        ({"region": [0, 0, float("nan"), 4]}, "x, y, width and height"),
        ({"region": [0, 0, 4, 0]}, "above zero"),
        ({"region": [12, 0, 5, 4]}, "it is not inside .* 16 × 8 pixels"),
        ({"region": [0.5, 0, 0.01, 0.01]}, "less than a pixel"),
        ({"region": [0, 0, 4, 4], "mask": "m.png"}, "both set"),
        ({"mask": "gone.png"}, "no such file"),
        ({"mask": "square.png"}, "a different aspect ratio"),
        ({"mask": "black.png"}, "entirely black"),
        ({"mask": "text.png"}, "cannot be read"),
        ({"mask": "empty"}, "have no mask in empty.*set queries.mask=null"),
    ],
)
def test_what_is_no_part_is_refused_when_it_is_asked_about(picture, said, message, monkeypatch):
    monkeypatch.chdir(picture.parent)
    for name, content in {
        "square.png": grey(8, 8, 255),
        "black.png": grey(8, 16),
        "text.png": b"no picture",
        "empty/b.png": grey(8, 16, 255),
    }.items():
        picture.with_name("empty").mkdir(exist_ok=True)
        (picture.parent / name).write_bytes(content)
    with pytest.raises(DminError, match=message):
        Pictures(picture, **said)


def test_other_parts_are_other_queries(picture):
    parts = [{}, {"region": [0, 0, 4, 4]}, {"region": [0, 0, 5, 4]}, {"region": [0, 0, 0.25, 0.5]}]
    kept = [Pictures(picture, **part).describe() for part in parts]
    assert kept[1] == kept[3]  # said otherwise
    assert len({str(each) for each in kept}) == 3 and "part" not in kept[0]
    assert Part(region=[0, 0, 4, 4]).of(picture.parent, "a.png", Pixels()).shape == (1, 8, 16)


def test_what_is_transparent_in_a_mask_is_not_asked_about(picture, tmp_path):
    values = np.zeros((8, 16, 4), np.uint8)
    values[:, 8:] = 255
    (tmp_path / "m.png").write_bytes(encoded(values))
    (example,) = Pictures(picture, mask=tmp_path / "m.png")
    assert example.mask[0, :, :8].max() == 0 and example.mask[0, :, 8:].min() == 2
