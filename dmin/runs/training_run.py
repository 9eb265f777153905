"""What a training run says of the gradient: taken, approximated, or refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dmin.runtime.errors import DminError


class Entry(NamedTuple):
    """One setting of a run and what becomes of it."""

    key: str  # as the trainer calls it
    value: Any
    meaning: str


@dataclass
class TrainingRun:
    """A trainer's run as settings of dmin.

    Attributes:
        trainer: its name.
        source: the file that was read.
        family: the choice of ``model``.
        name: of the stores made of it.
        model: settings of it.
        data: settings of ``data``.
        noise: settings of ``noise``.
        collect: settings of ``collect``.
        taken: what is honoured as it was trained.
        random: what is approximated: of randomness of the data, the central form stands for all.
        other: another loss than the plain one: refused unless ignored.
        ignored: of these, what the user said to ignore.
        unknown: keys that are not known here.
        facts: steps, learning rate, seed, …: they change no gradient of the final weights.
    """

    trainer: str
    source: Path
    family: str = ""
    name: str = "run"
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    collect: dict[str, Any] = field(default_factory=dict)
    taken: list[Entry] = field(default_factory=list)
    random: list[Entry] = field(default_factory=list)
    other: list[Entry] = field(default_factory=list)
    ignored: list[Entry] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def settle(self, ignore: Collection[str]) -> None:
        """Move what the user ignores out of the way; refuse the rest of another loss.

        Args:
            ignore: keys, as the trainer calls them (the last part is enough).

        Raises:
            DminError: the run has another loss, or a key to ignore is none of it.
        """
        said = set(ignore)
        names = {name for each in self.other for name in (each.key, each.key.rpartition(".")[2])}
        if strange := sorted(said - names):
            known = ", ".join(each.key for each in self.other) or "nothing to ignore"
            raise DminError(
                f"run.ignore={strange}: {self.source} has no such key in force. It has {known}."
            )
        self.ignored = [e for e in self.other if said & {e.key, e.key.rpartition(".")[2]}]
        self.other = [each for each in self.other if each not in self.ignored]
        if self.other:
            listed = "; ".join(f"{e.key} = {shown(e.value)}: {e.meaning}" for e in self.other)
            keys = ",".join(dict.fromkeys(e.key.rpartition(".")[2] for e in self.other))
            raise DminError(
                f"{self.source} trained with another loss than dmin computes: {listed}. To "
                f"attribute without that: run.ignore=[{keys}]."
            )

    def lines(self) -> list[str]:
        """Return the table that is printed before anything is loaded."""
        lines = [f"run: {self.trainer}, {self.source}"]
        for title, entries in (
            ("taken", self.taken),
            ("approximated: what was random in training is here its central form", self.random),
            ("ignored, as you say", self.ignored),
        ):
            if entries:
                lines.append(f"  {title}")
                lines += [f"    {e.key} = {shown(e.value)}: {e.meaning}" for e in entries]
        if self.unknown:
            lines.append(f"  not known here, and not read: {', '.join(self.unknown)}")
        return lines


def shown(value: Any) -> str:
    """Return a value in a few letters."""
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
