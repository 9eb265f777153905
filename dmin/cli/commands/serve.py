"""``dmin serve``: retrieve in a browser, with the model kept loaded."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf

from dmin.cli.commands.command import Command, shown_count
from dmin.cli.config.explain import explain
from dmin.cli.config.line import words
from dmin.cli.config.shorthand import UPLOADS
from dmin.cli.workspace.benchmark import with_method
from dmin.cli.workspace.built import build
from dmin.cli.workspace.search import SELECTED, Search
from dmin.cli.workspace.side_by_side import at_timesteps, methods_of
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method
    from dmin.serve.page import Tell
    from dmin.serve.question import Question


@Command
def serve(work: Workspace, results: dict[str, Any]) -> None:
    """Answer in a browser until stopped."""
    from dmin.serve import server
    from dmin.serve.gate import LOOPBACK

    work.require_one_process()
    host, port, queue, upload_mb = work.resolved("serve").values()
    if queue < 1 or upload_mb <= 0:
        raise DminError(f"serve.queue={queue}, serve.upload_mb={upload_mb}: both must be positive.")
    at = server.bound(host, port)  # refused before the model is loaded
    desk = Reader(work)
    try:
        _ = desk.offered
    except DminError as error:  # the page reports it, too; the user may fix it meanwhile
        work.console.print(str(error), soft_wrap=True)
    token = None if host in LOOPBACK else secrets.token_urlsafe(16)
    tell = work.console.print
    server.serve(desk, at, upload_mb, queue, token, lambda url: tell(f"Open {url} (Ctrl-C ends)"))


@contextmanager
def _explained() -> Iterator[None]:
    """Explain errors of building objects in terms of the command line."""
    try:
        yield
    except InstantiationException as error:
        raise DminError(explain(error) or str(error)) from error


class Reader:
    """Answers questions with the model and the store of a configuration, each opened once.

    Args:
        work: workspace of the configuration.
    """

    def __init__(self, work: Workspace) -> None:
        self.work, self.k, self.named = work, shown_count(work, "retrieve.k"), methods_of(work)
        self.chosen, self.places = len(self.named), bool(work.cfg.retrieve.get("places"))
        shown = ("retrieve.k=", "retrieve.beside=", "retrieve.places=")
        own = ("serve.", "method=", *shown, *UPLOADS)
        said = HydraConfig.get().overrides.task
        self.words: Sequence[str] = [*words(), *(each for each in said if not each.startswith(own))]
        cfg = work.cfg
        store, model = cfg.collect.path or cfg.name, cfg.model.get("path") or cfg.name
        self.about = f"Store {store}, model {model}"

    @property
    def methods(self) -> Sequence[str]:
        """The methods offered; while the store cannot be opened, the chosen ones."""
        return list(self.__dict__.get("offered", self.named))

    @cached_property
    def train(self) -> FeatureSet:
        """The training examples; this loads the model."""
        with _explained():
            return self.work.train_side()

    def examples(self) -> FeatureSet:
        """Return the store with its examples, for which no model is needed."""
        from dmin.attribution import FeatureSet
        from dmin.store import Store

        with _explained():
            return FeatureSet(Store(self.work.train_path), self.work.data)

    @cached_property
    def offered(self) -> dict[str, Method]:
        """The chosen methods, then all others that need only the store and the picture."""
        from dmin.attribution.check import check_train

        for method in self.named.values():
            check_train(self.train, method)
        found = dict(self.named)
        for name in GlobalHydra.instance().config_loader().get_group_options("method"):
            cfg = with_method(self.work, name, {}).method
            if name in found or OmegaConf.missing_keys(cfg):
                continue
            with suppress(DminError):
                method = at_timesteps(self.work, build(cfg))
                needs = method.requires
                check_train(self.train, method)
                if not (needs.checkpoints or needs.trajectory or needs.model):
                    found[name] = method
        return found

    def answer(self, question: Question, folder: Path, tell: Tell) -> str:
        """Return the page of the answer; see `Desk`."""
        from dmin.attribution.place_maps import check_places
        from dmin.attribution.search.selection import Selection
        from dmin.gallery.html import save_html
        from dmin.gallery.pictures import remembered
        from dmin.queries import Generated

        work = self.work
        tell(0.05, "opening the model and the store")
        methods = {name: self.offered[name] for name in question.methods}
        options = work.resolved("retrieve")
        for method in methods.values() if question.places else ():
            check_places(method, options["group_by"])
        selection = Selection(**{name: options[name] for name in SELECTED})
        options["k"] = min(question.k, selection.candidates(self.train.store.metadata)[0])
        work.outputs = folder  # deleted after the answer
        if question.picture is None:
            tell(0.2, "generating the picture")
            made = Generated([question.asked], seed=question.seed, steps=question.steps)
            source: Any = work.queries(made)
        else:
            tell(0.2, "reading the picture")
            settings = work.resolved("queries") | question.settings(folder)
            source = get_object(settings.pop("_target_"))(**settings)
        work.require_conditions(source, "queries")
        tell(0.4, "gradients of the picture")
        asked = Search(work, options, work.query_side(source), self.train, selection)
        tell(0.8, f"scores by {', '.join(methods)}")
        rankings = asked.rankings(methods) or []
        tell(0.9, "drawing")
        pictures = remembered(asked.shown), asked.pictures[1]
        maps = asked.places(rankings, methods, question.places)
        page = save_html(rankings, *pictures, folder / "a.html", places=maps)
        return page.read_text("utf-8")
