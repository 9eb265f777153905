"""The examination: runs the checks with the collector itself."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.collect import (
    GradientCollector,
    PeakMemory,
    Trainer,
    placed_as_collected,
    predict_trainer,
)
from dmin.collect.guard import Guard
from dmin.collect.options import CollectOptions
from dmin.collect.prediction import Cost, encoding_bytes, row_bytes
from dmin.data.base import Dataset, Example, by_shape, collate
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
from dmin.doctor import checks as checking
from dmin.doctor.diagnosis import Check, Covered, Diagnosis
from dmin.doctor.timestep_report import Timestep, timestep_report
from dmin.models.base import Condition
from dmin.models.contract import encoded
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import on_device

LOOKED_AT = 64  # most examples read per examined one, to find enough of one shape


def diagnose(
    collector: GradientCollector,
    dataset: Dataset,
    examples: int = 4,
    trainer: Trainer | None = None,
    dtype: str = CollectOptions.dtype,
    block_size: int = CollectOptions.block_size,
) -> Diagnosis:
    """Examine a collector's model on a few examples, in the mode and precision of collecting.

    Args:
        collector: the model and all settings of collecting; it is not changed.
        dataset: its first examples of one shape are used.
        examples: how many, at least 3.
        trainer: gives device and precision; None: :func:`~dmin.collect.predict_trainer`.
        dtype: of stored rows, to predict the size of the store.
        block_size: examples per block, which determines the sizes of passes.

    Raises:
        DminError: there are too few examples, or one cannot be read.
    """
    examples = min(examples, len(dataset))
    if examples < 3:
        raise DminError(f"doctor.examples={examples}: at least 3 are needed for comparison.")
    trainer = trainer or predict_trainer()
    batch = collate(_of_one_shape(dataset, examples))
    checks = [checking.weights(collector.model.network), checking.mode(collector.model.network)]
    if not checks[0].passed:
        return Diagnosis(checks)
    with placed_as_collected(collector, trainer) as device:
        batch = trainer.strategy.batch_to_device(batch, device)
        with torch.no_grad(), on_device(collector.encoders.values(), device):
            first, second = encoded(collector.model, batch), encoded(collector.model, batch)
            checks += checking.sampler(collector.model)
        checks.append(checking.encoders(first, second))
        checks += checking.in_each_pass(collector.model.network)
        x0, condition = trainer.precision_plugin.convert_input(first)
        inputs = _inputs(collector, x0, condition, batch["id"])
        with trainer.precision_plugin.predict_step_context():
            # First, because on a CPU only memory above the process's earlier peak is measured.
            blocks = block_size, len(dataset) % block_size
            steps, cost, work = _work(collector, x0, condition, batch["id"], blocks)
            with _full_precision():
                checks.append(checking.repeatable(collector, inputs))
                found, gradients = checking.gradients(collector, inputs)
                checks += gradients
            checks.append(checking.sketch(collector.sketch, device))
        checks += work
    coverage = _coverage(collector, found.path) if found else []
    if cost:
        kept = encoding_bytes([first], len(batch["id"])) if collector.encoders else 0
        cost = cost._replace(
            examples=len(dataset),
            seconds=cost.seconds * len(dataset),
            store_bytes=row_bytes(collector, dtype) * len(dataset),
            encoding_bytes=int(kept * len(dataset)),
        )
    return Diagnosis(checks, coverage, steps, cost)


def _of_one_shape(dataset: Dataset, count: int) -> list[Example]:
    """Return the first examples that share a shape."""
    seen: list[Example] = []
    for index in range(min(len(dataset), LOOKED_AT * count)):
        seen.append(dataset[index])
        largest = max(by_shape(seen), key=len)
        if len(largest) == count:
            return [seen[i] for i in largest]
    raise DminError(
        f"the first {len(seen)} examples have too many shapes: at most {len(largest)} share one, "
        f"and doctor.examples={count} are compared. Set it lower (at least 3), or scale the images "
        f"to fewer shapes: data.size=<pixels>, data.aspect=square or buckets."
    )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: its rounding would look like an error of the gradients."""
    if not torch.cuda.is_initialized():
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def _inputs(
    collector: GradientCollector, x0: Tensor, condition: Condition, ids: list[str]
) -> NoisedBatch:
    """Pair each example with a timestep of its own, spread over the schedule."""
    steps = [n for n, t in enumerate(collector.timesteps) if collector.networks.reaches(t)]
    i, steps_at = torch.arange(len(ids)), torch.tensor(steps)
    inputs = NoisedExamples(collector.noise, collector.timesteps, x0, condition, ids)
    return inputs.at(i * inputs.points + steps_at[(2 * i + 1) * len(steps) // (2 * len(ids))])


def _work(
    collector: GradientCollector,
    x0: Tensor,
    condition: Condition,
    ids: list[str],
    blocks: tuple[int, ...],
) -> tuple[list[Timestep], Cost | None, list[Check]]:
    """Compute the examples' rows as in collecting, twice: the first time warms up.

    Before that, one pass of each size that occurs in collecting (the last, smaller ones included)
    is run and checked by the guard, as far as there are enough pairs.
    """
    peak = PeakMemory(x0.device)
    inputs, guard = collector.inputs(x0, condition, ids), Guard(collector, collector.ownership)
    pairs = [examples * inputs.points for examples in blocks]
    sizes = {min(collector.pairs, n) for n in pairs} | {n % collector.pairs for n in pairs}
    try:
        for group in collector.networks.together(inputs):
            for size in sorted({min(size, len(group)) for size in sizes} - {0}):
                guard.run(inputs.at(group[:size]))
        rows = collector.features(x0, condition, ids, peak).values[collector.readouts[0]]
        start = time.perf_counter()
        collector.features(x0, condition, ids, peak).losses.cpu()  # waits for a GPU
        seconds = (time.perf_counter() - start) / len(ids)
    except DminError as error:
        return [], None, [Check("rows can be computed", False, detail=str(error))]
    report = timestep_report(np.asarray(rows.cpu()), collector.timesteps)
    blind = [f"{entry.timestep:g}" for entry in report if entry.blind]
    telling = [f"{entry.timestep:g}" for entry in report if not entry.blind]
    chosen = f"timesteps=explicit timesteps.values=[{','.join(telling)}]" if telling else ""
    check = Check(
        "timesteps distinguish examples",
        not blind,
        float(len(blind)),
        0,
        f"Blind: {', '.join(blind)}." if blind else "",
        "They cost as much as the others and distinguish little. "
        + (f"Use only the others: {chosen}." if telling else "Choose timesteps of less noise."),
        required=False,
    )
    return report, Cost(len(ids), seconds, 0, 0, peak.bytes, peak.meaning), [check]


def _coverage(collector: GradientCollector, paths: dict[str, str]) -> list[Covered]:
    """Count parameters by the type of their layer and the path of their gradient."""
    sums: dict[tuple[str, str], list[int]] = {}
    for name, p in collector.model.network.named_parameters():
        path = paths.get(name, "not attributed")
        key = type(checking.layer_of(collector, name)).__name__, path
        entry = sums.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += p.numel()
    rows = [Covered(*key, *entry) for key, entry in sums.items()]
    return sorted(rows, key=lambda row: -row.scalars)
