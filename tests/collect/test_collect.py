"""From examples to rows: against plain autograd, and whatever must not change them."""

import os
import signal
import textwrap
import time

import numpy as np
import pytest
import torch
from command_line import Command
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector, predict_trainer
from dmin.collect.features import rows_of
from dmin.data import Example, Examples, collate
from dmin.data.digits import Digits
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit, Stratified
from dmin.models.base import READOUTS
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import OPORP, BlockCyclic
from dmin.store import Store, StoreWriter

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def make(model, **changes):
    settings = {"sketch": BlockCyclic(256), "timesteps": Stratified(3), **changes}
    return GradientCollector(model, **settings)


def run(collector, dataset, path, **options):
    options = {"block_size": 8, "dtype": "float32", **options}
    return collector.collect(dataset, path, trainer=predict_trainer(**QUIET), **options)


def features(store, readout="loss"):
    return store.features(readout, 0, len(store))


def one_gradient(model, example, t, noise, readout):
    """The gradient of one example at one timestep by plain autograd, unit and by parameter."""
    model.zero_grad()
    x0, condition = model.encode(collate([example]))
    value = READOUTS[readout](model.predict(x0, noise[None], torch.tensor([t]), condition))
    value.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.network.named_parameters()}
    model.zero_grad(set_to_none=True)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    return {n: (g / norm)[None] for n, g in gradients.items()}, norm, value.detach()


@pytest.fixture(scope="module")
def reference(ddpm, digits, tmp_path_factory):
    return run(make(ddpm), digits, tmp_path_factory.mktemp("reference") / "store")


def test_rows_are_sketches_of_unit_gradients_of_one_example_at_a_time(ddpm, digits, tmp_path):
    noise = SharedNoise(seed=3, draws=2)
    collector = make(ddpm, noise=noise, readouts=("loss", "mean_squared_output"), microbatch=5)
    store = run(collector, Examples(digits.examples[:3]), tmp_path / "s", block_size=2)
    for readout in ("loss", "mean_squared_output"):
        for row in range(3):
            for draw in range(2):
                for step, t in enumerate(collector.timesteps):
                    gradients, norm, value = one_gradient(
                        ddpm, digits[row], t, noise((1, 8, 8), t, draw), readout
                    )
                    expected = collector.sketch.of(gradients)[0]
                    found = store.features(readout, row, row + 1)[0, draw, step]
                    assert np.abs(found - expected.numpy()).max() < 2e-6
                    assert store.norms(readout)[row, draw, step, 0] == pytest.approx(
                        norm.item(), rel=1e-4
                    )
                    if readout == "loss":
                        assert store.losses()[row, draw, step] == pytest.approx(
                            value.item(), rel=1e-4
                        )


def test_the_same_call_gives_the_same_bits(ddpm, digits, tmp_path, reference):
    assert run(make(ddpm), digits, tmp_path / "again").digest() == reference.digest()


def test_resuming_gives_the_same_bits_and_computes_only_what_is_missing(
    ddpm, digits, tmp_path, reference
):
    path = tmp_path / "store"
    done = run(make(ddpm), digits, path, segment_bytes=1).digest()  # a segment a block
    for segment in sorted(path.glob("segment-*"))[1::2]:
        segment.unlink()
    assert Store(path).missing_blocks == [1, 3]
    kept = {p.name: p.stat().st_mtime_ns for p in path.glob("segment-*")}
    resumed = run(make(ddpm), digits, path)
    assert resumed.digest() == reference.digest() == done
    assert {p.name: p.stat().st_mtime_ns for p in path.glob("segment-*") if p.name in kept} == kept


def test_blocks_in_any_order_give_the_same_bits(ddpm, digits, tmp_path, reference):
    collector = make(ddpm)
    manifest = collector.manifest(digits, block_size=8, dtype="float32")
    with StoreWriter(tmp_path / "s", manifest) as writer:
        for block in (3, 0, 2, 1):
            rows = manifest.block_rows(block)
            batch = {**collate([digits[i] for i in rows]), "position": list(rows)}
            features = collector.features(*ddpm.encode(batch), batch["id"])
            writer.append(block, rows_of([batch], [features], collector.timesteps)())
    assert Store(tmp_path / "s").digest() == reference.digest()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"block_size": 5}, {}),
        ({}, {"microbatch": 7}),
        ({}, {"microbatch": 1000}),
        ({}, {"budget": 1}),
    ],
)
def test_batching_changes_rows_by_rounding_only(
    ddpm, digits, tmp_path, reference, options, changes
):
    other = run(make(ddpm, **changes), digits, tmp_path / "s", **options)
    assert np.abs(features(other) - features(reference)).max() < 1e-5


def test_float16_rows_are_the_float32_rows_rounded(ddpm, digits, tmp_path, reference):
    half = run(make(ddpm), digits, tmp_path / "s", dtype="float16")
    assert (features(half) == features(reference).astype(np.float16).astype(np.float32)).all()


def test_the_model_is_given_back_as_it_was(ddpm, digits, tmp_path):
    def state():
        hooks = sum(len(m._forward_hooks) for m in ddpm.modules())
        flags = [(p.requires_grad, p.grad is None) for p in ddpm.parameters()]
        return ddpm.training, hooks, flags, {n: v.clone() for n, v in ddpm.state_dict().items()}

    before = state()
    run(make(ddpm), digits, tmp_path / "s")
    after = state()
    assert before[:3] == after[:3]
    assert all(torch.equal(before[3][name], after[3][name]) for name in before[3])


PROCESSES = """
    import sys, torch
    from dmin.collect import GradientCollector, predict_trainer
    from dmin.data import Examples
    from dmin.data.digits import Digits
    from dmin.models.families.ddpm import DDPM
    from dmin.sketches import BlockCyclic
    from dmin.diffusion.timesteps import Stratified

    if __name__ == "__main__":
        model, path, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
        torch.set_num_threads(1)
        collector = GradientCollector(
            DDPM.from_pretrained(model), BlockCyclic(256), Stratified(3)
        )
        strategy = "ddp" if devices > 1 else "auto"
        trainer = predict_trainer(
            accelerator="cpu", devices=devices, strategy=strategy, enable_progress_bar=False
        )
        data = Examples(Digits("train").examples[: int(sys.argv[4])])
        collector.collect(data, path, block_size=8, segment_bytes=1, trainer=trainer)
"""


def alone(ddpm, count, path):
    """What the script does with one process."""
    data = Examples(Digits("train").examples[:count])
    return run(make(ddpm), data, path, dtype="float16", segment_bytes=1)


def script(tmp_path):
    path = tmp_path / "collect_digits.py"
    path.write_text(textwrap.dedent(PROCESSES))
    return path


@pytest.mark.slow
def test_two_processes_give_the_same_bits_as_one(ddpm, ddpm_path, tmp_path):
    run = Command(script(tmp_path), ddpm_path, tmp_path / "two", 2, 26).wait()
    assert run.returncode == 0, run.stderr
    two = Store(tmp_path / "two")
    assert two.complete and two.digest() == alone(ddpm, 26, tmp_path / "one").digest()


@pytest.mark.slow
def test_a_process_without_any_block_does_not_hang_the_others(ddpm, ddpm_path, tmp_path):
    digest = alone(ddpm, 26, tmp_path / "s").digest()
    min((tmp_path / "s").glob("segment-*")).unlink()  # one block for two processes
    run = Command(script(tmp_path), ddpm_path, tmp_path / "s", 2, 26).wait(timeout=120)
    assert run.returncode == 0, run.stderr
    assert Store(tmp_path / "s").digest() == digest


@pytest.mark.slow
def test_a_killed_collection_resumes_to_the_same_bits(ddpm, ddpm_path, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = Command(script(tmp_path), ddpm_path, killed, 1, 120)
    end = time.monotonic() + 120
    while len(list(killed.glob("segment-*"))) < 3 and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Store(killed).missing_blocks  # killed in the middle, or this tests nothing
    assert alone(ddpm, 120, killed).digest() == alone(ddpm, 120, whole).digest()


@pytest.mark.slow
def test_a_terminated_collection_seals_the_block_at_hand(ddpm_path, tmp_path):
    path = tmp_path / "store"
    process = Command(script(tmp_path), ddpm_path, path, 1, 1000)
    end = time.monotonic() + 120
    while not list(path.glob("segment-*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60).returncode == 128 + signal.SIGTERM
    store = Store(path)
    assert 0 < len(store) < 1000 and not list(path.glob("*.tmp"))


def test_a_store_of_other_settings_is_not_resumed(ddpm, digits, tmp_path):
    run(make(ddpm), digits, tmp_path / "s")
    with pytest.raises(DminError, match=r"sketch\.seed: 1 here, 0 there"):
        run(make(ddpm, sketch=BlockCyclic(256, seed=1)), digits, tmp_path / "s")
    other = DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"}).eval()
    with pytest.raises(DminError, match="weights"):
        run(make(other), digits, tmp_path / "s")


def test_a_changed_dataset_is_not_resumed(ddpm, digits, tmp_path):
    run(make(ddpm), digits, tmp_path / "s")
    first = digits[0]
    changed = [Example(first.id, 1 - first.image, first.label), *digits.examples[1:]]
    with pytest.raises(DminError, match="content"):
        run(make(ddpm), Examples(changed), tmp_path / "s")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 8, 8), torch.nan), "digit-bad.*NaN"),
        (torch.full((1, 8, 8), 2.0), r"digit-bad.*expected \[0, 1\]"),
        (torch.zeros(8, 8), r"digit-bad.*\[C, H, W\]"),
        (torch.zeros(1, 4, 4), r"\(1, 4, 4\).*does not fit a model of \(1, 8, 8\)"),
    ],
)
def test_a_bad_image_is_refused_by_name_and_what_was_done_is_kept(
    ddpm, digits, tmp_path, image, message
):
    last = [Example("digit-bad", image, 0)] * ((len(image.shape) > 2 and image.shape[1] == 4) or 1)
    examples = Examples([*digits.examples[:24], *last])
    with pytest.raises(DminError, match=message):
        run(make(ddpm), examples, tmp_path / "s")
    assert Store(tmp_path / "s").missing_blocks == [3]


def test_a_nan_gradient_names_example_and_timestep(digits, tmp_path):
    model = DDPM.build(TINY_UNET, {}).eval()
    with torch.no_grad():
        model.network.conv_in.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(DminError, match=r"gradient of loss for example 'digit-.*timestep 833"):
        run(make(model), digits, tmp_path / "s")


def test_a_zero_gradient_is_a_zero_row(ddpm, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(READOUTS, "nothing", lambda p: p.prediction.flatten(1).sum(1) * 0)
    store = run(make(ddpm, readouts=("nothing",)), digits, tmp_path / "s")
    assert (features(store, "nothing") == 0).all() and (store.norms("nothing") == 0).all()


def test_settings_out_of_range_are_refused(ddpm, digits):
    with pytest.raises(DminError, match=r"sketch\.dim=10000000 is larger than"):
        make(ddpm, sketch=OPORP(10_000_000))
    with pytest.raises(DminError, match=r"timesteps\.num=0"):
        make(ddpm, timesteps=Stratified(0))
    with pytest.raises(DminError, match=r"\[1000\].*from 0 to 999"):
        make(ddpm, timesteps=Explicit([1000]))
    with pytest.raises(DminError, match=r"readouts=\['lost'\]"):
        make(ddpm, readouts=("lost",))
    with pytest.raises(DminError, match="the dataset Examples is empty"):
        make(ddpm).manifest(Examples([]))
    with pytest.raises(DminError, match="two examples have the id 'digit-"):
        make(ddpm).manifest(Examples([digits[0], digits[0]]))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_would_cast_the_weights_is_refused(ddpm, digits, tmp_path, precision):
    trainer = predict_trainer(**QUIET, precision=precision)
    with pytest.raises(DminError, match=f"precision={precision} would cast.*float32"):
        make(ddpm).collect(digits, tmp_path / "s", trainer=trainer)
    assert {p.dtype for p in ddpm.network.parameters()} == {torch.float32}


def test_inference_mode_is_refused(ddpm, digits, tmp_path):
    trainer = predict_trainer(**QUIET, inference_mode=True)
    with pytest.raises(DminError, match="inference_mode=false"):
        make(ddpm).collect(digits, tmp_path / "s", trainer=trainer)
