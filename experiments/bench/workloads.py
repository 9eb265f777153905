"""The networks of the bench, with random weights, and one batch for each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4


@dataclass
class Workload:
    """A network and the arguments and target of one batch."""

    network: nn.Module
    arguments: dict[str, Any]
    target: Tensor
    params: str = "all"

    def losses(self, examples: slice = slice(None)) -> Tensor:
        """One value an example: the mean squared error."""
        some = {name: x[examples] for name, x in self.arguments.items()}
        prediction = self.network(**some, return_dict=False)[0]
        return (prediction - self.target[examples]).square().flatten(1).mean(1)


def ddpm_cifar() -> Workload:
    """The UNet of DDPM for CIFAR-10 (Ho et al. 2020) as diffusers publishes it."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    x = torch.randn(BATCH, 3, 32, 32)
    return Workload(network, {"sample": x, "timestep": times()}, torch.randn_like(x))


def sd_unet() -> Workload:
    """Stable Diffusion 1.x's UNet at half its width, on 32 × 32 latents."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(160, 320, 640, 640),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    x = torch.randn(BATCH, 4, 32, 32)
    arguments = {"sample": x, "timestep": times()}
    arguments["encoder_hidden_states"] = torch.randn(BATCH, 77, 768)
    return Workload(network, arguments, torch.randn_like(x))


def mmdit() -> Workload:
    """Two joint blocks of SD3-medium at full width: 256 image and 77 text tokens."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=64,
    )
    x = torch.randn(BATCH, 16, 32, 32)
    arguments = {"hidden_states": x, "timestep": times().float()}
    arguments["encoder_hidden_states"] = torch.randn(BATCH, 77, 4096)
    arguments["pooled_projections"] = torch.randn(BATCH, 2048)
    return Workload(network, arguments, torch.randn_like(x))


def mmdit_lora() -> Workload:
    """The same with adapters of rank 4 at its attention, which alone are attributed."""
    from peft import LoraConfig

    workload = mmdit()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    targets += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    workload.network.add_adapter(config)
    for parameter in workload.network.parameters():
        parameter.requires_grad_(True)  # plain training is that of the whole network
    workload.params = "lora"
    return workload


def times() -> Tensor:
    return torch.randint(0, 1000, (BATCH,))


WORKLOADS = {"ddpm_cifar": ddpm_cifar, "sd_unet": sd_unet, "mmdit": mmdit, "mmdit_lora": mmdit_lora}


def build(name: str) -> Workload:
    """Return a workload, the same each time."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    for parameter in workload.network.parameters():
        if not parameter.any():  # what starts at zero would block gradients
            nn.init.normal_(parameter, std=0.02)
    return workload
