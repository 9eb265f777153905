"""DDPM in pixel space: targets, labels, sampling."""

import pytest
import torch
from toy_ddpm import TINY_UNET

from dmin.data import Example, collate
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_that_of_the_prediction_type(kind):
    model = DDPM.build(TINY_UNET, {"prediction_type": kind}).eval()
    x0, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    t = torch.tensor([900, 10])
    alpha = model.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0,
        "sample": x0,
    }
    with torch.no_grad():
        found = model.predict(x0, noise, t, model.condition([1, 2]))
    torch.testing.assert_close(found.target, expected[kind])
    assert found.weight.tolist() == [1, 1]


def test_settings_that_define_the_loss_are_described():
    kinds = [{"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, {"beta_end": 0.1}]
    described = [DDPM.build(TINY_UNET, scheduler).describe() for scheduler in kinds]
    assert len({str(d) for d in described}) == 3
    with pytest.raises(DminError, match="prediction_type='velocity'"):
        DDPM.build(TINY_UNET, {"prediction_type": "velocity"})


def test_losses_can_be_weighted_by_min_snr(ddpm, ddpm_path):
    weighted = DDPM.from_pretrained(ddpm_path, snr_gamma=5)
    t = torch.tensor([999, 3])
    x0 = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        found = weighted.predict(x0, x0, t, weighted.condition([0, 1])).weight
    alpha = ddpm.scheduler.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(found, snr.clamp(max=5) / snr)
    assert weighted.describe() != ddpm.describe()


def test_labels_and_sizes_that_do_not_fit_are_refused(ddpm):
    for label in (10, -1, None, "3"):
        with pytest.raises(DminError, match="knows the classes 0 … 9"):
            ddpm.encode(collate([Example("a", torch.rand(1, 8, 8), label=label)]))
    with pytest.raises(DminError, match=r"Set data\.size=8"):
        ddpm.encode(collate([Example("a", torch.rand(1, 9, 9), label=0)]))


def test_an_image_depends_on_its_own_label_and_seed(ddpm):
    both = ddpm.sample([1, 2], [3, 4], 3)
    assert both.shape == (2, 1, 8, 8) and both.min() >= 0 and both.max() <= 1
    assert torch.equal(both, ddpm.sample([1, 2], [3, 4], 3))
    torch.testing.assert_close(ddpm.sample([2], [4], 3), both[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(ddpm.sample([2], [5], 3), both[1:], atol=1e-3)
