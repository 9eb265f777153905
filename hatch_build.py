"""The README as a package index shows it, alone: with links that lead somewhere, or none."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Turns the README's relative links into absolute ones, by `project.urls.Repository`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Give the metadata its readme."""
        repository = metadata.get("urls", {}).get("Repository")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository),
        }


def absolute(text: str, repository: str | None) -> str:
    """Return Markdown without relative links; with no repository, links are the words alone."""

    def turned(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if repository is None:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository.rstrip('/')}/{kind}/main/{target})"

    return _LINK.sub(turned, text)
