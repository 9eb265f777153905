"""The intermediate checkpoints of a run, and the learning rates of the steps between them."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dmin.runs.files import header
from dmin.runs.keys import Keys
from dmin.runs.training_run import Entry, TrainingRun
from dmin.runtime.errors import DminError


class Schedule(NamedTuple):
    """The learning-rate schedule of a run; `known`: whether dmin can compute it."""

    name: str
    known: bool
    warmup: float  # steps of warm-up; below 1: the fraction of all steps
    steps: int | None  # of the run
    epochs: int | None


def schedule(
    keys: Keys,
    steps: str,
    epochs: str = "epochs",
    name: str = "lr_scheduler",
    warmup: str = "lr_warmup_steps",
    default: str = "constant",
    known: Sequence[str] = ("constant", "constant_with_warmup", "cosine"),
) -> None:
    """Add a run's schedule to its facts; ``steps`` ... ``warmup`` are the trainer's keys."""
    told = keys.get(name, default, str).lower()
    rises = "constant" not in known  # this trainer's "constant" also has a warm-up
    told += "_with_warmup" * (rises and told == "constant")
    numbers = (keys.get(key, kind=int) for key in (steps, epochs))
    keys.run.facts["schedule"] = Schedule(told, told in known, keys.get(warmup, 0, float), *numbers)


def settings(run: TrainingRun, method: str, weighted: bool) -> dict[str, Any]:
    """Return the settings of a method over checkpoints: the intermediate files and their weights.

    ``w_c = Σ_s η_s / max η`` over the steps s from the previous checkpoint to c. This is TracIn's
    sum over steps, with the gradients of an interval's steps taken at its end (Pruthi et al. 2020,
    arXiv 2002.08484, where all intervals have equal length).

    Args:
        run: the run; entries are added to ``taken``.
        method: its name, for messages.
        weighted: whether to compute ``weights``; the first is that of the run's final file.

    Raises:
        DminError: there are no intermediate files, or their learning rates are unknown.
    """
    ways, last = run.facts.get("checkpoints") or [], run.model["adapter"]
    if not ways:
        raise DminError(
            f"method={method} averages over the checkpoints of a run, and {run.source} "
            f"has only {last}. Let the trainer save intermediate checkpoints, give others by "
            f"method.checkpoints=[FILE, …], or set method=grad_dot."
        )
    run.taken.append(Entry("intermediate checkpoints", len(ways), "method.checkpoints"))
    if not weighted:
        return {"checkpoints": ways}
    weights = _weights([*map(Path, ways), Path(last)], run.facts["schedule"])
    if isinstance(weights, str):
        raise DminError(
            f"method={method} weights each checkpoint by its learning rates, which are "
            f"unknown for {run.source}: {weights}. Set method.weights=[…] for {last}, then "
            f"{', '.join(ways)}, or method.weights=null for equal weights."
        )
    told = ", ".join(f"{weight:.3g}" for weight in weights)
    run.taken.append(Entry("learning rates", told, "method.weights, that of the final file first"))
    return {"checkpoints": ways, "weights": weights}


def _weights(files: list[Path], plan: Schedule) -> list[float] | str:
    """Return the weight of each file, the final one first, or what is missing to compute them."""
    if not plan.known:
        return f"dmin does not compute its schedule {plan.name}"
    ends = _ends(files, plan)
    if ends is None:
        return "the steps at which they were saved are in no header, name or setting"
    rise = 0.0 if plan.name == "constant" else plan.warmup
    if rise >= 1:
        if plan.steps is None:
            return f"it rose for {rise:g} steps, but the number of all steps is not given"
        rise /= plan.steps

    def rate(done: float) -> float:
        if done < rise:
            return done / rise
        falls = plan.name == "cosine"
        return (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2 if falls else 1.0

    sums = []
    for start, end in zip([0.0, *ends], ends, strict=False):
        middles = (start + (end - start) * (n + 0.5) / 1000 for n in range(1000))
        sums.append((end - start) * sum(map(rate, middles)) / 1000)
    return [sums[-1], *sums[:-1]]


def _ends(files: list[Path], plan: Schedule) -> list[float] | None:
    """Return the fraction of the run completed at each file; None if it is unknown."""
    found = [_step_in_header(file) for file in files]
    total = found[-1] if plan.epochs or not plan.steps else plan.steps
    if None in found:  # by file names, which have steps or epochs
        names = (f"{file.parent.name}/{file.name}" for file in files)
        of_steps = any(re.search(r"step|checkpoint-|-save-|_\d{9}", name) for name in names)
        total = plan.steps if of_steps else plan.epochs
        found = [total if (number := _named(file)) is None else number for file in files]
    if not total or None in found:
        return None
    ends = [each / total for each in found if each is not None]
    rising = all(a < b for a, b in zip([0.0, *ends], ends, strict=False))
    return ends if rising and ends[-1] <= 1 else None


def _step_in_header(file: Path) -> int | None:
    """Return the training step in the header of a file of kohya or ai-toolkit, or None."""
    told = header(file).get("__metadata__") or {}
    try:
        step = told.get("ss_steps") or json.loads(told.get("training_info", "{}")).get("step")
        return None if step is None else int(step)
    except (ValueError, TypeError, AttributeError):
        return None


def _named(file: Path) -> int | None:
    """Return the number in a file's name, or in that of its folder."""
    names = (file.stem, file.parent.name)
    found = next((m for each in names if (m := re.search(r"-save-(\d+)-|(\d+)$", each))), None)
    return None if found is None else int(found[1] or found[2])
