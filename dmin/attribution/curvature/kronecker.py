"""Curvature of each layer as a Kronecker product in its own eigenbasis (EK-FAC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmin.attribution.curvature.functional_loss import FunctionalLoss, Weights
from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.capture import Capture
from dmin.gradients.factors import Correlation, GradientFactors, Outer, Sum, wide
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import Parameters
from dmin.models.base import weight_of_squares
from dmin.models.masked import count_of, predict


@dataclass
class Block:
    """The curvature of one parameter, or of a layer's weight and bias together.

    Attributes:
        left: float64 ``[out, out]``, eigenvectors of the output gradients' second moment, as
            columns; None for a diagonal block.
        right: ``[in, in]`` of the inputs', a one appended where there is a bias.
        values: ``[out, in]``, the second moment of the gradient along each pair; of a diagonal
            block, that of each scalar, of the parameter's shape.
        bias: name of the bias that is part of the block.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor
    bias: str | None = None

    def power(self, gradient: Tensor, damping: float, p: float) -> Tensor:
        """Return ``(F + λ)^{−p} g`` of each, ``[n, out, in]``; λ is damping · mean eigenvalue."""
        shift = damping * self.values.mean()
        # A layer without gradients has nothing to precondition.
        scale = (self.values + torch.where(shift > 0, shift, 1)) ** -p
        if self.left is None or self.right is None:
            return gradient * scale
        return self.left @ ((self.left.T @ gradient @ self.right) * scale) @ self.right.T


class KroneckerCurvature:
    """The GGN of a training loss, layer by layer: EK-FAC (George et al. 2018, arXiv 1806.03884).

    For a layer with inputs a and output gradients d the block is ``Σ (d dᵀ) ⊗ Σ (a aᵀ)`` in its
    eigenbasis, with the exact second moments of the examples' gradients in place of the products of
    eigenvalues. Output gradients are those of targets drawn from the model, not of the data, so
    that the second moment is that of the GGN and not of the empirical Fisher matrix. For a loss
    ``w/P ‖f − y‖²`` they are ``√(2w/P) ξ`` with ξ standard normal.

    ``Linear``, ``Conv1d`` and ``Conv2d`` of one group have such blocks, with their biases; other
    parameters are diagonal, as :attr:`blocks` shows.

    Args:
        loss: of the model.
        parameters: the attributed ones.
        diagonal: give every parameter a diagonal only.
    """

    def __init__(
        self, loss: FunctionalLoss, parameters: Parameters, diagonal: bool = False
    ) -> None:
        self.loss = loss
        self.parameters = parameters
        self.all_diagonal = diagonal
        self.blocks: dict[str, Block] = {}

    @property
    def diagonal(self) -> list[str]:
        """Names of the parameters with a diagonal block only."""
        return [name for name, block in self.blocks.items() if block.left is None]

    def fit(self, pairs: NoisedBatch, examples: float, samples: int, batch: int, seed: int) -> None:
        """Pass over the examples twice: for the eigenvectors, then for the eigenvalues.

        Args:
            pairs: examples at all points, each as often as it counts.
            examples: how many, likewise.
            samples: targets drawn for each pair.
            batch: pairs in one pass.
            seed: key of the targets.
        """
        moments = _Moments(self.parameters)
        if not self.all_diagonal:
            for _ in self._passes(moments, pairs, samples, batch, seed):
                pass
        for name, (left, right, bias) in moments.found.items():
            basis = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
            self.blocks[name] = Block(*basis, torch.zeros(len(left), len(right)).to(left), bias)
        biases = {block.bias for block in self.blocks.values()}
        for entry in self.parameters.entries:
            if entry.name not in self.blocks and entry.name not in biases:
                like = self.loss.weights[entry.name]
                empty = torch.zeros(entry.shape, dtype=torch.float64, device=like.device)
                self.blocks[entry.name] = Block(None, None, empty)
        for _ in self._passes(_Squares(self.parameters, self.blocks), pairs, samples, batch, seed):
            pass
        for block in self.blocks.values():
            block.values /= examples * samples

    def power(self, gradients: Weights, damping: float, p: float) -> Weights:
        """Return ``(F + λ)^{−p} g`` of each row.

        Args:
            gradients: ``[n, *shape]`` by name.
            damping: λ of each block, as a share of its mean eigenvalue.
            p: 1 is the inverse.
        """
        found = {}
        for name, block in self.blocks.items():
            like = gradients[name]
            g = _joined(like.double(), None if block.bias is None else gradients[block.bias])
            solved = block.power(g if block.left is not None else like.double(), damping, p)
            if block.bias is not None:
                found[block.bias] = solved[..., -1].to(like)
                solved = solved[..., :-1]
            found[name] = solved.reshape(like.shape).to(like)
        return found

    def _passes(
        self, sink: _Moments | _Squares, pairs: NoisedBatch, samples: int, batch: int, seed: int
    ) -> Iterable[None]:
        """Backpropagate the drawn output gradients; the sink receives the factors."""
        generator = torch.Generator().manual_seed(seed)
        model, ownership = self.loss.model, Ownership(complete=True)  # sinks add up: none twice
        for piece in pairs.split(batch):
            sink.count = count_of(piece).double()
            for _ in range(samples):
                state = generator.get_state()

                def run(piece: NoisedBatch = piece, state: Tensor = state) -> None:
                    generator.set_state(state)
                    hooks: Capture[None, None] = Capture(model.network, sink, ownership=ownership)
                    with torch.enable_grad(), hooks as capture:
                        found = predict(model, piece)
                        flat = found.prediction.flatten(1)
                        drawn = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
                        weight = weight_of_squares(found) * count_of(piece)
                        scale = (2 * weight / flat.shape[1]).sqrt()[:, None]
                        capture.backward((flat * (scale * drawn.to(flat))).sum(1))

                ownership.expect(len(piece.t), piece.x0.shape[1:])
                ownership.settle(run)
                yield


class _Sum:
    """A sink that sums over all passes, without state of a single pass.

    Attributes:
        count: how often each example of a pass counts, ``[batch]``; output gradients are scaled by
            its square root.
    """

    count: Tensor

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def begin(self, batch: int, like: Tensor, budget: int) -> None:
        """Start a pass."""

    def finish(self, state: None) -> None:
        """End a pass."""


class _Moments(_Sum):
    """Sums the second moments of inputs and output gradients of each layer."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.found: dict[str, tuple[Tensor, Tensor, str | None]] = {}

    def add(self, state: None, name: str, factors: GradientFactors) -> None:
        """Add a weight's factors; other parameters are skipped."""
        pair = _factors(factors)
        if pair is None:
            return
        output, inputs = (x.double().flatten(0, 1) for x in pair)
        counts = self.count.repeat_interleave(len(inputs) // len(self.count))[:, None]
        bias = f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else "bias"
        known = bias if bias != name and bias in self.parameters.by_name else None
        if known is not None:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        left, right = output.T @ output, (counts * inputs).T @ inputs
        if name in self.found:
            left, right = left + self.found[name][0], right + self.found[name][1]
        self.found[name] = left, right, known


class _Squares(_Sum):
    """Sums the squares of every example's gradients in each block's basis."""

    def __init__(self, parameters: Parameters, blocks: Mapping[str, Block]) -> None:
        super().__init__(parameters)
        self.blocks = blocks

    def add(self, state: None, name: str, factors: GradientFactors) -> None:
        """Add the squares; a bias is part of its weight's block."""
        block = self.blocks.get(name)
        if block is None:
            return
        if block.left is None or block.right is None:
            block.values += factors.dense().double().square().sum(0)
            return
        pair = _factors(factors)
        assert pair is not None  # as it was when the moments were added up
        output, inputs = (x.double() for x in pair)
        if block.bias is not None:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        output, inputs = output @ block.left, inputs @ block.right
        if output.shape[1] == 1:  # the square of a product is the product of squares
            block.values += output[:, 0].square().T @ inputs[:, 0].square()
        else:
            block.values += (output.transpose(1, 2) @ inputs).square().sum(0)


def _factors(factors: GradientFactors) -> tuple[Tensor, Tensor] | None:
    """Return output gradients and inputs, ``[batch, positions, …]``, if the gradient is a product.

    The parts of a sum (a layer that is called twice) are further positions.
    """
    if isinstance(factors, Sum):
        parts = [_factors(part) for part in factors.parts]
        if any(part is None for part in parts):
            return None
        output, inputs = zip(*(p for p in parts if p is not None), strict=True)
        return torch.cat(output, 1), torch.cat(inputs, 1)
    if isinstance(factors, Outer):
        return wide(factors.output_gradient), wide(factors.input)
    if isinstance(factors, Correlation):
        layer, images = factors.layer, wide(factors.input)
        if type(layer) not in (nn.Conv1d, nn.Conv2d) or layer.groups != 1:
            return None
        if images.ndim == 3:  # signals are images one pixel high
            images = images[:, :, None]
        patches = F.unfold(
            images,
            _two(layer.kernel_size, 1),
            _two(layer.dilation, 1),
            _two(factors.padding, 0),
            _two(layer.stride, 1),
        )
        return wide(factors.output_gradient).flatten(2).transpose(1, 2), patches.transpose(1, 2)
    return None


def _two(sizes: tuple[int, ...], high: int) -> tuple[int, int]:
    """Return a convolution's setting for images; for signals, with a height of one added."""
    return (high, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a layer's gradients ``[n, out, in]``, with the bias as the last input."""
    matrix = weight.flatten(2) if weight.ndim > 2 else weight
    return matrix if bias is None else torch.cat([matrix, bias.to(matrix)[..., None]], -1)
