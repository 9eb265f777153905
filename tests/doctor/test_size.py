"""What a model is said to take before its weights are read is what it takes when they are there."""

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from command_line import dmin
from models.families import EVERY
from models.tiny import save
from PIL import Image
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dmin.cli.commands.doctor import predicted_size
from dmin.collect import GradientCollector
from dmin.data import Example
from dmin.data.base import Sizes, collate
from dmin.doctor.size import COUNTED, Size, predict_size
from dmin.models.checkpoints import without_weights
from dmin.runtime.errors import DminError

SAMPLE = ("stable_diffusion_xl", "qwen_image", "flux_fill")
ASKED = list(EVERY) if os.environ.get("DMIN_CONFORMANCE") else SAMPLE
GIB = 2**30


def example(model, size):
    shown = torch.rand(1, size, size).expand(3, -1, -1)
    given = shown if model.reads_condition_images({}) else None
    return Example(
        "a",
        torch.rand(3, size, size),
        3,
        "a red cat",
        {},
        Sizes((size,) * 2, (0, 0)),
        condition_image=given,
    )


def measured(collector, one):
    """The bytes that autograd really keeps of a pass, and its operations, on the CPU."""
    model, kept = collector.model, {}
    own = {
        x.untyped_storage().data_ptr()
        for x in (*model.network.parameters(), *model.network.buffers())
    }

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    for name, p in model.network.named_parameters():
        p.requires_grad_(name in collector.attributed.by_name)
    with torch.no_grad():
        x0, condition = model.encode(collate([one]))
    batch = collector.inputs(x0, condition, ["a"]).at(torch.arange(1))
    with (
        saved_tensors_hooks(keep, lambda t: t),
        FlopCounterMode(display=False, custom_mapping=COUNTED) as counted,
    ):
        model.predict(*batch)
    return sum(s.nbytes() for s in kept.values()), counted.get_total_flops()


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in ASKED), ("stable_diffusion", {"embeddings": "word.safetensors"})],
    ids=lambda each: "words" if each == {"embeddings": "word.safetensors"} else str(each),
)
def test_shapes_alone_tell_what_the_weights_take(name, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"emb_params": torch.randn(1, 16)}, "word.safetensors")  # its encoder is in the pass
    family = EVERY[name]
    save(name, tmp_path / "m")
    with without_weights():
        bare = family.model.from_pretrained(tmp_path / "m", **family.settings, **more)
    assert all(p.is_meta for p in bare.network.parameters())
    whole = family.model.from_pretrained(tmp_path / "m", **family.settings, **more)
    one = example(whole, family.size)
    said = predict_size(GradientCollector(bare), one, 10, torch.device("cpu"))
    kept, operations = measured(GradientCollector(whole), one)
    assert said.network_bytes == sum(p.nbytes for p in whole.network.parameters()) + sum(
        b.nbytes for b in whole.network.buffers()
    )
    assert said.operations == operations
    assert said.kept_bytes == pytest.approx(kept, rel=0.1)
    assert said.all_pairs == 100 and said.seconds > 0


def size(weights, kept, free, pairs=64):
    return Size("Net", 1, int(weights * GIB), 0, int(kept * GIB), pairs, 1, 1, int(free * GIB), 1.0)


CHECKPOINTED = "collect.gradient_checkpointing=true collect.microbatch=1"
OFFLOADED = "trainer=offload collect.microbatch=1"


@pytest.mark.parametrize(
    ("found", "dtype", "remedies"),
    [
        (size(1, 0.1, 24), torch.float32, []),
        (size(4, 1, 24), torch.bfloat16, ["collect.microbatch=20", CHECKPOINTED]),
        (
            size(44, 1, 24),
            torch.float32,
            [
                "model.torch_dtype=bfloat16 collect.microbatch=4",
                OFFLOADED,
                "trainer=fsdp trainer.devices=2 collect.microbatch=1",
            ],
        ),
        (
            size(22, 39, 20),  # what one pair keeps is more than there is
            torch.bfloat16,
            [f"trainer=offload {CHECKPOINTED}", f"trainer=fsdp trainer.devices=3 {CHECKPOINTED}"],
        ),
    ],
)
def test_what_makes_it_fit_is_named(found, dtype, remedies):
    assert found.remedies(dtype, True) == remedies


def test_the_command_says_it_before_the_weights_are_read(tmp_path):
    save("flux", tmp_path / "m")
    for file in (tmp_path / "m" / "transformer").glob("*.safetensors"):
        file.write_bytes(b"")  # so that reading them fails
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text("a red cat")
    line = ["doctor", "model=auto", "model.path=m", "model.max_sequence_length=12"]
    run = dmin(*line, "data=image_folder", "data.root=images", cwd=tmp_path, ok=False)
    before, _, after = run.stdout.partition("total")
    assert "24,432 parameters" in before and "activations of a pair" in before
    assert "fits" in after and "cannot load" in run.stdout + run.stderr


@pytest.mark.parametrize("error", [RuntimeError("no number"), DminError("taken for bad")])
def test_what_cannot_be_predicted_stops_no_examination(error, monkeypatch):
    def fail(*_):
        raise error

    said, network = [], SimpleNamespace(parameters=lambda: [torch.empty(1, device="meta")])
    model = SimpleNamespace(network=network)
    monkeypatch.setattr("dmin.doctor.size.predict_size", fail)
    monkeypatch.setattr("dmin.cli.commands.doctor.build", lambda _: model)
    work = MagicMock()
    work.notes.print = said.append
    assert predicted_size(work) is None and str(error) in said[0]
