"""Clips, and two networks that share out the timesteps: Wan 2.1 and 2.2."""

import copy

import pytest
import torch
from models.families import EVERY, checkpoint, load
from models.test_families import examples, inputs
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from dmin.attribution.retrieval import retrieve
from dmin.collect import GradientCollector, predict_trainer
from dmin.collect.fsdp import LockstepPasses
from dmin.collect.trainer import gradient_checkpointing
from dmin.data import Example, collate
from dmin.data.image_folder import save_images
from dmin.data.video import Clips, VideoFolder
from dmin.diffusion.inputs import NoisedBatch
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit
from dmin.doctor import diagnose
from dmin.doctor.gradients import compare
from dmin.doctor.size import predict_size
from dmin.models.autograd import by_autograd
from dmin.models.checkpoints import without_weights
from dmin.models.oracle import sampling_error
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

WAN = EVERY["wan_2_2"]
HIGH, LOW = (900.0, 700.0), (400.0, 20.0)  # of the boundary, 600
ALL = Explicit((*HIGH, *LOW))


def collected(tmp_path, model, **settings):
    collector = GradientCollector(model, BlockCyclic(256), ALL, **settings)
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    store = collector.collect(examples(WAN), tmp_path / "store", block_size=3, trainer=trainer)
    return collector, store


def features(model, timesteps=ALL, **settings):
    collector = GradientCollector(model, BlockCyclic(256), timesteps, **settings)
    encoded = model.encode(collate(examples(WAN).examples))
    return collector, collector.features(*encoded, ["a", "b", "c"])


def test_frames_that_the_autoencoder_does_not_take_are_refused_with_the_nearest():
    for frames, near in ((4, "=5"), (7, "=5 or 9")):
        clip = Example("a", torch.rand(3, frames, 32, 32), caption="cat")
        with pytest.raises(DminError, match=rf"'a' has {frames} frames.* data\.frames{near}\."):
            load("wan").encode(collate([clip]))
    with pytest.raises(DminError, match=r"sample_frames=5 or 9"):
        load("wan", sample_frames=6)


def test_clips_are_refused_by_models_of_images():
    clip = Example("a", torch.rand(3, 5, 16, 16), caption="cat")
    with pytest.raises(DminError, match=r"'a' is a clip, but Flux is trained on images.*model=wan"):
        load("flux").encode(collate([clip]))


def test_an_image_is_encoded_as_ever_and_a_clip_begins_with_it():
    model = load("wan")
    clip = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"id": ["a"], "caption": ["cat"], "metadata": [{}]}
    still = model.encode({**batch, "image": clip[:, :, 0]})[0]
    moving = model.encode({**batch, "image": clip})[0]
    assert still.shape == (1, 4, 4, 4) and moving.shape == (1, 4, 2, 4, 4)
    torch.testing.assert_close(moving[:, :, 0], still)  # the encoder is causal


def test_a_field_of_noise_has_frames_of_which_the_first_is_an_images():
    noise = SharedNoise(shapes="field")
    clip = noise((4, 3, 10, 12), 5.0)
    assert torch.equal(clip[:, 0], noise((4, 10, 12), 5.0))
    assert torch.equal(clip[:, :2], noise((4, 2, 10, 12), 5.0))
    assert torch.equal(clip[:, :, 1:-1, 1:-1], noise((4, 3, 8, 10), 5.0))
    assert (clip[:, 1] - clip[:, 0]).abs().min() > 0


def test_the_loss_of_a_timestep_is_that_of_its_network():
    model = load("wan_2_2")
    x0, noise, _, condition = inputs(model, WAN)
    t = torch.tensor([600.0, 599.9, 20.0])
    together = model.predict(x0, noise, t, condition).prediction
    first, second = model.pipeline.transformer, model.pipeline.transformer_2
    sigma = (t / 1000).view(-1, 1, 1, 1, 1)
    noised, told = (1 - sigma) * x0 + sigma * noise, condition["encoder_hidden_states"]
    for row, network in enumerate((first, second, second)):
        one = slice(row, row + 1)
        alone = network(noised[one], timestep=t[one], encoder_hidden_states=told[one])[0]
        torch.testing.assert_close(together[one], alone)
    assert model.unused_at(600.0) == ("transformer_2.",)
    assert model.unused_at(599.9) == ("transformer.",)


def test_rows_of_the_other_network_are_zero_by_declaration(tmp_path):
    model = load("wan_2_2")
    groups = {"high": r"transformer\.", "low": r"transformer_2\."}
    collector, store = collected(tmp_path, model, groups=groups, microbatch=4)
    assert not collector.ownership._routed  # passes hold timesteps of one network
    norms = torch.from_numpy(store.norms("loss"))[:, 0]  # [rows, timestep, group]
    alone = features(model, groups=groups, microbatch=1)[1]
    torch.testing.assert_close(alone.norms["loss"][:, 0], norms)
    assert (norms[:, :2, 0] > 0).all() and not norms[:, :2, 1].any()
    assert (norms[:, 2:, 1] > 0).all() and not norms[:, 2:, 0].any()
    x0, condition = model.encode(collate(examples(WAN).examples))
    made = collector.inputs(x0, condition, ["a", "b", "c"])
    for pair in range(4, 8):
        one = made.at(torch.tensor([pair]))
        true = by_autograd(model, collector.attributed.by_name, one, "loss")
        norm = torch.stack([g.square().sum() for g in true.values()]).sum().sqrt()
        found = norms[pair // 4, pair % 4].square().sum().sqrt()
        assert abs(float(found / norm) - 1) < 1e-5


def test_one_of_the_networks_can_be_attributed_alone():
    model, settings = load("wan_2_2"), {"params": r"transformer_2\..*"}
    collector, rows = features(model, **settings)
    norms = rows.norms["loss"][:, 0, :, 0]
    assert not norms[:, :2].any() and (norms[:, 2:] > 0).all() and (rows.losses > 0).all()
    assert not rows.values["loss"][:, 0, :2].any()
    found = diagnose(collector, examples(WAN), 3)
    assert found.passed, [c for c in found.checks if not c.passed]
    with pytest.raises(DminError, match=r"no timestep of \[900.*timesteps=explicit"):
        features(model, Explicit(HIGH), **settings)


def test_passes_hold_timesteps_of_one_network():
    collector = GradientCollector(load("wan_2_2"), BlockCyclic(256), ALL)
    x0 = torch.zeros(3, 4, 2, 4, 4)
    groups = collector.networks.together(collector.inputs(x0, {}, ["a", "b", "c"]))
    assert [g.tolist() for g in groups] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_gradients_of_both_networks_are_autograds():
    model = load("wan_2_2")
    x0, noise, t, condition = inputs(model, WAN)
    collector = GradientCollector(model, BlockCyclic(256))
    found = compare(model, collector.attributed, NoisedBatch(x0, noise, t, condition), "loss")
    assert max(found.errors().values()) <= 1e-5 and found.mixing() <= 1e-5


def test_a_boundary_that_is_wrong_is_found_by_the_sampler():
    model = copy.copy(load("wan_2_2"))
    assert sampling_error(model) <= 3e-3
    model.boundary = 950.0
    assert not sampling_error(model) <= 0.1
    assert model.describe() != load("wan_2_2").describe()


def test_activations_of_both_are_recomputed():
    model = load("wan_2_2")
    plain = features(model)[1]
    with gradient_checkpointing(model.network, True):
        assert all(n.is_gradient_checkpointing for n in model.networks.values())
        again = features(model)[1]
    assert not any(n.is_gradient_checkpointing for n in model.networks.values())
    torch.testing.assert_close(plain.norms["loss"], again.norms["loss"], rtol=1e-5, atol=0)


def test_the_planted_clip_is_found_first_from_files(tmp_path):
    for number, example in enumerate(examples(WAN).examples):
        name = tmp_path / f"clips/{number}.webp"
        save_images(name.parent, example.image[None], [name.name], [{}], append=True)
        name.with_suffix(".txt").write_text(example.caption)
    (tmp_path / "clips/metadata.jsonl").unlink()
    data = VideoFolder(tmp_path / "clips", frames=5)
    collector = GradientCollector(load("wan_2_2"), BlockCyclic(256), Explicit([700.0, 20.0]))
    options = {"trainer": predict_trainer(accelerator="cpu", enable_progress_bar=False)}
    train = collector.collect(data, tmp_path / "train", **options)
    planted = Clips(tmp_path / "clips/1.webp", frames=5)
    asked = collector.collect(planted, tmp_path / "asked", as_queries=True, **options)
    found = retrieve(asked, train, k=2)
    assert found.train_ids[0][0] == "1.webp" and found.scores[0, 0] > 2 - 1e-5


def test_what_both_take_is_told_before_their_weights_are_read():
    with without_weights():
        model = load_fresh()
    collector = GradientCollector(model, BlockCyclic(256), ALL)
    size = predict_size(collector, examples(WAN).examples[0], 3, torch.device("cpu"))
    assert size.parameters == sum(p.numel() for p in load("wan_2_2").network.parameters())
    assert size.kept_bytes > 0 and size.operations > 0


def test_each_network_gets_its_own_adapter(tmp_path):
    files = {}
    for name, network in copy.deepcopy(load("wan_2_2").networks).items():
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        state = get_peft_model_state_dict(network)
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_file({f"transformer.{key}": value for key, value in state.items()}, files[name])
    model = load_fresh(adapter=files)
    assert {n.partition(".")[0] for n, m in model.network.named_modules() if "to_q" in n} == {
        *files
    }
    assert (features(model, params=".*lora.*")[1].norms["loss"] > 0).all()
    told = model.describe()["adapters"]
    assert told.keys() == files.keys() and told["transformer"]["default"]["r"] == 2
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/lora/transformer_2/default/transformer_2.safetensors").is_file()
    alone = load_fresh(adapter={"transformer_2": files["transformer_2"]})
    assert not any("lora" in n for n, _ in alone.pipeline.transformer.named_parameters())
    for wrong in (files["transformer"], {"unet": files["transformer"]}):
        match = (
            r"model\.adapter=.*Say which .*: model\.adapter=\{transformer: FILE, transformer_2: F"
        )
        with pytest.raises(DminError, match=match):
            load_fresh(adapter=wrong)
    with pytest.raises(DminError, match=r"model\.ema=.*no network of this checkpoint"):
        load_fresh(ema="some.safetensors")


def load_fresh(**settings):
    return WAN.model.from_pretrained(checkpoint("wan_2_2"), **WAN.settings, **settings)


def test_a_checkpoint_of_half_of_it_is_refused():
    whole = load("wan_2_2").pipeline
    for changes in ({"transformer": None}, {"transformer_2": None}):
        half = copy.copy(whole)
        for name, value in changes.items():
            setattr(half, name, value)
        with pytest.raises(DminError, match=r"boundary_ratio=0\.6.*Give a complete checkpoint"):
            WAN.model(half)


def test_processes_that_share_the_networks_do_not_share_out_their_timesteps():
    class Two:
        world_size = 2

    networks = GradientCollector(load("wan_2_2"), BlockCyclic(256), ALL).networks
    with pytest.raises(
        DminError, match=r"trainer=fsdp: the model has two networks.*trainer=offload"
    ):
        LockstepPasses(Two(), 1, 4, networks)
    LockstepPasses(Two(), 1, 4, GradientCollector(load("wan"), BlockCyclic(256), ALL).networks)
