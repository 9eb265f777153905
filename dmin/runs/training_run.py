"""A training run as settings of dmin: keys that are used, approximated, or refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dmin.runtime.errors import DminError


class Entry(NamedTuple):
    """One setting of a run and how it is handled."""

    key: str  # the trainer's name for it
    value: Any
    meaning: str


@dataclass
class TrainingRun:
    """A trainer's run as settings of dmin.

    Attributes:
        trainer: its name.
        source: the file that was read.
        family: the choice of ``model``.
        name: of the stores collected from it.
        model: settings of ``model``.
        data: settings of ``data``.
        noise: settings of ``noise``.
        collect: settings of ``collect``.
        taken: settings that are used as in training.
        random: settings that made the data random; approximated by their central form.
        drawn: keys in ``random`` that are drawn if ``draws`` is above 1.
        draws: draws of the data per example.
        other: settings that change the loss to one dmin does not compute; refused unless ignored.
        ignored: those of them that the user ignores (``run.ignore``).
        unknown: keys that dmin does not know.
        facts: steps, learning rate, seed ...; they do not change gradients at the final weights.
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
        """Set how many draws of its random data each example's score is the mean of.

        Args:
            draws: 1: no draws, the central form.
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
        """Move ignored entries from ``other`` to ``ignored``; refuse if others remain.

        Args:
            ignore: the trainer's keys (the part after the last dot is enough).

        Raises:
            DminError: the run has another loss, or does not set a key to ignore.
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
            ("ignored (run.ignore)", self.ignored),
        ):
            if entries:
                lines.append(f"  {title}")
                lines += [f"    {e.key} = {shown(e.value)}: {e.meaning}" for e in entries]
        if self.unknown:
            lines.append(f"  unknown keys, not used: {', '.join(self.unknown)}")
        return lines


def shown(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
