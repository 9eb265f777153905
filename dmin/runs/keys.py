"""The keys of a config: each is used, noted as approximated, ignored, or reported as unknown."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from dmin.runs import wording
from dmin.runs.trainer_tables import FLOWS, Setting, Table
from dmin.runs.training_run import Entry, TrainingRun, shown
from dmin.runtime.errors import DminError

_OF_FAMILIES = {
    "shift": FLOWS,
    "embedded_guidance": ("flux", "flux_2", "flux_kontext", "flux_fill", "flux_control"),
    "max_sequence_length": (*FLOWS, "pixart"),
}


class Keys:
    """The keys of a config; those that nobody reads are reported as unknown.

    Args:
        values: as written in the file.
        run: the run that entries are added to.
        where: prefix for messages, such as ``datasets[0]``.
    """

    def __init__(self, values: Mapping[str, Any], run: TrainingRun, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise DminError(
                f"{run.source}: {where or 'a file that it names'} is not a table of keys."
            )
        self.values: dict[str, Any] = dict(values)
        self.run = run
        self.where = where
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """Return the name of a key in messages."""
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str, default: Any = None, kind: type | None = None) -> Any:
        """Return a value, or the default; numbers and booleans may be written as text.

        Raises:
            DminError: the value is of another kind.
        """
        self._read.add(key)
        value = default if self.values.get(key) is None else self.values[key]
        if value is None or kind is None:
            return value
        try:
            return _converted(value, kind)
        except (ValueError, TypeError, KeyError, OverflowError):
            raise DminError(
                f"{self.run.source}: {self.name(key)} = {shown(value)}, which is not "
                f"{_KINDS[kind]}. Fix it in a copy of the file."
            ) from None

    def take(
        self, key: str, setting: str, default: Any = None, kind: type | None = None, off: Any = None
    ) -> Any:
        """Return a value that becomes a setting, and list it as taken unless it is off.

        Args:
            key: in the file.
            setting: the setting, for the printed table.
            default: the trainer's.
            kind: ``bool``, ``int``, ``float``, ``str``, ``list`` or ``dict``.
            off: the value that turns it off.
        """
        value = self.get(key, default, kind)
        if value is not None and value != off:
            self.run.taken.append(Entry(self.name(key), value, setting))
        return value

    def inside(self, key: str) -> Keys:
        """Return the keys of a nested table; no keys if it is missing."""
        return Keys(self.get(key, {}, dict) or {}, self.run, self.name(key))

    def each(self, key: str) -> list[Keys]:
        """Return the keys of each table of a list.

        Raises:
            DminError: the value is not a list of tables, or is empty.
        """
        found = self.get(key)
        if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
            raise DminError(
                f"{self.run.source}: {self.name(key)} must be a list of one or more tables."
            )
        return [Keys(e, self.run, f"{self.name(key)}[{n}]") for n, e in enumerate(found)]

    def apply(self, table: Table) -> None:
        """Handle every key as a table says, and report the remaining ones as unknown."""
        for key, setting in table.settings.items():
            self.setting(key, setting)
        for key, known in table.rounded.items():
            if not is_off(value := self.get(key)) and value not in table.nothing:
                self.rounded(key, value, known)
        self.refuse(table.other, table.nothing)
        self._note(self.run.random, table.random, table.nothing)
        self.skip(table.inert)
        self.finish()

    def setting(self, key: str, setting: Setting) -> None:
        """Take a key that becomes a setting of the model, if its family has that setting."""
        name, default, kind, off, own = setting
        having = own.split() or _OF_FAMILIES.get(name, (self.run.family,))
        if self.run.family not in having:
            self.get(key)
            return
        value = self.take(key, f"model.{name}", default, kind, off)
        if value is not None and value != off:
            self.run.model[name] = value

    def rounded(self, key: str, value: Any, known: Mapping[str, str]) -> None:
        """Set model.base_dtype if a quantisation is known; else note it as another loss."""
        kind = known.get(str(value).lower())
        if kind is None:
            self.note(self.run.other, key, value, wording.QUANTISED)
            return
        self.run.model["base_dtype"] = kind
        self.note(self.run.random, key, value, wording.ROUNDED.format(kind))

    def note(self, entries: list[Entry], key: str, value: Any, meaning: str) -> None:
        """Add an entry to one of the run's lists: taken, random or another loss."""
        entries.append(Entry(self.name(key), value, meaning))

    def refuse(self, table: Mapping[str, str], off: Collection[Any] = ()) -> None:
        """Note keys, where they are on, that change the loss to one that dmin does not compute.

        Args:
            table: meaning → keys, separated by blanks.
            off: values that turn a key off, besides false, zero and none.
        """
        self._note(self.run.other, table, off)

    def randoms(self, table: Mapping[str, str]) -> None:
        """Note keys, where they are on, that make the data random; ``table`` as in `refuse`."""
        self._note(self.run.random, table, ())

    def draw(self, key: str, value: Any = True, on: bool | None = None) -> Any:
        """Return a setting of `Draws` if a key is on, and mark the key as drawn.

        Args:
            key: in the file, noted as random elsewhere.
            value: the setting's value if the key is on.
            on: whether the key is on; None: decided by its value.
        """
        if not (on if on is not None else not is_off(self.get(key))):
            return type(value)()
        self.run.drawn.add(self.name(key))
        return value

    def _note(self, entries: list[Entry], table: Mapping[str, str], off: Collection[Any]) -> None:
        for meaning, keys in table.items():
            for key in keys.split():
                value = self.get(key)
                if not is_off(value) and (value is True or value not in off):
                    self.note(entries, key, value, meaning)

    def known(self, *names: str) -> dict[str, Any]:
        """Return the values of those keys that are present."""
        found = {name: self.get(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def bounded(self) -> None:
        """Take the error function of the loss (l2, Huber) from kohya's and SimpleTuner's keys."""
        kind = self.take("loss_type", "model.loss_type", "l2", str, off="l2")
        if kind in ("huber", "smooth_l1"):
            self.run.model["loss_type"] = kind
            self.run.model["huber_schedule"] = self.get("huber_schedule", "snr", str)
            self.setting("huber_c", Setting("huber_c"))
        elif kind != "l2":
            self.note(self.run.other, "loss_type", kind, "dmin computes l2, huber and smooth_l1")

    def weighted(self, of_x0: bool) -> None:
        """Take the loss weights of a flow's timesteps from diffusers' and kohya's keys.

        Args:
            of_x0: whether the loss is the error of x0, as in the scripts for SD3.
        """
        scheme = self.get("weighting_scheme", "none", str)
        weights = scheme if scheme in ("sigma_sqrt", "cosmap") else None
        if of_x0:
            if weights == "cosmap":
                told = "cosmap, of the error of x0"
                self.note(self.run.other, "weighting_scheme", told, wording.WEIGHTS)
            weights = "x0" if weights is None else None  # σ² σ⁻² = 1
        elif weights is None and scheme != "none":
            self.note(self.run.random, "weighting_scheme", scheme, wording.TIMESTEPS)
        if weights is not None:
            self.run.model["weighting"] = weights
            meaning = f"model.weighting={weights}"
            self.note(self.run.taken, "weighting_scheme", scheme, meaning)

    def skip(self, keys: str) -> None:
        """Skip keys that change no gradient (between blanks; ``*`` at the end: any suffix)."""
        names = keys.split()
        for key in self.values:
            if any(key == n or (n.endswith("*") and key.startswith(n[:-1])) for n in names):
                self._read.add(key)

    def finish(self) -> None:
        """Report the keys that were not read as unknown."""
        self.run.unknown += [self.name(key) for key in self.values if key not in self._read]


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}


def _converted(value: Any, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    if kind in (dict, list, str):
        if not isinstance(value, kind):
            raise TypeError
        return value
    if isinstance(value, bool):
        raise TypeError
    number = float(value)  # YAML reads 1e-4 as text
    if not math.isfinite(number):
        raise ValueError
    if kind is int and number != int(number):
        raise ValueError
    return kind(number)


def is_off(value: Any) -> bool:
    """Return whether a value, which may be text, turns a key off."""
    text = value.lower() if isinstance(value, str) else value
    return text in (None, False, 0, "", "false", "0", "0.0", "none", [], {})
