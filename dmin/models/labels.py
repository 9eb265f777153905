"""Class labels: numbers, or text with a mapping that is saved when a model is trained."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.runtime.files import read_regular

FILE = "labels.json"  # next to model_index.json: names of the classes in the order of their numbers
_MOST = 1 << 24  # bytes


def class_labels(prompts: Sequence[Any], classes: int, names: Sequence[str] = ()) -> Tensor:
    """Return labels as numbers of classes, ``[len(prompts)]``.

    Args:
        prompts: the labels.
        classes: number of classes of the model.
        names: names of the classes, if the model was trained on text labels.

    Raises:
        DminError: a label is not a class of the model.
    """
    numbers = {name: number for number, name in enumerate(names)}
    known = numbers if names else range(classes)
    wrong = [p for p in prompts if not isinstance(p, str if names else int) or p not in known]
    if not wrong:
        return torch.tensor([numbers.get(prompt, prompt) for prompt in prompts])
    told = f"the classes {spelled(names)}" if names else f"the classes 0 … {classes - 1}"
    remedy = "Use labels (or prompts) among these."
    if wrong[0] is None:
        remedy = "Name the column of labels: data.label=COLUMN, of queries queries.label=COLUMN."
    elif not names and isinstance(wrong[0], str):
        remedy = (
            "Use a column of numbers (data.label=COLUMN, of queries queries.label=COLUMN): only "
            "models that `dmin train` trained on text labels know their meaning."
        )
    raise DminError(f"label {wrong[0]!r}: the model knows {told}. {remedy}")


def names_of(labels: Iterable[Any], classes: int) -> list[str]:
    """Return the sorted names of the classes of text labels.

    Raises:
        DminError: not all labels are text, or there are more than ``classes``.
    """
    found = set(labels)
    odd = [label for label in found if not isinstance(label, str)]
    if odd:
        raise DminError(
            f"some labels of the data are text ({spelled(sorted(found.difference(odd)))}), but one "
            f"is {odd[0]!r}. Use either text or numbers for all images, in the column data.label."
        )
    names = sorted(found)
    if len(names) > classes:
        raise DminError(
            f"the data have {len(names)} classes ({spelled(names)}), but the model is built for "
            f"{classes}: set num_class_embeds={len(names)} (train.model.…), or another data.label."
        )
    return names


def save_names(names: Sequence[str], folder: Path) -> None:
    """Save the names of classes in the folder of a model, if there are any."""
    if names:
        (folder / FILE).write_text(json.dumps(list(names), ensure_ascii=False, indent=1) + "\n")


def load_names(folder: Path, classes: int | None) -> list[str]:
    """Return the names of classes in the folder of a model; empty if labels are numbers.

    Raises:
        DminError: the file is damaged.
    """
    try:
        found = json.loads(read_regular(folder / FILE, _MOST))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DminError(f"{folder / FILE} cannot be read ({error}): restore it.") from error
    fits = isinstance(found, list) and all(isinstance(name, str) for name in found)
    if not fits or found != sorted(set(found)) or len(found) > (classes or 0):
        raise DminError(
            f"{folder / FILE} is not a sorted list of the names of the model's classes "
            f"({classes or 'it has none'}): restore it, or train the model again."
        )
    return list(found)


def spelled(names: Sequence[str], most: int = 12) -> str:
    """Return the first names as text for a message."""
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")
