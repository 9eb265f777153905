"""``dmin demo``: train, collect, sample, retrieve and evaluate on a small model."""

from typing import Any

from dmin.cli.commands.collect import collect
from dmin.cli.commands.command import Command
from dmin.cli.commands.evaluate import evaluate
from dmin.cli.commands.retrieve import retrieve
from dmin.cli.commands.sample import sample
from dmin.cli.commands.train import train
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.progress import titled


@Command
def demo(work: Workspace, results: dict[str, Any]) -> None:
    """Run all steps in order."""
    work.require_one_process()
    steps = (train, collect, sample, retrieve, evaluate)
    for number, step in enumerate(steps, 1):
        work.notes.rule(titled(f"{number}/{len(steps)}  dmin {step.name}"), align="left")
        step.body(work, results.setdefault(step.name, {}))
