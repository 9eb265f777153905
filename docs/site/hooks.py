"""What MkDocs is told beside mkdocs.yml: pages that lie outside of docs/, and their links.

The Markdown of this repository links to files beside it, so that it reads right where it lies.
Here the pages of other folders join the site, links are turned to where their targets went, and
what has no page (code, tests) is linked to the repository, where `repo_url` names one, else left.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parents[2]
PROJECT = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "ROADMAP.md": "project/roadmap.md",
    "SECURITY.md": "project/security.md",
}
_LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)"
)
_FENCED = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the experiments and of the project, and the files that pages link to."""
    pages = dict(PROJECT)
    for page in sorted(TOP.glob("experiments/*/README.md")):
        pages[page.relative_to(TOP).as_posix()] = f"experiments/{page.parent.name}/index.md"
    own = {f"docs/{file.src_uri}": file.src_uri for file in files}
    moved = own | pages | {"README.md": "index.md"}
    linked = {
        target
        for name in moved
        if name.endswith(".md")
        for _, _, link, _ in _LINK.findall((TOP / name).read_text())
        if (TOP / (target := _resolved(name, link))).is_file() and target not in moved
    }
    shown = {".png", ".csv", ".html", ".json", ".sbatch"}
    moved |= {name: name for name in sorted(linked) if Path(name).suffix in shown}
    for name, uri in moved.items():
        if not name.startswith("docs/") and name != "README.md":
            files.append(File.generated(config, uri, abs_src_path=str(TOP / name)))
    config["extra"]["moved"] = moved
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn the links of a page to where their targets went."""
    moved: dict[str, str] = config["extra"]["moved"]
    here = page.file.src_uri
    source = next(name for name, uri in moved.items() if uri == here and name != "README.md")

    def turned(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups(default="")
        target = _resolved(source, link)
        if target in moved:
            to = posixpath.relpath(moved[target], posixpath.dirname(here) or ".")
            return f"{image}[{text}]({to}{anchor})"
        if not (TOP / target).exists():
            return match[0]  # MkDocs says so
        return f"[{text}]({config.repo_url}/blob/main/{target})" if config.repo_url else text

    parts = _FENCED.split(markdown)
    return "".join(p if p.startswith("```") else _LINK.sub(turned, p) for p in parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Turn the links of a notebook, whose Markdown MkDocs does not see, to pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="(?!https?:)([^"#]+)\.(?:md|ipynb)(["#])', r'href="\1.html\2', html)


def _resolved(source: str, link: str) -> str:
    return os.path.normpath(posixpath.join(posixpath.dirname(source), link))
