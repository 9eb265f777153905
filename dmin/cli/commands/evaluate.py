"""``dmin evaluate``: how far the answers can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dmin.cli.commands.collect import collect
from dmin.cli.commands.command import Command, show_files
from dmin.cli.commands.train import train
from dmin.cli.workspace.built import build_queries
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError

if TYPE_CHECKING:
    from dmin.evaluation.report.results import Result


def only_the_chosen_method(cfg: DictConfig) -> None:
    """Let ``dmin evaluate method=trak`` measure only that method and two controls."""
    chosen = _chosen_method()
    if cfg.benchmark is None or chosen is None:
        return
    beside = ("random", cfg.benchmark.get("reference", "dmin"))
    cfg.benchmark.methods = list(dict.fromkeys((*beside, chosen)))


def _chosen_method() -> str | None:
    """Return the method named on the command line; None if there is none."""
    hydra = HydraConfig.get()
    named = any(override.startswith("method=") for override in hydra.overrides.task)
    return hydra.runtime.choices.get("method") if named else None


@partial(Command, prepare=only_the_chosen_method)
def evaluate(work: Workspace, results: dict[str, Any]) -> None:
    """Measure every method of a benchmark against ground truth."""
    from dmin.cli.workspace.benchmark import benchmark_context, chosen_methods, further_models
    from dmin.evaluation.report.files import save
    from dmin.evaluation.report.tables import terminal

    work.require_one_process()
    benchmark = build_queries(work.need("benchmark"))  # its datasets are queries
    others = further_models(work, benchmark.models)
    if benchmark.prepare:
        for number, each in enumerate((work, *others)):
            for step in (train, collect):
                key = f"{step.name} {number}" if number else step.name
                step.body(each, results.setdefault(key, {}))
    methods, left_out = chosen_methods(work, benchmark, others)
    with benchmark_context(work, benchmark, list(methods.values())) as context:
        report = benchmark.run(context, methods)
    report.left_out |= left_out
    files = save(report, work.run_folder)
    results["figures"] = _figures(report.results)
    results["table"] = [[r.task, r.name, r.metric, r.mean, r.low, r.high] for r in report.results]
    work.console.print(terminal(report))
    show_files(work, *(file.name for file in files))
    chosen = _chosen_method()
    if chosen in report.left_out:  # the method asked for was not measured
        raise DminError(f"method={chosen} was not measured: {report.left_out[chosen]}")


def _figures(found: Sequence[Result]) -> dict[str, str]:
    """Return the first metric of each task for the last method: the one chosen, if one was."""
    methods = [each for each in found if not each.control]
    last = methods[-1].name
    firsts: dict[str, str] = {}
    for each in (each for each in methods if each.name == last):
        firsts.setdefault(f"{each.task} {each.metric}", f"{each.mean:.3f}")
    tasks = {key.partition(" ")[0]: key for key in reversed(firsts)}
    return {"measured": last, **{tasks[t]: firsts[tasks[t]] for t in reversed(tasks)}}
