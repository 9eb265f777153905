"""Build the methods and the context of a benchmark from a configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dmin.cli.config.renamed import rename, warn_of
from dmin.cli.config.validate import validate
from dmin.cli.workspace.built import build
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.progress import Lines

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method
    from dmin.data import Dataset
    from dmin.evaluation import Benchmark, BenchmarkContext
    from dmin.evaluation.context import OnProgress
    from dmin.models import DiffusionModel
    from dmin.store import Store


def further_models(work: Workspace, count: int) -> list[Workspace]:
    """Return the workspaces of models trained with further seeds.

    Args:
        work: of the first model.
        count: of models, including the first.
    """
    found = []
    for seed in range(work.cfg.seed + 1, work.cfg.seed + count):
        other = work.at(f"{work.cfg.model.path}-seed{seed}")
        with open_dict(other.cfg):
            other.cfg.train.seed = seed
        found.append(other)
    return found


def chosen_methods(
    work: Workspace, benchmark: Benchmark, others: Sequence[Workspace] = ()
) -> tuple[dict[str, Method], dict[str, str]]:
    """Build the methods of a benchmark; also return those that lack a setting, and which.

    ``all`` are those of ``conf/method`` and of the user's own ``--config-dir``.

    Args:
        work: its ``method`` replaces the choice of the same name, with its settings.
        benchmark: lists methods and their settings.
        others: models for the methods that average over several.

    Raises:
        DminError: there is no such method.
    """
    known = GlobalHydra.instance().config_loader().get_group_options("method")
    names = known if benchmark.methods == "all" else list(benchmark.methods)
    settings = benchmark.settings or {}
    asked = (*names, *benchmark.without, *settings)
    if unknown := [name for name in asked if name not in known]:
        raise DminError(
            f"benchmark: there is no method {unknown[0]!r}. Choices: {', '.join(known)}."
        )
    built: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name in benchmark.without:
            continue
        cfg = with_method(work, name, settings.get(name, {}))
        if others and cfg.method.get("checkpoints") == []:
            cfg.method.checkpoints = [str(other.cfg.model.path) for other in others]
        missing = OmegaConf.missing_keys(cfg.method)
        if missing:
            left_out[name] = ", ".join(
                f"needs benchmark.settings.{key.replace('method', name, 1)}=..."
                for key in sorted(missing)
            )
            continue
        validate(cfg)
        built[name] = build(cfg.method)
    return built, left_out


def with_method(work: Workspace, name: str, settings: Mapping[str, Any]) -> DictConfig:
    """Return a configuration whose method is that of the given name."""
    cfg = copy.deepcopy(work.cfg)
    with open_dict(cfg):
        if name != HydraConfig.get().runtime.choices.get("method"):
            cfg.method = compose(f"method/{name}").method
        cfg.method = OmegaConf.merge(cfg.method, settings)
    warn_of(rename(cfg))
    return cfg


@contextmanager
def benchmark_context(
    work: Workspace, benchmark: Benchmark, methods: Sequence[Method]
) -> Iterator[BenchmarkContext]:
    """Provide the context of a benchmark, with progress bars.

    Args:
        work: model, data and stores.
        benchmark: with the number of models retrained at once.
        methods: whose requirements, such as further models, the context provides.
    """
    import torch

    from dmin.evaluation import BenchmarkContext, Ensemble, Recipe

    logging.getLogger("dmin.attribution").setLevel(logging.WARNING)  # a line a fit is too many
    ensemble = untrained = None
    if work.cfg.train is not None:
        how = dict(build(work.cfg.train).keywords)
        recipe = Recipe(**{name: how[name] for name in Recipe.__dataclass_fields__ if name in how})
        device = work.trainer().strategy.root_device
        cache = work.outputs / "retrained"
        ensemble = Ensemble(how["model"], work.data, recipe, cache, benchmark.chunk, device)
        torch.manual_seed(work.cfg.seed)
        untrained = how["model"]().eval()

    def ask(name: str, source: Any) -> FeatureSet:
        return work.query_side(source, name.replace("_", "-"), methods)

    def collect(model: DiffusionModel, dataset: Dataset, role: str) -> Store:
        return work.store(dataset, role, not role.endswith("-train"), model)

    train = work.train_side(methods)
    with _shown(work) as on_progress:
        yield BenchmarkContext(work.model, train, ask, collect, ensemble, untrained, on_progress)


@contextmanager
def _shown(work: Workspace) -> Iterator[OnProgress]:
    """Show a bar for each activity, or lines without a terminal."""
    if not work.notes.is_terminal:
        yield _lines(work)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    bars: dict[str, Any] = {}
    with Progress(*columns, TimeElapsedColumn(), console=work.notes) as progress:

        def on_progress(what: str, done: int, total: int) -> None:
            what, _, detail = what.partition(": ")
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            text = f"{what}: {detail}" if detail and done < total else what
            progress.update(bars[what], completed=done, total=total, description=text)

        yield on_progress


def _lines(work: Workspace) -> OnProgress:
    """Return a callback that occasionally prints a line for each activity."""
    lines: dict[str, Lines] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        what, _, detail = what.partition(": ")
        known = lines.get(what)
        again = known and (known.done == known.total or known.total != total or done < known.done)
        if known is None or again:
            lines[what] = Lines(what, total, unit="")
            lines[what].skip(done)
        elif line := known.due(done):
            text = f"{line}  {detail}" if done < total else line
            work.notes.print(text, soft_wrap=True, highlight=False)

    return on_progress
