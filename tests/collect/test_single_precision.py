"""Devices without double precision, such as Apple's: simulated, as `narrow_device` has it."""

import numpy as np
import pytest
import torch
from latent_model import Latent
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from narrow_device import DEVICE

from dmin.attribution import retrieve
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.timesteps import Stratified
from dmin.doctor import diagnose
from dmin.sketches import OPORP, SJLT, Auto, MaskSJLT, TensorSketch


class OnDevice(CPUAccelerator):
    def setup_device(self, device):
        """Take the device as it is."""


@pytest.fixture
def trainer(monkeypatch):
    swapping = torch.__future__.set_swap_module_params_on_conversion
    swapping(True)  # as parameters of a real device keep their names as well
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=OnDevice())
    yield predict_trainer(accelerator="auto", strategy=strategy, enable_progress_bar=False)
    swapping(False)


def make(model, sketch, **settings):
    return GradientCollector(model, sketch, Stratified(2), **settings)


def quiet():
    return predict_trainer(accelerator="cpu", enable_progress_bar=False)


def test_a_device_without_doubles_says_so():
    for make in (torch.ones(2).to(DEVICE).double, lambda: torch.zeros(2, device=DEVICE).double()):
        with pytest.raises(TypeError, match="has no torch"):
            make()


@pytest.mark.parametrize("sketch", [Auto, OPORP, SJLT, MaskSJLT, TensorSketch])
def test_rows_are_had_without_doubles(sketch, digits, tmp_path, trainer):
    few, stores = Examples(digits.examples[:6]), []
    for number, by in enumerate((trainer, quiet())):
        collector = make(Latent(), sketch(256))
        path = tmp_path / str(number)
        stores.append(collector.collect(few, path, trainer=by, block_size=4, dtype="float32"))
        assert {p.device.type for p in collector.model.network.parameters()} == {"cpu"}
    np.testing.assert_allclose(*(store.features("loss") for store in stores), atol=1e-5)
    answers = [retrieve(store, store, k=3).train_ids for store in stores]
    assert answers[0] == answers[1]


def test_the_doctor_examines_without_doubles(digits, trainer):
    found = diagnose(make(Latent(), Auto(256)), digits, 3, trainer)
    assert found.passed, found.failed
