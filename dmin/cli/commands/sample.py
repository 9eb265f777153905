"""``dmin sample``: generate query images."""

from typing import Any

from dmin.cli.commands.command import Command
from dmin.cli.workspace.built import build_queries
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError


@Command
def sample(work: Workspace, results: dict[str, Any]) -> None:
    """Generate the query images."""
    from dmin.queries import Generated

    source = build_queries(work.cfg.queries)
    if not isinstance(source, Generated):
        raise DminError(
            "`dmin sample` generates images: set queries=generated queries.prompts=[…]."
        )
    results["queries"] = len(work.queries(source))
    results["figures"] = {"images": f"{results['queries']:,}"}
