"""Per-example gradients of diffusers' own layers against autograd."""

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm, RMSNorm

from dmin.gradients.layers import layer_gradient
from dmin.models import latent  # noqa: F401  (registers them)

LAYERS = {
    "rms_norm": lambda: RMSNorm(6, eps=1e-5),
    "rms_norm with bias": lambda: RMSNorm(6, eps=1e-5, bias=True),
    "fp32_layer_norm": lambda: FP32LayerNorm(6, eps=1e-6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_autograd(name):
    torch.manual_seed(0)
    layer, a = LAYERS[name](), torch.randn(3, 4, 6)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    d = torch.randn(3, 4, 6)
    found = layer_gradient(layer)(layer, a, d, 3)
    for key, parameter in layer.named_parameters():
        for example in range(3):
            (expected,) = torch.autograd.grad(layer(a[[example]]), parameter, d[[example]])
            torch.testing.assert_close(found[key].dense()[example], expected)
