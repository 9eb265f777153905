"""Layers with adapters, whose parameters are the file's own factors."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dmin.models.adapters.formulas import MAGNITUDE, difference

_STEPS = ("stride", "padding", "dilation")


class Place(NamedTuple):
    """The layer of the network that a module of a file, or a part of it, belongs to.

    Args:
        path: dotted name of the layer.
        start: first output row of this layer in the file's module; the other rows belong to layers
            that the trainer had joined with it.
        rows: number of rows; None for all.
        halves: whether the two halves of its rows are swapped.
    """

    path: str
    start: int = 0
    rows: int | None = None
    halves: bool = False

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Return this layer's part of the output of the file's module."""
        if self.rows is not None:
            x = x.narrow(dim, self.start, self.rows)
        return x.roll(x.shape[dim] // 2, dim) if self.halves else x


@dataclass
class Delta:
    """The output change of a module of a file, ``s ΔW x``.

    Args:
        layers: layers in the order of the computation, by the names of their weights.
        scale: s.
    """

    layers: Mapping[str, nn.Module]
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``s ΔW x``."""
        for layer in self.layers.values():
            x = layer(x)
        return self.scale * x


@dataclass
class Kronecker(Delta):
    """``s (w1 ⊗ w2) x``: w2 along the inner part of the channels, then w1 along the outer part.

    Args:
        outer: names of the layers that act along the outer part, in order.
        width: size of the outer part of the input channels.
        dim: axis of the channels.
    """

    outer: Sequence[str]
    width: int
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``s (w1 ⊗ w2) x``."""
        outside = self.dim if self.dim > 0 else self.dim - 1
        y = x.unflatten(self.dim, (self.width, -1))
        if self.dim > 0:  # treat each outer channel as a separate image
            y = y.flatten(0, 1)
        for name, layer in self.layers.items():
            if name == self.outer[0]:
                y = y.unflatten(0, (len(x), self.width)) if self.dim > 0 else y
                y = y.movedim(outside, -1)
            y = layer(y)
        return self.scale * y.movedim(-1, outside).flatten(outside, outside + 1)


class Hadamard(nn.Module):
    """``((w1_a·w1_b) ∘ (w2_a·w2_b)) x``, with the weight formed.

    Args:
        tensors: the tensors of the file.
        base: the adapted layer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], base: nn.Module) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name.removeprefix("hada_"), nn.Parameter(tensor))
        self._shape = tuple(weight_of(base).shape)
        self._function, self._settings = F.linear, {}
        if isinstance(base, _ConvNd):
            self._function = getattr(F, f"conv{len(base.kernel_size)}d")
            self._settings = {name: getattr(base, name) for name in _STEPS}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``ΔW x``."""
        own = {f"hada_{name}": parameter for name, parameter in self._parameters.items()}
        weight = difference(own, self._shape[2:]).reshape(self._shape)  # type: ignore[arg-type]
        return self._function(x, weight, None, **self._settings)


class Magnitude(nn.Module):
    """Scales channels by ``m/n``: DoRA, in which the norms n are treated as constants.

    Args:
        weight: m, as in the file; layers that the trainer had joined share it.
        norm: n of this layer's channels.
        place: the rows of the file that belong to these channels.
        dim: axis of the channels.
    """

    norm: Tensor

    def __init__(self, weight: nn.Parameter, norm: Tensor, place: Place, dim: int) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("norm", norm, persistent=False)  # determined by the weights
        self.place = place
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(m/n) ∘ x``."""
        ratio = self.place.take(self.weight.flatten(), 0) / self.norm
        return x * ratio.reshape(-1, *[1] * (0 if self.dim < 0 else x.ndim - 2))


@dataclass
class Change:
    """The change of a layer's output by one adapter.

    ``s ΔW x``; with magnitudes of outputs ``(m/n) (W + s ΔW) x − W x``, with magnitudes of inputs
    ``(W + s ΔW) (m/n) x − W x`` (DoRA: Liu et al. 2024, arXiv 2402.09353).
    """

    delta: Delta
    place: Place
    dim: int
    magnitude: Magnitude | None = None
    of_inputs: bool = False

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Return the layers that hold its parameters."""
        own = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {**self.delta.layers, **own}

    def __call__(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return the change of the base layer's output y for input x."""
        if self.magnitude is None:
            return self.place.take(self.delta(x), self.dim)
        if self.of_inputs:
            x = self.magnitude(x)
            return base(x) + self.place.take(self.delta(x), self.dim) - y
        bias: Any = base.bias
        if bias is not None:
            y = y - bias.reshape(-1, *[1] * (0 if self.dim < 0 else y.ndim - 2))
        return self.magnitude(y + self.place.take(self.delta(x), self.dim)) - y


class Adapted(nn.Module):
    """A layer with adapters.

    The layers of an adapter ``default`` have the names ``lora_A.default`` and so on, as in peft.

    Args:
        base_layer: the layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._changes: dict[str, Change] = {}

    def add(self, name: str, change: Change) -> None:
        """Add a change."""
        for factor, layer in change.layers.items():
            if factor not in self._modules:
                self.add_module(factor, nn.ModuleDict())
            holder: Any = self._modules[factor]
            holder[name] = layer
        self._changes[name] = change

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the base layer, such as its width."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with all changes."""
        y = self.base_layer(x)
        return sum((change(x, y, self.base_layer) for change in self._changes.values()), y)


def built(tensors: Mapping[str, Tensor], base: nn.Module, scale: float) -> Delta:
    """Return the layers that compute ``s ΔW x`` with the tensors of a file as their weights.

    Args:
        tensors: tensors of one module as in the file, without magnitude.
        base: an adapted layer.
        scale: s.
    """
    dim = 1 if isinstance(base, _ConvNd) else -1

    def layer(name: str, kernel: bool = False, transposed: bool = False) -> nn.Module:
        tensor = tensors[name].T if transposed else tensors[name]
        return _layer(tensor, base if isinstance(base, _ConvNd) else None, kernel)

    if "lora_diff" in tensors:
        return Delta({"lora_diff": _whole(base, tensors)}, scale)
    if "lora_A" in tensors:
        names = [name for name in ("lora_A", "lora_mid", "lora_B") if name in tensors]
        return Delta({n: layer(n, kernel=n == names[-2]) for n in names}, scale)
    if "hada_w1_a" in tensors:
        return Delta({"hada": Hadamard(tensors, base)}, scale)
    if "lokr_w2" in tensors:
        inner = {"lokr_w2": layer("lokr_w2", kernel=True)}
    elif "lokr_t2" in tensors:
        inner = {
            "lokr_w2_b": layer("lokr_w2_b"),
            "lokr_t2": layer("lokr_t2", kernel=True),
            "lokr_w2_a": layer("lokr_w2_a", transposed=True),
        }
    else:
        inner = {"lokr_w2_b": layer("lokr_w2_b", kernel=True), "lokr_w2_a": layer("lokr_w2_a")}
    outer = ["lokr_w1"] if "lokr_w1" in tensors else ["lokr_w1_b", "lokr_w1_a"]
    layers = {**inner, **{name: _layer(tensors[name], None) for name in outer}}
    return Kronecker(layers, scale, outer, tensors[outer[0]].shape[1], dim)


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer."""
    weight: Any = layer.weight
    return weight


def _whole(base: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a layer like the base layer with weight differences as its weights."""
    found: Any
    if isinstance(base, nn.Linear | _ConvNd):
        like = base if isinstance(base, _ConvNd) else None
        found = _layer(tensors["lora_diff"], like, kernel=True)
    else:
        found = copy.deepcopy(base)
        found.weight = nn.Parameter(tensors["lora_diff"])
    bias = tensors.get("lora_diff_b")
    found.bias = None if bias is None else nn.Parameter(bias)
    return found


def _layer(tensor: Tensor, like: _ConvNd | None, kernel: bool = False) -> nn.Module:
    """Return a layer with a weight: linear, or a convolution like another, perhaps 1 × 1."""
    found: nn.Module
    if like is None:
        tensor = tensor.flatten(1)
        found = nn.Linear(tensor.shape[1], len(tensor), bias=False, device="meta")
    else:
        size = like.kernel_size if kernel else (1,) * len(like.kernel_size)
        tensor = tensor.reshape(len(tensor), -1, *size)
        settings = {name: getattr(like, name) for name in _STEPS} if kernel else {}
        kind = getattr(nn, f"Conv{len(size)}d")
        found = kind(tensor.shape[1], len(tensor), size, bias=False, device="meta", **settings)
    found.weight = nn.Parameter(tensor.contiguous())
    return found
