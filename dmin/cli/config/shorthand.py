"""Abbreviations of the command line, expanded for Hydra."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SEVERAL = re.compile(r"method=([\w-]+(?:,[\w-]+)+)")
# What stands where a command's own choice is none that could do its work.
_CHOICES = {"demo": "experiment=digits", "outliers": "method=grad_dot"}
UPLOADS = ("queries=images", "queries.root=uploads")  # of `serve`, each a file of its own


def kind_of(
    queries: Mapping[str, Any], data: Mapping[str, Any] | None, words: Sequence[str]
) -> str:
    """Return the choice of queries for files: clips if the training data are clips."""
    if "prompts" in queries:
        return "generated"
    of_clips = (data or {}).get("_target_") == "dmin.data.video.VideoFolder"
    return "clips" if of_clips or "data=video_folder" in words else "images"


def spelled_out(command: str, words: Sequence[str]) -> list[str]:
    """Expand the words after ``dmin <command>`` for Hydra.

    ``dmin retrieve method=a,b,c`` without ``-m`` is one answer by several methods: method=a, and
    the others beside it. ``-q`` or ``--quiet`` is extras.quiet=true.
    """
    words = ["++extras.quiet=true" if word in ("-q", "--quiet") else word for word in words]
    given = {word.partition("=")[0].lstrip("+") for word in words}
    chosen = _CHOICES.get(command, "")
    if chosen and chosen.partition("=")[0] not in given:
        return [chosen, *words]
    words = [*(UPLOADS if command == "serve" else ()), *words]
    if command not in ("retrieve", "serve") or {"-m", "--multirun"} & given:
        return list(words)
    found: list[str] = []
    for word in words:
        several = _SEVERAL.fullmatch(word)
        first, *others = several[1].split(",") if several else [""]
        beside = f"retrieve.beside=[{','.join(others)}]"
        found += [f"method={first}", beside] if several else [word]
    return found
