"""Ways to get one sketch of k numbers for each example of a batch; each returns [batch, k]."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from workloads import BATCH, Workload

from dmin.gradients.capture import Capture
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import choose_parameters
from dmin.sketches import BlockCyclic

K = 4096
CONF = Path(__file__).parents[2] / "conf" / "sketch"
NOT_TIMED = {"gaussian", "none"}  # a dense matrix, and no sketch at all


class Plain:
    """Forward and backward of the batch with the gradients of all weights: the yardstick."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __call__(self) -> None:
        network = self.workload.network
        network.zero_grad(set_to_none=True)
        self.workload.losses().sum().backward()
        network.zero_grad(set_to_none=True)


class PlainAdapters(Plain):
    """Forward and backward with the gradients of the adapters alone."""

    def __call__(self) -> None:
        others = [p for n, p in self.workload.network.named_parameters() if ".lora_" not in n]
        for parameter in others:
            parameter.requires_grad_(False)
        super().__call__()
        for parameter in others:
            parameter.requires_grad_(True)


class Published:
    """An example at a time: flatten, pad, permute, sign, sum groups (DMin, arXiv 2412.08637).

    Written afresh after the paper's description; like the published code it keeps the permutation
    and the signs as 64-bit integers.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.chosen = chosen(workload)
        count = sum(p.numel() for p in self.chosen.values())
        self.padded = -(-count // K) * K
        self.permutation = torch.randperm(self.padded)
        self.signs = torch.randint(0, 2, (self.padded,)) * 2 - 1
        self.state = self.permutation.nbytes + self.signs.nbytes

    def __call__(self) -> Tensor:
        rows = []
        for b in range(BATCH):
            loss = self.workload.losses(slice(b, b + 1)).sum()
            gradients = torch.autograd.grad(loss, list(self.chosen.values()))
            flat = torch.cat([g.flatten() for g in gradients])
            flat = torch.nn.functional.pad(flat, (0, self.padded - len(flat)))
            rows.append((flat[self.permutation] * self.signs).view(K, -1).sum(1))
        return torch.stack(rows)


class Vmap:
    """``torch.func.vmap`` of the gradient of one example, then the block-cyclic sketch."""

    state = 0

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.chosen = {name: p.detach() for name, p in chosen(workload).items()}
        parameters = choose_parameters(workload.network, workload.params)
        self.sketch = BlockCyclic(K).bind(parameters)

        def loss(parameters, target, arguments):
            one = {name: x[None] for name, x in arguments.items()}
            found = torch.func.functional_call(
                workload.network, parameters, (), one | {"return_dict": False}
            )
            return (found[0] - target[None]).square().mean()

        self.gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="error")

    def __call__(self) -> Tensor:
        found = self.gradients(self.chosen, self.workload.target, self.workload.arguments)
        return self.sketch.of(found)[:, 0]


class Ours:
    """dmin with one of its sketches."""

    def __init__(self, workload: Workload, family: str) -> None:
        self.workload = workload
        sketch = instantiate(OmegaConf.load(CONF / f"{family}.yaml"), dim=K)
        self.sketch = sketch.bind(choose_parameters(workload.network, workload.params))
        tensors = [x for x in vars(self.sketch).values() if isinstance(x, Tensor)]
        self.state = sum(x.nbytes for x in tensors)
        self.ownership = Ownership()

    def __call__(self) -> Tensor:
        return self.ownership.settle(self._rows)

    def _rows(self) -> Tensor:
        with Capture(self.workload.network, self.sketch, ownership=self.ownership) as capture:
            rows = capture.backward(self.workload.losses()).values[:, 0]
            self.coverage = capture.coverage
        return rows


def chosen(workload: Workload) -> dict[str, Tensor]:
    """The attributed parameters, by name."""
    named = dict(workload.network.named_parameters())
    entries = choose_parameters(workload.network, workload.params).entries
    return {entry.name: named[entry.name] for entry in entries}


def families() -> list[str]:
    """All sketches that there are, but those that cannot be run at this size."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in NOT_TIMED)


def build(name: str, workload: Workload):
    """Return a way by its name."""
    kinds = {"plain": Plain, "plain_adapters": PlainAdapters, "published": Published, "vmap": Vmap}
    return kinds[name](workload) if name in kinds else Ours(workload, name)
