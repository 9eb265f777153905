import pytest
import torch
from toy_ddpm import TINY_UNET

from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.models.base import per_example_loss
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.train import fit_trainer, train

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def build():
    return DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"})


def fit(**settings):
    data = Examples(Digits("train").examples[:64])
    settings = {"steps": 3, "batch_size": 16, "warmup": 1, "ema_decay": 0.5, **settings}
    return train(build, data, trainer=fit_trainer(**QUIET), **settings)


@torch.no_grad()
def loss(model):
    generator = torch.Generator().manual_seed(0)
    examples = Digits("train").examples[:64]
    x0 = torch.stack([e.image for e in examples]) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(1000, (64,), generator=generator)
    condition = model.condition([e.label for e in examples])
    return per_example_loss(model.predict(x0, noise, t, condition)).mean().item()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    assert loss(fit(steps=80, learning_rate=3e-3, warmup=5)) < 0.8 * loss(build().eval())


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first, second, other = fit(seed=1), fit(seed=1), fit(seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.network.conv_in.weight, other.network.conv_in.weight)


def test_the_weights_are_averaged():
    plain, averaged = fit(ema_decay=0.0), fit(ema_decay=0.9)
    assert not torch.equal(plain.network.conv_in.weight, averaged.network.conv_in.weight)
    assert not averaged.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"train\.steps=0"),
        ({"ema_decay": 1.0}, r"train\.ema_decay=1\.0"),
        ({"learning_rate": 1e30, "steps": 30}, r"became (nan|inf).*learning_rate"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(DminError, match=message):
        fit(**settings)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DminError, match="empty"):
        train(build, Examples([]))


def test_a_log_file_gets_a_line_with_the_loss_and_the_trainer_keeps_its_bar(capsys):
    trainer = fit_trainer(accelerator="cpu")
    bar = trainer.progress_bar_callback
    data = Examples(Digits("train").examples[:16])
    train(build, data, trainer=trainer, steps=2, batch_size=16, warmup=1)
    assert "training: 2 of 2 steps (100.0%)" in capsys.readouterr().out
    assert trainer.progress_bar_callback is bar
