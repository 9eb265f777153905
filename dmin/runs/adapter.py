"""The adapter that a run produced: the final file, else the latest intermediate one."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from dmin.runs.files import Places, header, spelled
from dmin.runs.training_run import Entry, TrainingRun
from dmin.runtime.errors import DminError

TEXT = ("lora_te", "text_encoder", "text_encoders.")  # prefixes of text encoders' tensors


def take(
    run: TrainingRun, places: Places, key: str, folder: Path | None, last: str, *ways: str
) -> None:
    """Take the adapter of a run, and list its intermediate checkpoints among the facts.

    Args:
        run: gets ``model.adapter`` and ``facts["checkpoints"]``.
        places: an adapter that the user names takes precedence.
        key: the key of the config that names the folder.
        folder: of the adapters, if it was found.
        last: name of the final adapter.
        ways: glob patterns of intermediate ones; the part before ``*`` is taken literally.

    Raises:
        DminError: there is no adapter.
    """
    run.collect["params"] = "lora"
    said, files = places.said.get("adapter"), [spelled(each) for each in _files(folder, last, ways)]
    if said is None:
        if not files:
            raise DminError(
                f"{run.source}: {key} does not lead to an adapter ({last}). Give it as "
                f"model.adapter=FILE, or give the folder of the run's files as run.root=FOLDER."
            )
        said = files[-1]
        run.taken.append(Entry(key, said, "model.adapter"))
    else:
        run.taken.append(Entry(key, said, "your model.adapter"))
    run.model["adapter"] = said
    here = spelled(Path(said))
    run.facts["checkpoints"] = files[: files.index(here)] if here in files else files
    names = header(Path(said)) if Path(said).is_file() else {}
    if parts := sum(name.startswith(TEXT) for name in names):
        meaning = "encode the captions inside each pass; their gradients are part of each row"
        run.taken.append(Entry("tensors of text encoders", parts, meaning))


def _files(folder: Path | None, last: str, ways: Sequence[str]) -> list[Path]:
    """Return the existing adapters of a run, in the order in which they were saved."""
    if folder is None:
        return []
    found: list[Path] = []
    for way in ways:
        before, star, rest = way.partition("*")
        found += folder.glob(f"{glob.escape(before)}{star}{rest}")
    found = [file for file in found if file.is_file() and file != folder / last]
    return [*sorted(found, key=_natural), *([folder / last] if (folder / last).is_file() else [])]


def refuse_whole(run: TrainingRun, without: str) -> DminError:
    """Return the error for a run that trained all weights."""
    return DminError(
        f"{run.source} trains the whole network ({without}): give the trained model by "
        f"model=FAMILY model.path=…, and its data by data=training_folder data.root=…"
    )


def _natural(file: Path) -> list[tuple[int, str]]:
    """Return a sort key by which step 900 comes before 1000."""
    parts = re.split(r"(\d+)", file.as_posix())
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
