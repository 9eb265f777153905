"""What each process of tests/collect/test_fsdp.py runs: collect, with one network for all."""

import json
import sys
from dataclasses import replace

import torch
from models.families import EVERY

from dmin.collect import GradientCollector, predict_trainer
from dmin.collect.fsdp import Sharded
from dmin.data import Example, Examples
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.models.families.ddpm import DDPM
from dmin.sketches import BlockCyclic


def load(name, path):
    if name == "ddpm":
        return DDPM.from_pretrained(path)
    return EVERY[name].model.from_pretrained(path, **EVERY[name].settings)


def examples(name, count, mixed=False):
    """Images that the model takes, none like another; of two shapes if they are mixed."""
    shape = (1, 8, 8) if name == "ddpm" else EVERY[name].shape
    drawn = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    images = [x[..., : shape[1] // 2, :] if mixed and i % 3 else x for i, x in enumerate(drawn)]
    found = [Example(f"x{i}", x, i % 10, f"a cat {i}") for i, x in enumerate(images)]
    if name == "ddpm" or not EVERY[name].model.reads_condition_images({}):
        return Examples(found)
    return Examples([replace(e, condition_image=e.image[:1].expand(3, -1, -1)) for e in found])


def collect(name, model, path, count, strategy="auto", devices=1, mixed=False, **changes):
    noise = SharedNoise(shapes="field" if mixed else "one")
    collector = GradientCollector(
        model, BlockCyclic(256), Stratified(2), noise, microbatch=4, **changes
    )
    trainer = predict_trainer(
        accelerator="cpu", devices=devices, strategy=strategy, enable_progress_bar=False
    )
    options = {"block_size": 4, "dtype": "float32", "trainer": trainer}
    return collector.collect(examples(name, count, mixed), path, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        name, path = job["name"], job["path"]
        model = load(name, job["model"])
        before = {key: value.clone() for key, value in model.network.state_dict().items()}
        network, flags = model.network, [p.requires_grad for p in model.network.parameters()]
        strategy = Sharded(offload=job["offload"])
        collect(name, model, path, job["count"], strategy, job["devices"], **job["changes"])
        assert model.network is network  # the user's model is as it was
        assert [p.requires_grad for p in network.parameters()] == flags
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
