"""Weights as bitsandbytes 0.50.2 and optimum-quanto 0.2.7 keep them, beside what they give back.

``python tests/models/data/make_quantised.py`` where both are installed.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from optimum.quanto import freeze, qfloat8, qint8, quantize
from safetensors.torch import save_file

torch.manual_seed(0)
state = {}
for kind in ("nf4", "fp4"):
    for nested, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        weight, name = torch.randn(10, 33).to(dtype), f"{kind}_{len(state)}"
        packed, told = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        state[f"{name}.weight"] = packed
        state |= {f"{name}.weight.{k}": v for k, v in told.as_dict(packed=True).items()}
        state[f"truth.{name}"] = dequantize_4bit(packed, told)
        state[f"before.{name}"] = weight
weight = torch.randn(5, 12, dtype=torch.float16)
state["llm.weight"], state["llm.SCB"], _ = int8_vectorwise_quant(weight)
state["llm.weight_format"] = torch.tensor(0, dtype=torch.uint8)
state["truth.llm"] = state["llm.weight"].float() * (state["llm.SCB"] / 127)[:, None]
for kind in (qint8, qfloat8):
    net = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Conv2d(3, 4, 3))
    before = [layer.weight.detach().clone() for layer in net]
    quantize(net, weights=kind)
    freeze(net)
    for n, (layer, weight) in enumerate(zip(net, before, strict=True)):
        name = f"{kind.name}_{n}"
        state |= {f"{name}.{k}": v for k, v in layer.state_dict().items() if k != "bias"}
        state[f"truth.{name}"] = layer.weight.dequantize().detach()
        state[f"before.{name}"] = weight
save_file(
    {k: v.contiguous().clone() for k, v in state.items()},
    Path(__file__).with_name("quantised.safetensors"),
)
