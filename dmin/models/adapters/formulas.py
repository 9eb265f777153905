"""The formulas of each kind of adapter: what its tensors add to the weight of a layer."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LEFT = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_RIGHT = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
# The tensors of a module → the kind of adapter. Any kind may also have a magnitude.
KINDS: dict[frozenset[str], str] = {
    frozenset({"lora_A", "lora_B"}): "LoRA",
    frozenset({"lora_A", "lora_mid", "lora_B"}): "LoCon, Tucker",
    frozenset(_HADA): "LoHa",
    frozenset({*_HADA, "hada_t1", "hada_t2"}): "LoHa, Tucker",
    frozenset({"lora_diff"}): "whole",
    frozenset({"lora_diff", "lora_diff_b"}): "whole",
    **{frozenset(left + right): "LoKr" for left, right in product(_LEFT, _RIGHT)},
}
MAGNITUDE = "lora_magnitude_vector"


def difference(tensors: Mapping[str, Tensor], kernel: Sequence[int] = ()) -> Tensor:
    """Return ΔW before its scale, differentiable in the tensors.

    LoRA: ``B·A``; LoHa: ``(w1_a·w1_b) ∘ (w2_a·w2_b)``; LoKr: ``w1 ⊗ w2``, each a matrix or a
    product of two. Tucker forms have ``Σ_ij core[i, j, …] out[i, p] in[j, q]`` for a product.

    Args:
        tensors: tensors of one module, by the names of :data:`KINDS`, in the shapes of its file.
        kernel: kernel size of the adapted convolution; empty for a linear layer.

    Returns:
        ``[out, in, *kernel]``; for LoHa without Tucker form ``[out, in · Π kernel]``.

    Raises:
        RuntimeError: the shapes of the tensors do not match.

    Source: Hu et al. 2022 (arXiv 2106.09685), Hyeon-Woo et al. 2022 (arXiv 2108.06098), Yeh et al.
        2024 (arXiv 2309.14859).
    """
    if "lora_A" in tensors:
        down, up = tensors["lora_A"], tensors["lora_B"]
        if "lora_mid" in tensors:
            return _tucker(tensors["lora_mid"], up.flatten(1).T, down.flatten(1))
        return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    if "hada_w1_a" in tensors:
        return _half(tensors, "1") * _half(tensors, "2")
    left = tensors.get("lokr_w1")
    left = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if left is None else left
    right = tensors.get("lokr_w2")
    if "lokr_t2" in tensors:
        right = _tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    elif right is None:
        right = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"].flatten(1)
    right = right.reshape(len(right), right[0].numel() // prod(kernel), *kernel)
    return torch.kron(left.reshape(*left.shape[:2], *[1 for _ in kernel]), right.contiguous())


def rank(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank, which divides α; None for LoKr of two full matrices, which has no scale."""
    for name in ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return len(tensors[name])
    return None


def _half(tensors: Mapping[str, Tensor], number: str) -> Tensor:
    a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    core = tensors.get(f"hada_t{number}")
    return a @ b if core is None else _tucker(core, a, b)


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    return torch.einsum("ij...,ip,jq->pq...", core, out, into)
