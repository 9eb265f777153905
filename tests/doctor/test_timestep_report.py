"""How much timesteps distinguish examples: constructed rows, and the published schedule."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector, predict_trainer
from dmin.diffusion.timesteps import DMinCubic, Stratified
from dmin.doctor.timestep_report import report_of, report_table, timestep_report
from dmin.models.families.ddpm import DDPM
from dmin.sketches import BlockCyclic

RNG = np.random.default_rng(0)


def rows(cosine, n=32, dim=4096, scale=1.0):
    """Rows ``[n, 1, 1, 1, dim]`` whose pairs have about this cosine."""
    common, own = RNG.standard_normal(dim), RNG.standard_normal((n, dim))
    return (scale * (cosine**0.5 * common + (1 - cosine) ** 0.5 * own))[:, None, None, None]


def test_the_mean_cosine_is_that_of_the_rows_whatever_their_scale():
    apart, alike = rows(0.0), rows(0.9, scale=1e3)
    report = timestep_report(np.concatenate([apart, alike], 2), (900, 100))
    assert [entry.timestep for entry in report] == [900, 100]
    assert report[0].cosine == pytest.approx(0, abs=0.02)
    assert report[1].cosine == pytest.approx(0.9, abs=0.02)


def test_timesteps_at_which_all_look_alike_are_blind():
    same = np.repeat(rows(0.0)[:1], 32, 0)
    crowd = np.eye(32, 4096)[:, None, None, None]  # every pair equally far apart
    report = timestep_report(np.concatenate([same, crowd], 2), (2, 1))
    assert [entry.blind for entry in report] == [True, True]
    assert report[0].cosine == pytest.approx(1) and report[1].spread == pytest.approx(0)
    assert not timestep_report(rows(0.5, dim=64), (1,))[0].blind


def test_shares_add_up_and_go_to_those_that_decide():
    decides = np.where(np.arange(32) % 2, 1.0, -1.0)[:, None] * np.ones(4096)
    both = np.concatenate([rows(0.5), decides[:, None, None, None]], 2)
    shares = [entry.share for entry in timestep_report(both, (2, 1))]
    assert sum(shares) == pytest.approx(1) and shares[1] > 0.99


def test_draws_are_averaged_and_zero_rows_count_as_nothing():
    first, second = rows(0.2), rows(0.8)
    draws = timestep_report(np.concatenate([first, second], 1), (1,))[0]
    single = [timestep_report(each, (1,))[0].cosine for each in (first, second)]
    assert draws.cosine == pytest.approx(sum(single) / 2, abs=1e-4)
    zero = timestep_report(np.zeros((4, 1, 1, 1, 8)), (1,))[0]
    assert zero.cosine == 0 and zero.share == 0 and zero.blind


def test_the_published_schedule_is_mostly_blind_where_no_label_tells(digits, tmp_path):
    """An unconditional DDPM with linear betas: 8 of the cubic schedule's 10 steps, 4 of ours."""
    torch.manual_seed(0)
    model = DDPM.build({**TINY_UNET, "num_class_embeds": None}, {"beta_schedule": "linear"}).eval()
    blind = {}
    for schedule in (DMinCubic(10), Stratified(10)):
        collector = GradientCollector(model, BlockCyclic(1024), schedule)
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        path = tmp_path / type(schedule).__name__
        report = report_of(collector.collect(digits, path, trainer=trainer), sample=20)
        blind[type(schedule)] = sum(entry.blind for entry in report)
        noisy = sum(entry.share for entry in report if entry.timestep > 870)
    assert blind[DMinCubic] >= 7 and blind[Stratified] <= 5
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report_table(report))
    assert "blind" in console.export_text() and noisy < 0.02
