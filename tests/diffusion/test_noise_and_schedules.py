"""The options of noise and timesteps: antithetic pairs, noise of each example's own, log-SNR."""

import math

import pytest
import torch
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector
from dmin.diffusion.noise import PerExampleNoise, SharedNoise
from dmin.diffusion.timesteps import LogSNR, Stratified
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("kind", [SharedNoise, PerExampleNoise])
class TestAntithetic:
    def test_odd_draws_are_minus_the_even_ones_before(self, kind):
        noise, plain = kind(seed=2, draws=4, antithetic=True), kind(seed=2, draws=4)
        drawn = [noise(SHAPE, 500, draw, "cat") for draw in range(4)]
        assert torch.equal(drawn[1], -drawn[0]) and torch.equal(drawn[3], -drawn[2])
        assert torch.equal(drawn[2], plain(SHAPE, 500, 2, "cat"))
        assert not torch.equal(drawn[0], drawn[2])

    def test_draws_come_in_pairs(self, kind):
        with pytest.raises(DminError, match=r"draws=3 .*pairs. Set noise\.draws=4"):
            kind(draws=3, antithetic=True)

    def test_stores_with_and_without_differ(self, kind):
        assert kind(draws=2).describe() != kind(draws=2, antithetic=True).describe()


def test_noise_of_its_own_depends_on_the_example_and_shared_noise_does_not():
    own, shared = PerExampleNoise(), SharedNoise()
    assert not torch.equal(own(SHAPE, 500, 0, "cat"), own(SHAPE, 500, 0, "dog"))
    assert torch.equal(own(SHAPE, 500, 0, "cat"), PerExampleNoise()(SHAPE, 500, 0, "cat"))
    assert torch.equal(shared(SHAPE, 500, 0, "cat"), shared(SHAPE, 500, 0, "dog"))
    assert own.describe()["kind"] != shared.describe()["kind"]


def test_a_collector_gives_each_example_its_noise_at_each_timestep_and_draw(digits):
    seen = []

    class Spy(DDPM):
        def predict(self, x0, noise, t, condition):
            seen.extend(zip(x0, t.tolist(), noise, strict=True))
            return super().predict(x0, noise, t, condition)

    model = Spy.build(TINY_UNET, {}).eval()
    noise = PerExampleNoise(draws=2)
    collector = GradientCollector(model, BlockCyclic(256), Stratified(2), noise, microbatch=3)
    examples = [digits[0], digits[0]]
    x0 = torch.stack([2 * e.image - 1 for e in examples])
    labels = {"class_labels": torch.tensor([e.label for e in examples])}
    features = collector.features(x0, labels, ["cat", "dog"])
    expected = [
        (t, noise(SHAPE, t, draw, name))
        for name in ("cat", "dog")
        for draw in range(2)
        for t in collector.timesteps
    ]
    # Passes may be run again, to see whose row is whose.
    told = {(t, tuple(found.flatten().tolist())) for _, t, found in seen}
    assert told == {(t, tuple(drawn.flatten().tolist())) for t, drawn in expected}
    cosines = (features.values["loss"][0] * features.values["loss"][1]).sum(-1)
    assert (cosines < 0.999).all()  # one image, yet told apart by its noise


class TestLogSNR:
    def test_it_is_even_in_log_snr(self):
        model = DDPM.build(TINY_UNET, {"beta_schedule": "linear"})
        chosen = LogSNR(10).bind(model.log_snr)(model.timesteps)
        assert chosen == (950, 843, 722, 577, 399, 211, 86, 30, 9, 1)
        ratios = model.log_snr(chosen)
        low, high = model.log_snr([999, 0])
        for part, ratio in enumerate(ratios):
            assert ratio == pytest.approx(low + (high - low) * (part + 0.5) / 10, abs=0.3)

    def test_crowded_rungs_give_way_to_their_neighbours(self):
        model = DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"})
        chosen = LogSNR(10).bind(model.log_snr)(model.timesteps)
        assert chosen[:4] == (999, 998, 997, 993) and chosen[-1] == 3

    def test_pure_noise_does_not_count(self):
        settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        model = DDPM.build(TINY_UNET, settings)
        assert model.log_snr([999]) == [-math.inf]
        assert 999 not in LogSNR(5).bind(model.log_snr)(model.timesteps)

    def test_more_parts_than_rungs_are_refused(self):
        with pytest.raises(DminError, match=r"timesteps\.num=4, but the model has 3"):
            LogSNR(4).bind(lambda timesteps: [float(-t) for t in timesteps])([2, 1, 0])

    def test_a_model_must_offer_it(self, ddpm):
        with pytest.raises(DminError, match=r"method log_snr.*timesteps=stratified"):
            LogSNR().bind(None)
        collector = GradientCollector(ddpm, BlockCyclic(256), LogSNR(3))
        assert collector.timesteps == LogSNR(3).bind(ddpm.log_snr)(ddpm.timesteps)
