"""The steps behind the commands, each a few lines over the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.markup import escape

from dmin.cli.built import build, build_queries
from dmin.cli.config.compose import needs
from dmin.cli.config.renamed import rename
from dmin.cli.config.tree import settings_tree
from dmin.cli.jobs.record import recorded
from dmin.cli.jobs.slurm import after_stop
from dmin.cli.parts import joined
from dmin.cli.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.runtime.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from dmin.evaluation.report.results import Result

Body = Callable[[Workspace, dict[str, Any]], None]
BODIES: dict[str, Body] = {}
COMMANDS: dict[str, Callable[[DictConfig], None]] = {}
TRAINING = ("train", "data", "trainer", "logger")
FEATURES = ("model", "sketch", "timesteps", "noise", "collect", "data", "trainer", "shard")


def command(
    *subtrees: str, prepare: Callable[[DictConfig], None] | None = None
) -> Callable[[Body], Body]:
    """Make a command of a body: workspace, printed settings, run record.

    Args:
        subtrees: the parts of the configuration that the body reads.
        prepare: brings the configuration into the form that is printed, recorded and run.
    """

    def decorate(body: Body) -> Body:
        @needs(*subtrees)
        @wraps(body)
        def step(cfg: DictConfig) -> None:
            if prepare is not None:
                prepare(cfg)
            work = Workspace(cfg, body.__name__)
            if not work.is_main:  # one of the processes that Lightning started for the main one
                body(work, {})
                return
            if cfg.extras.print_config:
                file = _shown(work.run_folder) / "config.yaml"
                work.console.print(settings_tree(body.__name__, cfg, subtrees, file))
            with recorded(cfg, work.run_folder, body.__name__) as results:
                body(work, results)
            work.console.print(
                f"[dim]again: dmin repeat {_shown(work.run_folder)}[/]", soft_wrap=True
            )

        BODIES[body.__name__], COMMANDS[body.__name__] = body, step
        return body

    return decorate


@command(*TRAINING)
def train(work: Workspace, results: dict[str, Any]) -> None:
    """Train a model and save it at ``model.path``, unless it is there."""
    path = Path(work.cfg.model.path)
    settings = {"train": work.resolved("train")["train"], "data": work.resolved("data")["data"]}
    results["model"], results["figures"] = str(path), {"model": str(path)}
    with work.turn(path, done=path.exists()):
        if _trained(path, settings):
            work.console.print(f"[bold]model[/]: found {path}")
            return
        trainer = work.trainer()
        trainer.logger = _logger(work, settings) if work.is_main else None
        model = build(work.need("train"))(dataset=work.data, trainer=trainer)
        if not work.is_main:
            return
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        partial.rename(path)
    work.console.print(f"[bold]model[/]: saved {path}")


@command(*FEATURES, "doctor")
def doctor(work: Workspace, results: dict[str, Any]) -> None:
    """Examine the model on a few examples, and say what collecting would take."""
    from dmin.doctor import diagnose

    work.require_one_process()
    examples, dtype = work.cfg.doctor.examples, work.cfg.collect.dtype
    data = work.data  # first, as it is read sooner than the model
    found = diagnose(work.collector, data, examples, work.trainer(), dtype)
    file = work.run_folder / "diagnosis.json"
    found.save(file)
    results["checks"] = {check.name: check.verdict for check in found.checks}
    results["figures"] = {"checks": str(len(found.checks)), "failed": str(len(found.failed))}
    for table in found.tables():
        work.console.print(table)
    if not found.passed:
        raise DminError(
            f"{len(found.failed)} of {len(found.checks)} checks failed: "
            f"{', '.join(check.name for check in found.failed)}. What to do stands beside each "
            f"above and in {file}."
        )
    work.console.print(f"Nothing failed. All of it is in\n  {file}", soft_wrap=True)


@command(*FEATURES)
def collect(work: Workspace, results: dict[str, Any]) -> None:
    """Collect the gradients of the training examples into a store."""
    with StopSignals() as stop:
        try:
            store = work.collect_train(stop)
        except Stopped as stopped:
            after_stop(stopped, work.cfg.collect.requeue, work.is_main, work.console.print)
            raise
    if not work.is_main:
        return
    if not store.complete:
        from dmin.collect.completion import what_is_missing

        rows, shard = f"{len(store):,} of {store.manifest.num_examples:,}", work.cfg.shard
        results["figures"] = {"rows": rows, "store": store.path.name}
        results.update(store=str(store.path), rows=len(store))
        work.console.print(
            f"[bold]store[/]: {store.path}\n  shard {shard.id} of {shard.num} is done; "
            f"{what_is_missing(store)}."
        )
        return
    size = sum(file.stat().st_size for file in store.path.glob("*.h5"))
    raw = 4 * work.collector.attributed.count * store.layout.draws * len(store.layout.timesteps)
    results.update(
        figures={
            "rows": f"{len(store):,}",
            "MiB": f"{size / 2**20:,.1f}",
            "store": store.path.name,
        },
        store=str(store.path),
        rows=len(store),
        bytes=size,
        digest=store.digest(),
        raw_bytes=raw,
    )
    work.console.print(
        f"[bold]store[/]: {store.path}\n"
        f"  {len(store):,} rows, {size / 2**20:,.1f} MiB; {size / len(store) / 1024:,.1f} KiB an "
        f"example instead of {raw / 1024:,.0f} KiB ({raw * len(store) / size:,.0f} times less)"
    )
    peak = work.collector.peak
    if peak.bytes:  # nothing was collected, or nothing grew
        results["peak"] = {"bytes": peak.bytes, "meaning": peak.meaning}
        work.console.print(f"  {peak.bytes / 2**20:,.1f} MiB {peak.meaning}")


@command("model", "queries")
def sample(work: Workspace, results: dict[str, Any]) -> None:
    """Generate the query images."""
    from dmin.queries import Generated

    source = build_queries(work.cfg.queries)
    if not isinstance(source, Generated):
        raise DminError(
            "`dmin sample` generates images: say queries=generated queries.prompts=[…]."
        )
    results["queries"] = len(work.queries(source))
    results["figures"] = {"images": f"{results['queries']:,}"}


@command(*FEATURES, "queries", "method", "index", "retrieve")
def retrieve(work: Workspace, results: dict[str, Any]) -> None:
    """Find the training examples behind each query, and show them."""
    from dmin.attribution import Approximate, Ranking, retrieve_part
    from dmin.attribution import retrieve as search
    from dmin.attribution.confidence import with_confidence
    from dmin.attribution.methods.popularity import PopularityCorrected
    from dmin.attribution.ranking_files import save_ranking
    from dmin.attribution.ranking_table import ranking_table
    from dmin.attribution.search.selection import Selection
    from dmin.gallery.html import save_html
    from dmin.gallery.png import save_png

    work.require_one_process(shards=True)
    options = work.resolved("retrieve")["retrieve"]
    method = build(work.cfg.method)
    if options["popularity"]:
        method = PopularityCorrected(method)
    chosen = ("order", "min_score", "where", "group_by", "group_score", "split")
    selection = Selection(**{name: options[name] for name in chosen})
    source = build_queries(work.cfg.queries)  # what is wrong with it is said before the work
    train = work.train_side([method])
    queries = work.query_side(source, methods=[method])
    index = None if work.cfg.index is None else build(work.cfg.index)
    rows, device = options["rows"], options["device"]
    k = options["k"]
    # Others that may take their places; an approximate index finds none to rely on.
    sure = options["confidence"] and not (selection.group_by or isinstance(index, Approximate))
    wide = max(k, min(3 * k, selection.count(train.store.metadata))) if sure else k
    asked = method, wide, rows, selection, index, device
    if work.share.shards == 1:
        ranking: Ranking | None = search(queries, train, *asked)
    else:
        part = retrieve_part(queries, train, work.share.range(len(train)), *asked)
        ranking = joined(work, part, queries, train, method, selection)
    if ranking is None:
        return
    if sure:
        ranking = with_confidence(ranking, queries, train, method, k)
    folder = work.run_folder
    save_ranking(ranking, folder)
    images = (lambda id: queries.image(id).numpy()), (lambda id: train.image(id).numpy())
    notes = {
        "training examples": f"{len(train):,}",
        "model": str(work.cfg.model.path),
        "sketch": f"{work.collector.sketch.family}, k = {work.collector.sketch.dim:,}",
    }
    save_png(ranking, *images, folder / "gallery.png")
    save_html(ranking, *images, folder / "gallery.html", notes=notes)
    first = " ".join(found[0] for found in ranking.train_ids[:3])
    results["figures"] = {"queries": f"{len(queries.store):,}", "first found": f"{first} …"}
    results["files"] = [str(folder / name) for name in ("gallery.png", "gallery.html")]
    work.console.print(ranking_table(ranking, width=work.console.width))
    for what, note in ranking.notes.items():
        work.console.print(f"[bold]{what}[/]: {note}")
    work.console.print(
        f"Look at\n  {folder / 'gallery.html'}\n  {folder / 'gallery.png'}\n"
        f"  {folder / 'ranking.csv'}",
        soft_wrap=True,
    )


@command(*FEATURES, "method", "outliers")
def outliers(work: Workspace, results: dict[str, Any]) -> None:
    """Rank the training examples by their influence on themselves, and show the first."""
    from rich.table import Table

    from dmin.attribution.self_influence import save_self_influence, self_influence
    from dmin.gallery.sheet import save_sheet

    work.require_one_process()
    method, k = build(work.cfg.method), work.cfg.outliers.k
    train = work.train_side([method])
    scores = self_influence(train, method)
    folder, store = work.run_folder, train.store
    order = save_self_influence(store, scores, folder / "outliers.csv", method.name)
    first = order[:k].tolist()
    labels = [str(store.metadata[row].get("label", "")) for row in first]
    ids, spelled = [store.ids[row] for row in first], [f"{scores[row]:.4g}" for row in first]
    table = Table(title=f"Training examples that explain themselves most, by {method.name}")
    for column in ("", "example", "label", "score with itself"):
        table.add_column(column, justify="left" if column == "example" else "right")
    for rank, line in enumerate(zip(ids, labels, spelled, strict=True), 1):
        table.add_row(str(rank), *(escape(cell) for cell in line))
    below = [
        f"{label} · {score}" if label else score
        for label, score in zip(labels, spelled, strict=True)
    ]
    pictures = [train.image(id).numpy() for id in ids]
    title = "Rare, or labelled wrongly? They explain themselves most"
    save_sheet(pictures, ids, below, folder / "outliers.png", title=title)
    results["figures"] = {"examples": f"{len(store):,}", "first": " ".join(ids[:3]) + " …"}
    results["files"] = [str(folder / name) for name in ("outliers.png", "outliers.csv")]
    work.console.print(table)
    work.console.print(
        f"Look at\n  {folder / 'outliers.png'}\n  {folder / 'outliers.csv'}", soft_wrap=True
    )


def only_the_chosen_method(cfg: DictConfig) -> None:
    """Let ``dmin evaluate method=trak`` measure that method, beside two controls, and no other."""
    chosen = _chosen_method()
    if cfg.benchmark is None or chosen is None:
        return
    beside = ("random", cfg.benchmark.get("reference", "dmin"))
    cfg.benchmark.methods = list(dict.fromkeys((*beside, chosen)))


def _chosen_method() -> str | None:
    """Return the method that the command line chooses; None if it leaves it to the benchmark."""
    hydra = HydraConfig.get()
    named = any(override.startswith("method=") for override in hydra.overrides.task)
    return hydra.runtime.choices.get("method") if named else None


@command(*TRAINING, *FEATURES, "method", "benchmark", prepare=only_the_chosen_method)
def evaluate(work: Workspace, results: dict[str, Any]) -> None:
    """Measure every method of a benchmark against ground truth."""
    from dmin.cli.benchmarks import benchmark_context, chosen_methods, further_models
    from dmin.evaluation.report.files import save
    from dmin.evaluation.report.tables import terminal

    work.require_one_process()
    benchmark = build_queries(work.need("benchmark"))  # its datasets are queries
    others = further_models(work, benchmark.models)
    if benchmark.prepare:
        for number, each in enumerate((work, *others)):
            for name in ("train", "collect"):
                BODIES[name](each, results.setdefault(f"{name} {number}" if number else name, {}))
    methods, left_out = chosen_methods(work, benchmark, others)
    with benchmark_context(work, benchmark, list(methods.values())) as context:
        report = benchmark.run(context, methods)
    report.left_out |= left_out
    files = save(report, work.run_folder)
    results["figures"] = _figures(report.results)
    results["table"] = [[r.task, r.name, r.metric, r.mean, r.low, r.high] for r in report.results]
    for part in terminal(report):
        work.console.print(part)
    listed = "".join(f"\n  {file}" for file in files)
    work.console.print(f"Look at{listed}", soft_wrap=True)
    chosen = _chosen_method()
    if chosen in report.left_out:  # not what was asked for, whatever else was measured
        raise DminError(f"method={chosen} was not measured: {report.left_out[chosen]}")


@command(*TRAINING, *FEATURES, "queries", "method", "index", "retrieve", "benchmark")
def demo(work: Workspace, results: dict[str, Any]) -> None:
    """Do everything, one step after the other."""
    work.require_one_process()
    steps = ("train", "collect", "sample", "retrieve", "evaluate")
    for number, name in enumerate(steps, 1):
        work.console.rule(f"[bold]{number}/{len(steps)}  dmin {name}[/]", align="left")
        BODIES[name](work, results.setdefault(name, {}))


def _figures(found: Sequence[Result]) -> dict[str, str]:
    """Return the first metric of each task for the last method: the one chosen, if one was."""
    methods = [each for each in found if not each.control]
    last = methods[-1].name
    firsts: dict[str, str] = {}
    for each in (each for each in methods if each.name == last):
        firsts.setdefault(f"{each.task} {each.metric}", f"{each.mean:.3f}")
    tasks = {key.partition(" ")[0]: key for key in reversed(firsts)}
    return {"measured": last, **{tasks[t]: firsts[tasks[t]] for t in reversed(tasks)}}


def _shown(folder: Path) -> Path:
    """Return a folder as one would type it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _logger(work: Workspace, settings: dict[str, Any]) -> Any:
    """Return the logger that is chosen, which knows the settings; None if none is."""
    if work.cfg.logger is None:
        return None
    try:
        logger = build(work.cfg.logger)(save_dir=work.run_folder)
        logger.log_hyperparams({"seed": work.cfg.seed, "tags": list(work.cfg.tags), **settings})
    except ModuleNotFoundError as error:
        extra = HydraConfig.get().runtime.choices.get("logger")
        raise DminError(
            f"logger={extra} needs a package that is not installed ({' '.join(str(error).split())})"
            f". Try: pip install 'dmin[{extra}]'. logger=csv needs none."
        ) from error
    return logger


def _trained(path: Path, settings: dict[str, Any]) -> bool:
    """Say whether a model trained with these settings is there; refuse to replace another."""
    if not path.exists():
        return False
    record = path / "training.json"
    if not record.is_file():
        raise DminError(
            f"model.path={path} exists and was not made by `dmin train`. Choose another path."
        )
    found = json.loads(record.read_text())
    rename(found)
    if fingerprint(found) == fingerprint(settings):
        return True
    raise DminError(
        f"model.path={path} holds a model trained with other settings: "
        f"{'; '.join(differences(settings, found))}. Choose another model.path, or delete it."
    )
