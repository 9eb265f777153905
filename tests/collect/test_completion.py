"""No pass waits for the device: on one that has no numbers at all, whoever asks for some fails."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector
from dmin.diffusion.timesteps import Stratified
from dmin.diffusion.variance import _Step
from dmin.gradients.ownership import Trial
from dmin.models.families.ddpm import DDPM
from dmin.runtime.transfer import to_device, to_host
from dmin.sketches import (
    OPORP,
    SJLT,
    Auto,
    BlockCyclic,
    Factored,
    FullGradient,
    Gaussian,
    MaskSJLT,
    TensorSketch,
)

SKETCHES = {
    "auto": lambda: Auto(256, from_size=64, from_kernel=1 << 8),
    "block_cyclic": lambda: BlockCyclic(256),
    "tensor_sketch": lambda: TensorSketch(256),
    "oporp": lambda: OPORP(256),
    "sjlt": lambda: SJLT(256),
    "mask_sjlt": lambda: MaskSJLT(256, keep=2000),
    "factored": lambda: Factored(256),
    "gaussian": lambda: Gaussian(16),
    "none": FullGradient,
}


class Hasty(TorchDispatchMode):
    """Refuses copies between devices, but those that `sent` has under way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not (kwargs or {}).get("non_blocking", args[2:3] == (True,))
            if waits and source.ndim and source.device != found.device:
                raise AssertionError(f"a copy from {source.device} to {found.device} is waited for")
        return found


@pytest.mark.parametrize("name", SKETCHES)
def test_a_pass_asks_the_device_for_nothing(name):
    # Layers of every kind, few of each: every operation without numbers goes through Python.
    one_level = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    away = DDPM.build({**TINY_UNET, **one_level, "block_out_channels": [8]}, {}).eval()
    away.network.to("meta")
    readouts = ("loss", "mean_output") if name == "auto" else ("loss",)
    collector = GradientCollector(away, SKETCHES[name](), Stratified(2), readouts=readouts)
    x0 = torch.empty(3, *away.shape, device="meta")
    condition = {"class_labels": torch.zeros(3, dtype=torch.long, device="meta")}
    inputs = collector.inputs(x0, condition, ["a", "b", "c"])
    rows = Trial()  # finding out whose rows are whose asks, but once
    collector.run(inputs.at(torch.arange(4)), rows)  # what is made once may be sent once
    with Hasty():
        inputs = collector.inputs(x0, condition, ["a", "b", "c"])
        found = collector.run(inputs.at(torch.arange(4)), rows)
    assert found.values["loss"].shape == (4, 1, collector.sketch.dim)


def test_a_learned_variance_asks_for_nothing(ddpm):
    t = torch.tensor([3, 0, 999])
    x = torch.randn(3, 1, 2, 2)
    betas = ddpm.scheduler.betas
    with Hasty():
        away = _Step.at(t.to("meta", non_blocking=True), betas, x.to("meta", non_blocking=True))
    here = _Step.at(t, betas, x)
    assert [a.shape for a in away] == [h.shape for h in here]
    bar = torch.cumprod(1 - betas.double(), 0)
    torch.testing.assert_close(here.alpha_bar.flatten(), bar[t].float())


def test_the_guard_sees_what_waits():
    x = torch.empty(2, device="meta")
    with pytest.raises(Exception, match="meta"):
        x.sum().item()
    with pytest.raises(Exception, match="meta"):
        bool((x > 0).any())
    with Hasty(), pytest.raises(AssertionError, match="a copy from cpu to meta is waited for"):
        torch.zeros(2).to("meta")


def test_what_is_sent_and_fetched_is_the_same():
    x = torch.arange(5.0)
    assert torch.equal(to_device(x, torch.device("cpu")), x)
    assert all(map(torch.equal, to_host([x, 2 * x])(), [x, 2 * x]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SKETCHES)
def test_a_gpu_is_not_waited_for(name, ddpm):
    away = copy.deepcopy(ddpm)
    away.network.to("cuda")
    collector = GradientCollector(away, SKETCHES[name](), Stratified(2))
    x0 = torch.randn(3, *ddpm.shape).cuda()
    condition = {"class_labels": torch.zeros(3, dtype=torch.long).cuda()}

    def block():
        inputs = collector.inputs(x0, condition, ["a", "b", "c"])
        return collector.passes(inputs, 4, collector.run).to_host()

    block()()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wait = block()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(wait().values["loss"]).all()
