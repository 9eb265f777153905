"""Other tools, as far as they can run a workload; run by the Python of an environment with them.

Prints one JSON object: the time beside plain training, and the share of the parameters reached.
"""

import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from math import prod

import torch
from workloads import BATCH, Workload, build

K, REPEATS = 4096, 2
MEMORY = 12 << 30


class Bergson:
    """bergson's hooks with its projection of both sides, 16 × 16 numbers a layer."""

    stored = 0

    def __init__(self, workload: Workload) -> None:
        from bergson.collector.gradient_collectors import TraceCollector
        from bergson.gradients import GradientProcessor

        self.workload, self.kind = workload, TraceCollector
        self.processor = GradientProcessor(projection_dim=16, include_bias=True)
        self.targets = self.layers()
        named = dict(workload.network.named_modules())
        some = [p for name in self.targets for p in named[name].parameters(recurse=False)]
        # Adapters are layers of their own; the rest of the network is not asked for.
        self.reached = sum(p.numel() for p in some)
        self.stored = 4 * 256 * len(self.targets)

    def layers(self) -> set[str]:
        """The Linear layers whose input has three axes: it refuses every other input."""
        network, found, hooks = self.workload.network, set(), []
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear) and wanted(self.workload, name):

                def note(_, inputs, name=name):
                    if inputs[0].ndim == 3:
                        found.add(name)

                hooks.append(module.register_forward_pre_hook(note))
        with torch.no_grad():
            self.workload.losses()
        for hook in hooks:
            hook.remove()
        return found

    def __call__(self) -> int:
        """Return the numbers that an example gets."""
        collector = self.kind(
            model=self.workload.network,
            target_modules=self.targets,
            processor=self.processor,
            device="cpu",
            dtype=torch.float32,
        )
        with collector:
            self.workload.losses().sum().backward()
        self.workload.network.zero_grad(set_to_none=True)
        return sum(g[0].shape[1] for g in collector.mod_grads.values())


class Vectorised(ABC):
    """Gradients of all parameters by ``vmap``, then the tool's random matrix on a CPU."""

    BLOCK = 100  # columns of the matrix that stand in memory at once, both tools' default

    def __init__(self, workload: Workload) -> None:
        chosen = {n: p for n, p in workload.network.named_parameters() if wanted(workload, n)}
        self.workload, self.chosen = workload, {n: p.detach() for n, p in chosen.items()}
        self.reached = sum(p.numel() for p in chosen.values())
        self.stored = 4 * K
        needed = 4 * self.BLOCK * self.reached
        if needed > MEMORY:
            raise MemoryError(
                f"its projection on a CPU keeps {needed / 2**30:.0f} GiB of random matrix, of "
                f"{MEMORY / 2**30:.0f} there are"
            )
        self.projector = self.build(self.reached)

    @abstractmethod
    def build(self, size: int):
        """Return the tool's projector of so many parameters."""

    def gradients(self) -> torch.Tensor:
        """Return ``[batch, P]``."""

        def loss(parameters, target, arguments):
            one = {name: x[None] for name, x in arguments.items()}
            found = torch.func.functional_call(
                self.workload.network, parameters, (), one | {"return_dict": False}
            )
            return (found[0] - target[None]).square().mean()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")
        found = each(self.chosen, self.workload.target, self.workload.arguments)
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    def __call__(self) -> int:
        return self.projector.project(self.gradients(), 0).shape[1]


class Dattri(Vectorised):
    """dattri's projector; its own gradients take (parameters, data) by the same ``vmap``."""

    @abstractmethod
    def build(self, size: int):
        """Return the tool's projector of so many parameters."""
        from dattri.func.projection import BasicProjector, ProjectionType

        return BasicProjector(size, K, 0, ProjectionType.rademacher, torch.device("cpu"))


class Trak(Vectorised):
    """TRAK's projector; its own gradients take a batch of tensors by the same ``vmap``."""

    @abstractmethod
    def build(self, size: int):
        """Return the tool's projector of so many parameters."""
        from trak.projectors import BasicProjector, ProjectionType

        return BasicProjector(size, K, 0, ProjectionType.rademacher, torch.device("cpu"))


PEERS = {"bergson": Bergson, "dattri": Dattri, "trak": Trak}


def wanted(workload: Workload, name: str) -> bool:
    return workload.params == "all" or ".lora_" in name


def main(workload_name: str, peer: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    workload = build(workload_name)
    shapes = [p.shape for n, p in workload.network.named_parameters() if wanted(workload, n)]
    way = PEERS[peer](workload)

    def plain() -> None:
        workload.losses().sum().backward()
        workload.network.zero_grad(set_to_none=True)

    seconds = {"plain": [], "way": []}
    for _ in range(1 + REPEATS):
        for name, work in (("plain", plain), ("way", way)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    pairs = [a / b for a, b in zip(seconds["way"][1:], seconds["plain"][1:], strict=True)]
    plain_best, best = (min(seconds[name][1:]) for name in ("plain", "way"))
    count = sum(map(prod, shapes))
    return {
        "seconds": best / BATCH,
        "plain_seconds": plain_best / BATCH,
        "ratio": best / plain_best,
        "median_ratio": statistics.median(pairs),
        "coverage": way.reached / count,
        "parameters": count,
        "stored_bytes": way.stored,
        "threads": threads,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    except (Exception, MemoryError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}".splitlines()[0]) from error
