"""Read configs of trainers and find their paths, also on another machine or in another folder."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from dmin.runtime.errors import DminError
from dmin.runtime.files import read_regular

MOST_BYTES = 16 << 20


def load(file: Path) -> Any:
    """Parse a TOML, YAML or JSON file (comments in JSON are allowed).

    For a safetensors file, return the metadata of its header.

    Raises:
        DminError: the file cannot be read or parsed.
    """
    if file.suffix == ".safetensors":
        return header(file).get("__metadata__")
    try:
        text = read_regular(file, MOST_BYTES).decode("utf-8-sig")
        if file.suffix == ".toml":
            return tomllib.loads(text)
        if file.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        try:
            return json.loads(text)
        except ValueError:
            return json.loads(_without_comments(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DminError(f"{file} cannot be read ({reason}). Fix it in a copy.") from error


def header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: its tensors' shapes, and ``__metadata__``.

    Raises:
        DminError: it is not a safetensors file.
    """
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 2 <= size <= min(100 << 20, file.stat().st_size):
                raise ValueError("its header has no sensible size")
            found = json.loads(opened.read(size))
            if not isinstance(found, dict):
                raise ValueError("its header is no mapping")
            return found
    except (OSError, ValueError) as error:
        raise DminError(f"{file} is not a safetensors file ({error}).") from error


class Places:
    """Finds the paths of a config, which are relative to the folder the trainer was started in.

    Args:
        source: the config; its folder and all parents are tried, then the current folder.
        root: ``run.root``; if given, only this folder is tried.
        said: the user's settings that replace those of the run: ``family``, ``path`` and
            ``adapter`` of the model, ``data``.
    """

    def __init__(
        self, source: Path, root: Path | None = None, said: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.root = root
        self.said: dict[str, str] = dict(said or {})
        here = source.resolve().parent
        self.starts: list[Path] = [root] if root else [here, *here.parents, Path.cwd()]

    def find(self, text: str, key: str) -> Path:
        """Return the existing file or folder that a path of the config refers to.

        With ``run.root``, a path from another machine is found by its last components.

        Raises:
            DminError: the path is empty, or nothing is found.
        """
        if not text.strip():
            raise DminError(f"{self.source}: {key} is missing; it must be a path.")
        parts = PureWindowsPath(text).parts if _is_windows(text) else Path(text).parts
        path = Path(text).expanduser()
        if path.is_absolute() and path.exists():
            return path
        relative = [part for part in parts if part not in ("/", "\\") and ":" not in part]
        tails = [relative]
        if self.root is not None:
            tails += [relative[cut:] for cut in range(1, len(relative))]
        elif path.is_absolute() or _is_windows(text):
            tails = []
        for tail in tails:
            for start in self.starts:
                if (found := start.joinpath(*tail)).exists():
                    return found
        raise DminError(
            f"{self.source}: {key} = {text}, which does not exist (searched from "
            f"{self.root or 'the folder of the file, its parents, and the current folder'}). Set "
            f"run.root=FOLDER to the folder below which the end of the path is found."
        )

    def seek(self, text: str | None, key: str) -> Path | None:
        """Return the result of `find`, or None if nothing is found."""
        try:
            return self.find(text, key) if text else None
        except DminError:
            return None

    def maybe(self, text: str | None, key: str) -> str | None:
        """Return a path, or the text itself if it may be a name on the Hub."""
        if text is None:
            return None
        try:
            return spelled(self.find(text, key))
        except DminError:
            if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
                return text
            raise

    def folder(self, text: str, key: str) -> str:
        """Return a path that must exist."""
        return spelled(self.find(text, key))


def spelled(path: Path) -> str:
    """Return a path, relative to the current folder if it is inside it."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def _is_windows(text: str) -> bool:
    return bool(re.match(r"[A-Za-z]:[\\/]|\\\\", text)) or ("\\" in text and "/" not in text)


def _without_comments(text: str) -> str:
    """Remove comments and trailing commas from JSON; quoted text is unchanged."""
    kept = re.sub(
        r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or " ", text, flags=re.DOTALL
    )
    return re.sub(r'("(?:\\.|[^"\\])*")|,(\s*[\]}])', lambda m: m[1] or m[2], kept)
