"""A training run as settings of dmin: keys that are used, approximated, or refused."""

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
        drawn: names of the keys of it that more draws than one are made of.
        draws: how many.
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
    drawn: set[str] = field(default_factory=set)
    draws: int = 1
    other: list[Entry] = field(default_factory=list)
    ignored: list[Entry] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def draw(self, draws: int) -> None:
        """Have each example be the mean of so many draws of what was random in its data.

        Args:
            draws: 1 is the central form.
        """
        parts = [part for part in self.data.get("datasets", {}).values() if "draws" in part]
        for part in parts:
            settings = {**part.pop("draws"), "number": draws}
            part |= {"draws": settings} if draws > 1 else {}
        self.draws = draws if parts else 1
        if self.draws > 1:
            self.noise["draws"] = draws
            meaning = f"noise.draws={draws}, each with a draw of the data; so many times the rows"
            self.taken.append(Entry("run.draws", draws, meaning))
        elif draws > 1:
            self.taken.append(Entry("run.draws", draws, "nothing in the data was drawn: the same"))

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
                f"run.ignore={strange}: {self.source} does not set this key. It sets {known}."
            )
        self.ignored = [e for e in self.other if said & {e.key, e.key.rpartition(".")[2]}]
        self.other = [each for each in self.other if each not in self.ignored]
        if self.other:
            listed = "; ".join(f"{e.key} = {shown(e.value)}: {e.meaning}" for e in self.other)
            keys = ",".join(dict.fromkeys(e.key.rpartition(".")[2] for e in self.other))
            raise DminError(
                f"{self.source} trained with a loss that dmin does not compute: {listed}. To "
                f"attribute without it, set run.ignore=[{keys}]."
            )

    def lines(self) -> list[str]:
        """Return the table that is printed before anything is loaded."""
        lines = [f"run: {self.trainer}, {self.source}"]
        drawn = [e for e in self.random if self.draws > 1 and e.key in self.drawn]
        told = [e._replace(meaning=e.meaning.partition("; here")[0]) for e in drawn]
        central = [each for each in self.random if each not in drawn]
        for title, entries in (
            ("taken", self.taken),
            (f"approximated: what was random in training is here {self.draws} draws", told),
            ("approximated: what was random in training is here its central form", central),
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
