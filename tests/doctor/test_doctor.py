"""What the doctor lets pass, what it stops, and what it says."""

import io
import json
import textwrap

import pytest
import torch
import torch.nn.functional as F
from command_line import dmin
from latent_model import Latent
from rich.console import Console
from torch import nn
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.noise import PerExampleNoise
from dmin.diffusion.timesteps import DMinCubic, Stratified
from dmin.doctor import diagnose
from dmin.gradients.factors import Dense
from dmin.gradients.layers import gradient_of, linear
from dmin.models import DiffusionModel, Prediction
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import OPORP, BlockCyclic


class Pixels(DiffusionModel):
    """A network of one's own."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers, nn.Conv2d(8, 1, 1))

    def predict(self, x0, noise, t, condition):
        noised = x0 + noise * (t / 1000).view(-1, 1, 1, 1)
        return Prediction(self.network(noised), noise, torch.ones(len(x0)))


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, training=True)


def examine(model, dataset, sketch=None, timesteps=None, examples=4, **settings):
    collector = GradientCollector(
        model, sketch or BlockCyclic(64, block=32), timesteps or Stratified(3), **settings
    )
    return diagnose(collector, dataset, examples, predict_trainer(accelerator="cpu"))


def verdicts(diagnosis):
    return {check.name: check.verdict for check in diagnosis.checks}


def failed(diagnosis):
    return {check.name for check in diagnosis.failed}


def check(diagnosis, name):
    return next(each for each in diagnosis.checks if each.name == name)


def text(diagnosis):
    console = Console(width=200, record=True, file=io.StringIO())
    for table in diagnosis.tables():
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("sketch", [BlockCyclic(256), OPORP(256)], ids=lambda s: s.family)
def test_a_tiny_ddpm_passes(ddpm, digits, sketch, tmp_path):
    before = {name: value.clone() for name, value in ddpm.state_dict().items()}
    found = examine(ddpm, digits, sketch)
    assert found.passed and set(verdicts(found).values()) == {"passed"}
    assert check(found, "gradients equal autograd's").value < 1e-5
    assert sum(row.scalars for row in found.coverage) == sum(p.numel() for p in ddpm.parameters())
    assert {row.path for row in found.coverage} == {"closed form"}
    assert found.cost.examples == 26 and found.cost.seconds > 0
    assert found.cost.store_bytes == 26 * (3 * 256 * 2 + 3 * 4 + 3 * 4)
    assert all(torch.equal(before[name], value) for name, value in ddpm.state_dict().items())
    found.save(tmp_path / "diagnosis.json")
    saved = json.loads((tmp_path / "diagnosis.json").read_text())
    assert saved["passed"] and len(saved["checks"]) == len(found.checks)
    assert "GroupNorm" in text(found) and "time (without loading and encoding)" in text(found)


def test_the_predicted_store_is_as_large_as_the_real_one(ddpm, digits, tmp_path):
    collector = GradientCollector(ddpm, BlockCyclic(4096), Stratified(3))
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    found = diagnose(collector, digits, trainer=trainer)
    collector.collect(digits, tmp_path / "s", trainer=trainer)
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.h5"))
    assert found.cost.store_bytes == pytest.approx(size, rel=0.05)


def test_latents_and_captions_pass_and_their_encodings_are_counted(digits):
    model = Latent()
    found = examine(model, digits, BlockCyclic(32, block=16), noise=PerExampleNoise(draws=2))
    assert found.passed
    assert found.cost.encoding_bytes == 26 * 4 * (2 * 4 * 4 + 4 + 4)


def test_a_part_of_the_parameters_is_shown_as_such(ddpm, digits):
    found = examine(ddpm, digits, params="attentions.*weight")
    assert found.passed and {r.path for r in found.coverage} == {"closed form", "not attributed"}


def test_a_hook_that_is_off_is_found_and_the_layer_named(ddpm, digits):
    def off(layer, a, d, batch):
        factors = linear(layer, a, d, batch)
        return {**factors, "bias": Dense(factors["bias"].dense() * 1.01)}

    gradient_of(nn.Linear)(off)
    try:
        found = examine(ddpm, digits)
    finally:
        gradient_of(nn.Linear)(linear)
    assert failed(found) == {"gradients equal autograd's"}
    worst = check(found, "gradients equal autograd's")
    assert worst.value == pytest.approx(0.01, rel=0.1) and ".bias" in worst.detail
    assert "Linear" in worst.remedy and "collect.params" in text(found)


def test_normalising_across_the_batch_is_found(digits):
    found = examine(Pixels(nn.BatchNorm2d(8, track_running_stats=False)), digits)
    assert "examples do not mix in a batch" in failed(found)
    assert "batch normalisation 1" in check(found, "examples do not mix in a batch").remedy
    assert examine(Pixels(nn.BatchNorm2d(8)).eval(), digits).passed


class Alone(nn.Module):
    """Does otherwise with an even number of pairs in a pass."""

    def forward(self, x):
        return x * (2.0 if len(x) % 2 == 0 else 1.0)


def test_the_sizes_of_the_collections_own_passes_are_examined(digits):
    found = examine(Pixels(Alone()), digits, examples=3, microbatch=6)
    detail = check(found, "rows can be computed").detail
    assert "over the whole batch" in detail and "collect.microbatch=1" in detail


def test_dropout_that_stays_on_is_found(digits):
    found = examine(Pixels(AlwaysDropout()), digits)
    assert "the network is deterministic" in failed(found)


def test_train_mode_is_a_warning_and_given_back(digits):
    model = Pixels(nn.Dropout(0.5)).train()
    found = examine(model, digits)
    assert found.passed and verdicts(found)["the network is in eval mode"] == "warning"
    assert all(module.training for module in model.modules())


def test_a_nan_weight_is_named_and_ends_it(digits):
    model = DDPM.build(TINY_UNET, {}).eval()
    with torch.no_grad():
        model.network.conv_in.weight[0, 0, 0, 0] = torch.nan
    found = examine(model, digits)
    assert failed(found) == {"weights are finite"} and found.cost is None
    assert "conv_in.weight" in check(found, "weights are finite").detail


def test_a_gradient_that_overflows_is_found(digits):
    model = Pixels()
    with torch.no_grad():
        model.network[0].weight.fill_(1e30)
    found = examine(model, digits)
    assert {"gradients are finite", "rows can be computed"} <= failed(found)
    assert "gradients equal autograd's" in failed(found)


def test_random_encoders_are_found(digits, monkeypatch):
    monkeypatch.setattr(
        Latent,
        "encode",
        lambda self, batch: (
            torch.randn(4, 2, 4, 4),
            {"text": torch.zeros(4, 4), "half": torch.zeros(4, 2, 2)},
        ),
    )
    found = examine(Latent(), digits, BlockCyclic(32, block=16))
    assert failed(found) == {"encoding is deterministic"}


def test_a_sketch_that_weighs_a_layer_wrongly_is_found(ddpm, digits, monkeypatch):
    right = BlockCyclic.add

    def wrong(self, state, name, factors):
        weighed = Dense(2 * factors.dense()) if name == "conv_in.weight" else factors
        right(self, state, name, weighed)

    monkeypatch.setattr(BlockCyclic, "add", wrong)
    found = examine(ddpm, digits)
    assert failed(found) == {"sketches keep inner products", "rows can be computed"}
    assert "collect.kernels=torch" in check(found, "rows can be computed").detail
    assert "conv_in.weight" in check(found, "sketches keep inner products").detail


def test_parameters_without_gradient_are_a_warning(digits):
    model = Pixels()
    model.network.register_parameter("idle", nn.Parameter(torch.ones(3)))
    found = examine(model, digits)
    assert found.passed and verdicts(found)["every parameter has a gradient"] == "warning"
    assert "idle" in check(found, "every parameter has a gradient").detail


def test_blind_timesteps_are_a_warning(digits):
    torch.manual_seed(0)
    model = DDPM.build({**TINY_UNET, "num_class_embeds": None}, {"beta_schedule": "linear"}).eval()
    found = examine(model, digits, BlockCyclic(256), DMinCubic(10))
    assert found.passed
    blind = check(found, "timesteps distinguish examples")
    assert "999" in blind.detail
    telling = ",".join(f"{entry.timestep:g}" for entry in found.timesteps if not entry.blind)
    wanted = f"timesteps.values=[{telling}]" if telling else "timesteps of less noise"
    assert wanted in blind.remedy
    assert verdicts(found)["timesteps distinguish examples"] == "warning"


def test_double_precision_is_held_to_more(digits):
    collector = GradientCollector(Pixels(), BlockCyclic(64, block=32), Stratified(3))
    trainer = predict_trainer(accelerator="cpu", precision="64-true")
    found = diagnose(collector, Examples(digits.examples[:3]), 8, trainer)
    assert check(found, "gradients equal autograd's").limit == 1e-10 and found.passed


def test_too_few_examples_are_refused(ddpm, digits):
    with pytest.raises(DminError, match=r"doctor\.examples=2: at least 3"):
        examine(ddpm, digits, examples=2)


OWN_MODEL = """
    import torch
    from torch import nn
    from dmin import DiffusionModel, Prediction

    class Own(DiffusionModel):
        def __init__(self, path):
            super().__init__()
            self.network = nn.Conv2d(1, 1, 9, padding=4)
            if path == "broken":
                self.network.weight.data[0, 0, 0, 0] = torch.nan

        def predict(self, x0, noise, t, condition):
            return Prediction(self.network(x0 + noise), noise, torch.ones(len(x0)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("state", "status"), [("sound", 0), ("broken", 1)])
def test_the_command_exits_with_1_when_anything_fails(state, status, tmp_path):
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN_MODEL))
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "own.yaml").write_text("_target_: own.Own\npath: ???\n")
    settings = ["--config-dir", "conf", "data=digits", "model=own", f"model.path={state}"]
    sizes = ["sketch.dim=32", "sketch.block=16", "timesteps.num=2", "trainer=cpu"]
    run = dmin("doctor", *settings, *sizes, cwd=tmp_path, ok=status == 0)
    assert run.returncode == status
    (file,) = tmp_path.glob("outputs/runs/doctor/*/diagnosis.json")
    saved = json.loads(file.read_text())
    assert saved["passed"] is (status == 0)
    assert "Traceback" not in run.stderr
    if status:
        assert "1 of 2 checks failed: weights are finite" in run.stderr
        assert "weight" in run.stdout and "Load another checkpoint" in run.stdout
