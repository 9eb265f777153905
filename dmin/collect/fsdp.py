"""Networks larger than one device: each process holds a shard of every parameter (FSDP2).

The weights of a unit of the network (usually a transformer block) are gathered from all processes,
or from host memory, just before it runs, forward or backward, and freed afterwards. So a device
holds its shard of the weights and one or two whole units; see :class:`Sharded`.

Every process takes part in gathering every unit. So all have to run the same number of passes,
of the same number of (example, timestep) pairs. A process that has fewer repeats some and discards
their rows.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dmin.collect.collector import Collector
from dmin.collect.features import Features
from dmin.collect.networks import Networks
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import to_device

# A module of a list is a unit from this share of the network on: smaller ones would be put together
# by messages too small to be worth their latency.
LEAST_SHARE = 0.005


class Sharded(ModelParallelStrategy):
    """A Lightning strategy with one copy of the network sharded over all processes.

    Args:
        offload: keep the shards in host memory, and only the running units on the device. With one
            small GPU (``devices=1``) the whole network is in host memory.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)
        self.offload = offload

    def setup_environment(self) -> None:
        """Make the process group of all processes, and their mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def is_sharded(trainer: lightning.Trainer) -> bool:
    """Return whether a trainer shards the network."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def shardable_copy(collector: Collector) -> Collector:
    """Return a collector whose network may be sharded; the user's stays as it is.

    The other network shares the memory of the weights until it is sharded.

    Raises:
        DminError: a setting is incompatible with sharding.
    """
    if collector.microbatch == "auto":
        raise DminError(
            "collect.microbatch=auto tries sizes in each process separately, which is impossible "
            "with a sharded network (trainer=fsdp, trainer=offload), where all processes run each "
            "pass together. Give a number, such as collect.microbatch=8."
        )
    network = collector.model.network
    weights = {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()}
    model = copy.copy(collector.model)
    model._modules = dict(model._modules)  # a copy shares it otherwise
    model.network = copy.deepcopy(network, weights)
    return collector.with_model(model)


@contextmanager
def explain_lost_peer(trainer: lightning.Trainer) -> Iterator[None]:
    """Explain the error when a process that shares the network is lost.

    Raises:
        DminError: instead of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no class of its own for it.
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not lost or not is_sharded(trainer):
            raise
        raise DminError(
            f"another process of this job was lost, or did not answer ({_first_line(error)}): with "
            "trainer=fsdp no process can continue alone. The output of the other process has the "
            "reason; sealed blocks are kept, so run the same command again."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def shard(
    network: nn.Module,
    mesh: DeviceMesh,
    offload: bool = False,
    externally_called: Sequence[str] = (),
) -> None:
    """Replace the parameters of a network by this process's shards.

    Args:
        network: changed in place, on any device.
        mesh: the processes, one dimension.
        externally_called: names of modules that are called from outside the block that contains
            them.
        offload: keep the shards in host memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    if isinstance(network, FSDPModule):
        return
    pinned = torch.accelerator.is_available()
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    apart = [network.get_submodule(name) for name in externally_called]
    for unit in dict.fromkeys([*apart, *units(network), network]):
        fully_shard(unit, mesh=mesh, offload_policy=policy)


def units(network: nn.Module) -> list[nn.Module]:
    """Return the modules that are put together one at a time, innermost first.

    These are the elements of module lists that hold enough of the network. None holds a parameter
    that is tied to one outside of it.
    """
    total = sum(p.numel() for p in network.parameters())
    holders: dict[int, set[int]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    listed = [
        element
        for module in network.modules()
        if isinstance(module, nn.ModuleList)
        for element in module
    ]
    found = []
    for element in dict.fromkeys(listed):
        inside = {id(module) for module in element.modules()}
        parameters = list(element.parameters())
        # A layer's output is changed in place more often, which would lose FSDP's hook on it.
        is_layer = next(element.children(), None) is None
        if is_layer or any(not holders[id(p)] <= inside for p in parameters):
            continue
        if sum(p.numel() for p in parameters) >= LEAST_SHARE * total > 0:
            found.append(element)
    return found[::-1]  # `modules` comes from outside in


class LockstepPasses:
    """Makes a process run the same number of passes, of the same number of pairs, as the others.

    Args:
        strategy: of the trainer.
        own: number of the first blocks of this process that are its own.
        pairs: (example, timestep) pairs in every pass.
        networks: used by the pairs.

    Raises:
        DminError: the pairs use several networks, so processes would call different ones.
    """

    def __init__(self, strategy: Strategy, own: int, pairs: int, networks: Networks) -> None:
        if networks.several and getattr(strategy, "world_size", 1) > 1:
            raise DminError(
                "trainer=fsdp: the model has two networks for different timesteps, and processes "
                "would call different ones at the same time. Collect timesteps on one side of the "
                "boundary (timesteps=explicit), or set trainer=offload."
            )
        self.networks = networks
        self.strategy = strategy
        self.own = own
        self.pairs = pairs
        self._lacking = 0
        self._again: Callable[[], Any] = lambda: None

    def begin_block(self, inputs: Sequence[NoisedExamples]) -> None:
        """Agree with the other processes on the number of passes of the block.

        Args:
            inputs: the examples of the block, grouped by shape.
        """
        groups = [group for each in inputs for group in self.networks.together(each)]
        mine = sum(-(-len(pairs) // self.pairs) for pairs in groups)
        told = torch.tensor(mine, device=self.strategy.root_device)
        self._lacking = int(self.strategy.reduce(told, reduce_op="max")) - mine

    def padded(self, batch: NoisedBatch, run: Callable[[NoisedBatch], Features]) -> Features:
        """Run a pass padded to the common number of pairs by repeating some."""
        count = len(batch.t)
        full = batch.rows(to_device(torch.arange(self.pairs) % count, batch.t.device))
        self._again = lambda: run(full)
        return run(full).first(count)

    def end_block(self, number: int) -> bool:
        """Run the passes that others still need; return whether the block is this process's own."""
        for _ in range(self._lacking):
            self._again()
        return number < self.own
