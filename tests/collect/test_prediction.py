"""What is said before hours of work, and while they pass."""

import csv
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from golden.settings import dmin
from latent_model import Latent

from dmin.collect import GradientCollector, predict_trainer, prediction as module
from dmin.collect.prediction import Forecast, require_space, row_bytes
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store


def make(model, **settings):
    return GradientCollector(model, BlockCyclic(256), Stratified(3), **settings)


def collect(collector, data, path, **options):
    trainer = predict_trainer(accelerator="cpu")
    return collector.collect(data, path, trainer=trainer, block_size=8, **options)


def disk(monkeypatch, free):
    usage = SimpleNamespace(total=10 * free, free=free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)


def test_disk_time_and_memory_are_said_first(ddpm, digits, tmp_path, capsys):
    collect(make(ddpm, microbatch=12), digits, tmp_path / "s")
    first, second, *others = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"disk: 0\.\d MiB of rows \(free: [\d.,]+ .iB\)", first)
    told = r"time: about \d+ s by the time of a pass; [\d.,]+ .iB of memory so far"
    assert re.fullmatch(told, second)
    assert len(others) == 1 and others[0].startswith("gradients: 26 of 26 examples (100.0%), ")


def test_a_disk_that_is_too_small_is_refused_before_a_pass(ddpm, digits, tmp_path, monkeypatch):
    collector, path = make(ddpm), tmp_path / "not" / "yet"
    rows = 26 * row_bytes(collector, "float16")
    disk(monkeypatch, rows - 1)
    monkeypatch.setattr(collector.model, "predict", None)
    with pytest.raises(DminError) as refused:
        collect(collector, digits, path)
    said = str(refused.value)
    assert all(f" {part} " in f" {said} " for part in ("0.0 MiB of rows.", "collect.dtype=int8,"))
    assert said.startswith(f"{path} has 0.0 MiB free, and 0.0 MiB are needed there")
    monkeypatch.undo()
    done = collect(make(ddpm), digits, path)
    disk(monkeypatch, 1)  # nothing is written to a store that is complete
    assert collect(make(ddpm), digits, path).digest() == done.digest()


def test_encodings_are_counted_by_those_of_a_block(digits, tmp_path, monkeypatch):
    collector = make(Latent())
    rows = 26 * row_bytes(collector, "float16")
    disk(monkeypatch, rows + 100)
    with pytest.raises(DminError, match=r"MiB of rows and 0.0 MiB of encodings meanwhile\. Free"):
        collect(collector, digits, tmp_path / "s")
    assert not Store(tmp_path / "s", verify=False).complete
    assert ("network", 1) not in collector.model.log
    disk(monkeypatch, 1 << 30)
    assert collect(collector, digits, tmp_path / "s").complete


def test_folders_on_one_disk_share_what_it_has(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    parts = {name: (tmp_path / name, free * 2 // 3) for name in ("rows", "encodings")}
    require_space({"rows": parts["rows"]})
    with pytest.raises(DminError, match=f"{re.escape(str(tmp_path))} has .* needed there: .* and "):
        require_space(parts)


def test_a_pass_is_timed_once_one_like_it_was_checked(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    forecast = Forecast(3600, torch.device("cpu"))
    for size, seconds in ((64, 100.0), (16, 7.0), (64, 2.0), (64, 50.0)):
        with forecast.timed(SimpleNamespace(t=torch.zeros(size), x0=torch.zeros(size, 1, 8, 8))):
            now[0] += seconds
        assert (forecast.text is None) == (now[0] < 109)
    assert forecast.text.startswith("about 2 min by the time of a pass")


def test_quiet_commands_say_their_results_alone(ddpm_path, tmp_path):
    line = ["model=ddpm", f"model.path={ddpm_path}", "data=digits", "collect.limit=12", "-q"]
    line += [
        "logger=csv",
        "sketch=block_cyclic",
        "timesteps.num=2",
        "trainer=cpu",
        "data.split=heldout",
    ]
    status, said = dmin("collect", *line, place=tmp_path)
    assert status == 0 and said.startswith("store: outputs/stores/digits-train-")
    (logged,) = tmp_path.glob("outputs/runs/collect/*/csv/metrics.csv")
    (row,) = csv.DictReader(logged.open(newline=""))
    assert float(row["rows"]) == 12 and "\r" not in logged.read_text()
    assert not re.search("to repeat:|gradients:|time:|disk:|oading|model", said)
