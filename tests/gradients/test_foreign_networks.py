"""Networks of diffusers that are no family here: lists of examples, experts, rows by length."""

import pytest
import torch
from oracle import Keep, error, one_at_a_time, settled
from torch import nn

import dmin.models.normalization  # noqa: F401  (closed forms of diffusers' layers)
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import choose_parameters

BATCH = 4


def z_image():
    """Takes and returns a list with one tensor an example, and captions of their own lengths."""
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32},
        **{"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
    )
    captions = [torch.randn(5 + 3 * (i % 2), 16).double() for i in range(BATCH)]
    inputs = {"x": torch.randn(BATCH, 16, 1, 8, 8), "t": torch.rand(BATCH)}

    def run(network, x, t, which):
        captioned = [captions[int(i)] for i in which]
        return torch.stack(network(list(x), t, captioned, return_dict=False)[0])

    return network, inputs, run


def hidream():
    """Sends tokens to experts that their numbers choose."""
    from diffusers import HiDreamImageTransformer2DModel

    network = HiDreamImageTransformer2DModel(
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1},
        **{"num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4},
        **{"caption_channels": [32, 16], "text_emb_dim": 8, "axes_dims_rope": (4, 2, 2)},
        **{"max_resolution": (32, 32), "llama_layers": (0, 1)},
    )
    inputs = {"x": torch.randn(BATCH, 4, 8, 8), "t": 1000 * torch.rand(BATCH)}
    inputs |= {"t5": torch.randn(BATCH, 4, 32), "llama": torch.randn(BATCH, 2, 4, 16)}
    inputs["pooled"] = torch.randn(BATCH, 8)

    def run(network, x, t, t5, llama, pooled, which):
        return network.train()(  # in eval mode its experts run without gradients
            hidden_states=x,
            timesteps=t,
            encoder_hidden_states_t5=t5,
            encoder_hidden_states_llama3=llama.transpose(0, 1),
            pooled_embeds=pooled,
            return_dict=False,
        )[0]

    return network, inputs, run


def lumina2():
    """Refines the tokens of captions by their lengths, which a mask tells."""
    from diffusers import Lumina2Transformer2DModel

    network = Lumina2Transformer2DModel(
        **{"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 8},
        **{"num_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16},
        **{"axes_dim_rope": [4, 2, 2], "cap_feat_dim": 8},
    )
    mask = torch.arange(7)[None] < torch.tensor([4, 7, 6, 7])[:, None]
    inputs = {"x": torch.randn(BATCH, 4, 8, 8), "t": torch.rand(BATCH)}
    inputs |= {"caption": torch.randn(BATCH, 7, 8), "mask": mask}

    def run(network, x, t, caption, mask, which):
        return network(x, t, caption, mask, return_dict=False)[0]

    return network, inputs, run


@pytest.mark.parametrize("make", [z_image, hidream, lumina2])
def test_every_example_has_its_own_gradient(make):
    torch.manual_seed(0)
    network, inputs, run = make()
    network = network.double().eval()
    with torch.no_grad():
        for p in network.parameters():  # some are not initialised by their constructors
            p.copy_(torch.randn_like(p) / 5)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    inputs["which"] = torch.arange(BATCH)

    def loss(network: nn.Module, inputs):
        return (run(network, **inputs) - 0.3).flatten(1).square().mean(1)

    truth, ownership = one_at_a_time(network, inputs, loss, BATCH), Ownership()
    for _ in range(2):
        found = settled(
            network,
            Keep(choose_parameters(network)),
            lambda capture: capture.backward(loss(network, inputs)),
            ownership=ownership,
        )
        zeros = {name: torch.zeros_like(g) for name, g in truth.items() if name not in found}
        assert error(found | zeros, truth) <= 1e-5  # diffusers normalises in float32
