"""The configuration groups, their choices, and "did you mean", by the standard library alone."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def config_directory() -> Path:
    """Return the folder of the YAML files: in the package (a wheel), or next to it (a checkout)."""
    package = Path(__file__).resolve().parents[2]
    inside, beside = package / "conf", package.parent / "conf"
    return inside if inside.is_dir() else beside


def groups(directory: Path | None = None) -> dict[str, list[str]]:
    """Return the configuration groups and the choices of each, from the names of the files."""
    top = directory or config_directory()
    found = {}
    for folder, _, files in os.walk(top):
        choices = sorted(Path(file).stem for file in files if file.endswith(".yaml"))
        if choices and Path(folder) != top:
            found[Path(folder).relative_to(top).as_posix()] = choices
    return dict(sorted(found.items()))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``Did you mean a or b?`` for the options nearest to a name; empty when none is near.

    Also compares the last part of options, so that ``dim`` suggests ``sketch.dim``.
    """

    def likeness(option: str) -> float:
        forms = [(name, option, 1.0), (name.lower(), option.lower(), 0.9)]
        if "." not in name:
            forms.append((name, option.rpartition(".")[2], 0.9))
        return max(weight * difflib.SequenceMatcher(None, a, b).ratio() for a, b, weight in forms)

    scores = {option: likeness(option) for option in options}
    least = max(0.6, max(scores.values(), default=0) - 0.1)
    near = sorted((o for o in scores if scores[o] >= least), key=lambda o: -scores[o])
    return f"Did you mean {' or '.join(near[:3])}?" if near else ""
