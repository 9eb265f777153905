"""``run=PATH``: recognise the trainer and read its run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dmin.runs import (
    ai_toolkit,
    diffusers_scripts,
    diffusion_pipe,
    kohya,
    kohya_header,
    musubi,
    onetrainer,
    simple_tuner,
)
from dmin.runs.files import Places, load
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

TRAINERS: tuple[ModuleType, ...] = (
    kohya,
    onetrainer,
    ai_toolkit,
    simple_tuner,
    diffusion_pipe,
    diffusers_scripts,
    musubi,
)
# Readers of trained files, for folders without a config.
HEADERS: tuple[ModuleType, ...] = (kohya_header,)


def read_run(
    path: Path,
    root: Path | None = None,
    ignore: Collection[str] = (),
    draws: int = 1,
    said: Mapping[str, str] | None = None,
) -> TrainingRun:
    """Read a trainer's run.

    Args:
        path: its config, or the folder of the config.
        root: folder of its relative paths, if it is not the config's folder or one of its parents.
        ignore: keys that change the loss and are to be ignored.
        draws: draws of the random data per example; 1: its central form.
        said: the user's own ``family``, ``path``, ``adapter`` of the model, and ``data``.

    Raises:
        DminError: no known trainer wrote it, a file is missing, or dmin lacks the run's loss.
    """
    found = list(_candidates(path, TRAINERS)) or list(_candidates(path, HEADERS))
    if not found:
        known = ", ".join(module.__name__.rpartition(".")[2] for module in TRAINERS)
        raise DminError(
            f"run={path} contains no config of a known trainer ({known}). Give the config itself, "
            f"or set model=… and data=…"
        )
    if len(found) > 1:
        names = ", ".join(str(file) for file, *_ in found)
        raise DminError(f"run={path} contains several: {names}. Choose one of them.")
    file, module, values = found[0]
    run: TrainingRun = module.read(file, values, Places(file, root, said))
    run.draw(draws)
    run.settle(ignore)
    return run


def _candidates(
    path: Path, trainers: Sequence[ModuleType]
) -> Iterator[tuple[Path, ModuleType, Any]]:
    if not path.exists():
        raise DminError(f"run={path}: there is no such file or folder.")
    if path.is_file():
        values = load(path)
        places = [m for m in trainers if path.suffix in {Path(each).suffix for each in m.CONFIGS}]
        yield from [(path, m, values) for m in places if m.recognises(values)][:1]
        return
    for module in trainers:
        for pattern in module.CONFIGS:  # the first pattern that matches
            read = [(file, _readable(file)) for file in sorted(path.glob(pattern))]
            if found := [each for each in read if module.recognises(each[1])]:
                yield from ((file, module, values) for file, values in found)
                break


def _readable(file: Path) -> Any:
    try:
        return load(file)
    except DminError:
        return None
