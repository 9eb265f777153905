"""Datasets as Hugging Face's ``datasets`` reads them: parquet, Arrow, image folders, the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal  # noqa: F401 (Literal is read from the annotations of Pixels)

from dmin.data.base import SCHEMA, Example, Facts
from dmin.data.checked import NO_CAPTION, Checked, describe_problems, not_read, require_same
from dmin.data.masks import unlike, with_partner
from dmin.data.metadata import split_row
from dmin.data.pixels import Unreadable
from dmin.data.survey import Rows, read_bytes, survey_rows
from dmin.runtime.errors import DminError

# Kinds of files, by names of loaders of `datasets`. Others are not used, as some read pickles.
_TABLES = ("parquet", "arrow", "csv", "json")


@dataclass(eq=False)
class HFDataset(Checked):
    """A split of a dataset that ``datasets`` can read.

    Other columns of numbers, text and booleans become metadata of the example; the rest is not
    read, and named. If the label is a class, its name is added as ``<label>_name``.

    Args:
        path: a folder that ``Dataset.save_to_disk`` wrote, a ``.parquet`` or ``.arrow`` file, a
            folder of such files or of images, or a name on the Hub (needs a network once).
        split: the split, such as ``train``.
        image: column of the images.
        text: column of the caption; None for no captions.
        label: column of the label; None for no labels.
        condition_image: column of the condition images; None for none.
        id: column of the id. None uses the row number, which is stable as long as rows are only
            appended.
        name: configuration of a dataset on the Hub, if it has several.
        revision: commit, tag or branch of a dataset on the Hub; a commit never changes.

    Attributes:
        summary: the columns that are not read, on one line.

    Raises:
        DminError: ``datasets`` is not installed, the dataset cannot be loaded, or a column is
            missing or of the wrong type.
    """

    path: str | Path
    _: KW_ONLY
    split: str = "train"
    image: str = "image"
    text: str | None = None
    label: str | None = None
    id: str | None = None
    name: str | None = None
    revision: str | None = None
    condition_image: str | None = None

    def __post_init__(self) -> None:
        """Load the table; images are decoded on access."""
        super().__post_init__()
        if self.id is None and any(sign in self.split for sign in "[+"):
            raise DminError(
                f"data.split={self.split}: row numbers of a slice are not stable ids. "
                f"Give a column with ids (data.id), or use data=subset of the whole split."
            )
        rows = self._load()
        self.fingerprint: Any = rows._fingerprint
        for setting, column in self._columns().items():
            if column is not None and column not in rows.features:
                raise DminError(
                    f"data.{setting}={column!r} is not a column of {self.path}. Its columns: "
                    f"{', '.join(rows.features)}."
                )
        self.classes: Any = None
        if self.label is not None:
            self.classes = getattr(rows.features[self.label], "names", None)
        self._rows = self._needed(rows)
        self._images = [name for name in (self.image, self.condition_image) if name]
        self._known = self._rows.remove_columns(self._images)
        self._found = self._survey() if self.check else None
        wrong = self._found.problems if self._found else {}
        problems = {self._name(at): reason for at, reason in wrong.items()}
        self.leave_out(problems, len(self._rows), f"data.path={self.path}")
        self._kept = [at for at in range(len(self._rows)) if at not in wrong]

    def _columns(self) -> dict[str, str | None]:
        """Return the column of each setting."""
        named = {name: getattr(self, name) for name in ("image", "text", "label", "id")}
        # Part of fingerprints, so only present if set.
        given = {"condition_image": self.condition_image} if self.condition_image else {}
        return {**named, **given}

    def _survey(self) -> Rows:
        """Survey all rows."""
        settings = {"max_pixels": self.max_pixels, **self._columns(), **self.settings()}
        settings |= {"skip": self.on_error == "skip", "check": self.check, "schema": SCHEMA}
        settings["table"] = self.fingerprint
        return survey_rows(len(self._rows), self._look, settings)

    def _look(self, at: int) -> tuple[str, str | None]:
        """Return what gradients of a row depend on, as text, and the problem with it, if any."""
        try:
            row = self._rows[at]
            content = [_content(row[name], "") for name in self._images]
            sizes = [self.probe(each, "") for each in content if self.check]
            if reason := unlike(*sizes):
                return "", reason
            known = self._facts(row, f"row {at}")
            if self.on_error == "skip" and self.text and known.caption is None:
                return "", NO_CAPTION
            return _text(self._name(at), content, known), None
        except DminError as error:
            return "", str(getattr(error, "reason", error)).rstrip(".")

    def _name(self, position: int) -> str:
        return str(self._rows[position][self.id]) if self.id else _row_id(position)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        position = self._kept[index]
        row = self._rows[position]
        name = str(row[self.id]) if self.id else _row_id(position)
        where = f"image {name!r} of {self.path}"
        content = [_content(row[column], where) for column in self._images]
        known = self._facts(row, where)
        surveyed = self._found.sums[position] if self._found else ""
        require_same(name, _text(name, content, known).encode(), surveyed)
        (image, sizes), *given = (self.decode(each, where) for each in content)
        found = Example(name, image, known.label, known.caption, known.metadata or {}, sizes)
        return with_partner(found, *given)

    def facts(self, index: int) -> Facts:
        """Return what is known about a row besides its image, which is not read."""
        row = self._known[self._kept[index]]
        return self._facts(row, f"image {self.ids[index]!r} of {self.path}")

    def _facts(self, row: dict[str, Any], where: str) -> Facts:
        """Return label, caption and metadata of a row."""
        said = {name: value for name, value in row.items() if name not in self._images}
        label, caption, rest, _ = split_row(said, self.label, self.text, where)
        rest = {name: value for name, value in (rest or {}).items() if name != self.id}
        if self.classes is not None and isinstance(label, int) and label >= 0:
            rest.setdefault(f"{self.label}_name", self.classes[label])
        return Facts(label, caption, rest)

    @property
    def ids(self) -> list[str]:
        """The ids of the rows, in order."""
        if self.id is None:
            return [_row_id(position) for position in self._kept]
        values = self._rows[self.id]
        return [str(values[position]) for position in self._kept]

    def describe(self) -> dict[str, Any]:
        """Return settings, and a digest of the id, images, label and caption of every row.

        Raises:
            DminError: some rows cannot be read (with ``check`` this is found earlier).
        """
        self._found = self._found or self._survey()
        if self._found.problems.keys() & set(self._kept):
            problems = {self._name(at): why for at, why in self._found.problems.items()}
            raise DminError(describe_problems(problems, len(self), f"data.path={self.path}"))
        return self.described(len(self), content=self._found.digest)

    def describe_fully(self, kept: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return settings, and the fingerprint that ``datasets`` gives the table; ignore ``kept``.

        It depends on the files' paths and modification times, or on the commit on the Hub, so a
        copy elsewhere is another dataset; ``save_to_disk`` stores it inside the copy.
        """
        content = {**self._columns(), "split": self.split, "fingerprint": self.fingerprint}
        found = self.described(len(self), **content)
        del found["schema"]
        return found

    def _load(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DminError(
                "data=hf_dataset needs the package datasets. Try: pip install 'dmin[data]'."
            ) from error
        path = Path(self.path)
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                found = datasets.load_from_disk(str(path))
                if isinstance(found, datasets.Dataset):
                    return found
                if self.split not in found:
                    raise ValueError(f"there is no split {self.split!r} among {', '.join(found)}")
                return found[self.split]
            if path.is_file():
                kind = path.suffix.removeprefix(".")
                if kind not in _TABLES:
                    raise ValueError(f"only these files are read: {', '.join(_TABLES)}")
                return datasets.load_dataset(
                    kind, data_files={self.split: str(path)}, split=self.split
                )
            if str(self.path) == "pandas":
                raise ValueError("this loader of datasets reads pickles, which can run code")
            return datasets.load_dataset(
                str(self.path), self.name, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DminError(
                f"data.path={self.path}, data.split={self.split} cannot be loaded: {reason}. Give "
                f"an existing folder or .parquet or .arrow file, or the name of a dataset on "
                f"the Hub with a network connection."
            ) from error

    def _needed(self, rows: Any) -> Any:
        """Return the table with only the columns that are used, images undecoded."""
        import datasets

        for name in filter(None, (self.image, self.condition_image)):
            if isinstance(rows.features[name], datasets.Image):
                # By default `datasets` decodes images, and in another way than dmin.
                rows = rows.cast_column(name, datasets.Image(decode=False))
        named = [name for name in self._columns().values() if name]
        plain = [name for name, feature in rows.features.items() if _is_plain(feature)]
        used = list(dict.fromkeys([*named, *plain]))
        self.summary: str = not_read(
            f"column {name} ({getattr(feature, 'dtype', None) or type(feature).__name__})"
            for name, feature in rows.features.items()
            if name not in used
        )
        return rows.select_columns(used)


def _row_id(index: int) -> str:
    return f"row-{index:07d}"


def _is_plain(feature: Any) -> bool:
    kinds = ("string", "large_string", "bool", "int", "uint", "float")
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in kinds


def _content(cell: Any, where: str) -> bytes:
    """Return the bytes of an image file from a table's cell."""
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return bytes(cell["bytes"])
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        return read_bytes(Path(cell["path"]), where)
    if cell is None:
        raise Unreadable(where, "it is missing")
    raise Unreadable(
        where, f"the column holds {type(cell).__name__}, not image files; name another"
    )


def _text(id: str, content: Sequence[bytes], known: Facts) -> str:
    """Return what gradients of a row depend on, as text."""
    image, *given = (hashlib.sha256(each).hexdigest() for each in content)
    return json.dumps([id, image, *known[:2], *given])
