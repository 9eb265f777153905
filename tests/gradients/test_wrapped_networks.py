"""Networks that other libraries hooked, wrapped or reparametrised: exact, or refused by name."""

from contextlib import ExitStack

import accelerate
import diffusers.hooks as hooks
import peft
import pytest
import torch
from oracle import captured as by_hooks, error, one_at_a_time
from torch import nn
from torch.nn.utils import parametrizations, prune

import dmin.models.normalization  # noqa: F401  (closed forms of diffusers' layers)
from dmin.models.contract import check_model
from dmin.runtime.errors import DminError

BATCH = 3


def flux():
    torch.manual_seed(0)
    from diffusers import FluxTransformer2DModel

    return (
        FluxTransformer2DModel(
            **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16},
            **{"pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6]},
        )
        .double()
        .eval()
    )


def loss(network, inputs):
    x = inputs["x"]
    text = torch.linspace(-1, 1, 48, dtype=x.dtype).view(1, 3, 16).expand(len(x), 3, 16)
    out = network(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=x.flatten(1)[:, :16],
        timestep=inputs["t"],
        img_ids=torch.arange(24, dtype=x.dtype).view(8, 3) % 3,
        txt_ids=torch.zeros(3, 3, dtype=x.dtype),
        return_dict=False,
    )[0]
    return (out - 0.3).flatten(1).square().mean(1)


def linears(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def hooks_of_all_modules(network, undo):
    before = lambda m, a: (1.1 * a[0], *a[1:]) if isinstance(m, nn.Linear) else None  # noqa: E731
    after = lambda m, a, out: 1.5 * out if isinstance(m, nn.Linear) else None  # noqa: E731
    for handle in (
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ):
        undo.callback(handle.remove)


def gradients_changed_by_hooks(network, undo):
    for m in linears(network):
        m.register_full_backward_hook(
            lambda m, into, out: tuple(None if g is None else 2 * g for g in into)
        )
        m.register_full_backward_pre_hook(lambda m, out: (3 * out[0],))


def layerwise_casting(network, undo):
    network.enable_layerwise_casting(torch.float16, torch.float64)


def prepared(network, undo):
    return accelerate.Accelerator(cpu=True).prepare(network)


def averaged(network, undo):
    return torch.optim.swa_utils.AveragedModel(network)


def pruned(network, undo):
    for m in linears(network):
        prune.random_unstructured(m, "weight", 0.3)


def weight_normalised(network, undo):
    for m in linears(network):
        parametrizations.weight_norm(m)


def remade_by_hooks(network, undo):
    for m in linears(network):
        nn.utils.weight_norm(m)


def adapted(make, **settings):
    def wrap(network, undo):
        config = make(target_modules=["to_q", "to_k"], **settings)
        return peft.get_peft_model(network, config).double().eval()

    wrap.__name__ = f"{make.__name__} {settings}"
    return wrap


WAYS = [
    hooks_of_all_modules,
    gradients_changed_by_hooks,
    layerwise_casting,
    prepared,
    averaged,
    pruned,
    weight_normalised,
    remade_by_hooks,
    adapted(peft.LoraConfig, r=2, init_lora_weights=False, bias="lora_only", lora_dropout=0.3),
    adapted(peft.LoraConfig, r=2, init_lora_weights=False, modules_to_save=["proj_out"]),
    adapted(peft.LoraConfig, r=2, init_lora_weights=False, use_dora=True),
    adapted(peft.IA3Config, init_ia3_weights=False, feedforward_modules=[]),
    adapted(peft.OFTConfig, r=2, oft_block_size=0, init_weights=False),
    adapted(peft.HRAConfig, r=2, init_weights=False),
    adapted(peft.VeraConfig, r=2, init_weights=False),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", WAYS, ids=lambda wrap: wrap.__name__)
def test_what_others_put_around_a_network_is_part_of_its_gradient(wrap):
    network = flux()
    inputs = {"x": torch.randn(BATCH, 8, 4).double(), "t": torch.rand(BATCH).double()}
    with ExitStack() as undo:
        network = wrap(network, undo) or network
        truth = one_at_a_time(network.requires_grad_(True), inputs, loss, BATCH)
        assert error(by_hooks(network, inputs, loss), truth) <= 1e-5  # diffusers' float32 parts


def by_layers(network):
    hooks.apply_group_offloading(network, torch.device("cpu"), offload_type="leaf_level")


def by_models(network):
    accelerate.cpu_offload_with_hook(network, "cpu")


def by_attention(network):
    hooks.apply_pyramid_attention_broadcast(
        network,
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    )


def by_first_block(network):
    hooks.apply_first_block_cache(network, hooks.FirstBlockCacheConfig(threshold=0.2))


OFFLOADING = [lambda network: accelerate.cpu_offload(network, "cpu"), by_models, by_layers]


@pytest.mark.parametrize("wrap", [*OFFLOADING, by_attention, by_first_block])
def test_weights_that_move_and_features_that_stay_are_refused_by_name(wrap):
    model = nn.Module()
    model.network = flux()
    model.predict, model.timesteps = lambda *_: None, range(9, -1, -1)
    check_model(model)
    wrap(model.network)
    with pytest.raises(DminError, match=r"has a hook \(.*without offloading"):
        check_model(model)
