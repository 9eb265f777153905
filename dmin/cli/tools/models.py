"""``dmin models [PATH]``: the model families and the refused pipelines; or the family of PATH."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from dmin.cli.tools.arguments import Arguments
from dmin.runtime.escape import printable

PAGE = """
usage: dmin models [PATH]

Without a path: every family, the pipelines of diffusers it opens, the tensors that identify
a single file, and why the others are refused. With a path: the family of that folder or file.

examples:
  dmin models
  dmin models my/checkpoint
"""
FAMILIES = ("`model=`", "opens", "network", "prompt", "trained as", "single file by")
REFUSED = ("refused", "because")
_INDENT = 24
_UNKNOWN = "no family supports its network yet (`dmin models PATH` prints the outline of one)"


def run(arguments: Sequence[str]) -> None:
    """Print it."""
    parser = Arguments("models")
    parser.add_argument("path", nargs="?")
    asked = parser.read(arguments)
    if asked.path is not None:
        from dmin.models.recognition import recognise

        found = recognise(asked.path)
        print(printable(f"{asked.path}: {found.evidence} → model={found.family}"))
        return
    for name, *rest in families():
        print(_wrapped(name, "; ".join(filter(None, rest))))
    print("\nrefused:")
    for names, why in refused():
        print(_wrapped(f"{why}:", names))


def families() -> Iterator[tuple[str, ...]]:
    """Yield the pipelines and processes of each family."""
    from dmin.models.conditioning import Captioned, SizeConditioning
    from dmin.models.relatives import all_families

    for name, family in sorted(all_families().items()):
        claims: Any = family.claims
        prompt = "caption" if issubclass(family, Captioned) else "class label"
        yield (
            f"`{name}`",
            ", ".join((*claims.pipelines, *claims.own)),
            claims.network,
            prompt + (", sizes" if issubclass(family, SizeConditioning) else ""),
            ", ".join(process.__name__ for process in family.processes),
            ", ".join(f"`{key}`" for key in claims.keys),
        )


def refused() -> Iterator[tuple[str, str]]:
    """Yield the refused pipelines of the installed diffusers, grouped by reason."""
    from dmin.models.recognition import pipelines_of_diffusers
    from dmin.models.relatives import claimants, reason

    found: dict[str, list[str]] = {}
    for name in pipelines_of_diffusers():
        if not claimants(name):
            found.setdefault(reason(name) or _UNKNOWN, []).append(name.removesuffix("Pipeline"))
    yield from sorted((", ".join(names), why) for why, names in found.items())


def _wrapped(head: str, text: str) -> str:
    head, indent = f"  {head.strip('`')} ", " " * _INDENT
    start = head.ljust(_INDENT) if len(head) <= _INDENT else f"{head}\n{indent}"
    text = text.replace("`", "")
    return start + textwrap.fill(text, 90, initial_indent=indent, subsequent_indent=indent).lstrip()
