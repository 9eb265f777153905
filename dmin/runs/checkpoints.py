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
    """How the learning rate of a run changed; `known`: whether that is computed here."""

    name: str
    known: bool
    warmup: float  # steps, or a share of all, in which it rises
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
    """Put a run's schedule among its facts; the first four name keys of the trainer's."""
    told = keys.get(name, default, str).lower()
    rises = "constant" not in known  # a constant rate warms up as well
    told += "_with_warmup" * (rises and told == "constant")
    numbers = (keys.get(key, kind=int) for key in (steps, epochs))
    keys.run.facts["schedule"] = Schedule(told, told in known, keys.get(warmup, 0, float), *numbers)


def settings(run: TrainingRun, method: str, weighted: bool) -> dict[str, Any]:
    """Return the settings of a method over checkpoints: those on the way, and what each counts.

    ``w_c = Σ_s η_s / max η`` over the steps s from the checkpoint before to c: TracIn's sum over
    steps, each by the checkpoint that ends its stretch (Pruthi et al. 2020, arXiv 2002.08484, where
    all stretches are of one length).

    Args:
        run: is told of them.
        method: what it is called.
        weighted: whether ``weights`` are asked for; that of the run's last file is the first.

    Raises:
        DminError: there are none, or their learning rates are not known.
    """
    ways, last = run.facts.get("checkpoints") or [], run.model["adapter"]
    if not ways:
        raise DminError(
            f"method={method} averages over the checkpoints of a run, and {run.source} "
            f"has only {last}. Let the trainer save intermediate checkpoints, give others by "
            f"method.checkpoints=[FILE, …], or set method=grad_dot."
        )
    run.taken.append(Entry("files on the way", len(ways), "method.checkpoints"))
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
    run.taken.append(Entry("learning rates", told, "method.weights, the last file's first"))
    return {"checkpoints": ways, "weights": weights}


def _weights(files: list[Path], plan: Schedule) -> list[float] | str:
    """Return what each file counts, the last first, or what is lacking."""
    if not plan.known:
        return f"its schedule {plan.name} is not computed here"
    ends = _ends(files, plan)
    if ends is None:
        return "how far the run was at each is in no header, name or setting"
    rise = 0.0 if plan.name == "constant" else plan.warmup
    if rise >= 1:
        if plan.steps is None:
            return f"it rose for {rise:g} steps, of how many is not told"
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
    """Return which share of the run was over at each file; None where nothing tells."""
    found = [_told(file) for file in files]
    total = found[-1] if plan.epochs or not plan.steps else plan.steps
    if None in found:  # then by their names: of steps, or of epochs
        names = (f"{file.parent.name}/{file.name}" for file in files)
        of_steps = any(re.search(r"step|checkpoint-|-save-|_\d{9}", name) for name in names)
        total = plan.steps if of_steps else plan.epochs
        found = [total if (number := _named(file)) is None else number for file in files]
    if not total or None in found:
        return None
    ends = [each / total for each in found if each is not None]
    rising = all(a < b for a, b in zip([0.0, *ends], ends, strict=False))
    return ends if rising and ends[-1] <= 1 else None


def _told(file: Path) -> int | None:
    """Return the step that a file's header tells, of kohya's or ai-toolkit's."""
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
