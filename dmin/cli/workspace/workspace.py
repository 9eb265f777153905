"""The workspace of a command: queries and training examples with their features, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dmin.cli.workspace.stores import Stores
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.progress import titled

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method
    from dmin.data import Dataset


class Workspace(Stores):
    """The model, data, stores and queries of one configuration.

    Generated queries are saved next to the stores, also at paths with a fingerprint.

    Args:
        cfg: the validated configuration.
        command: name of the command.
    """

    def __init__(self, cfg: DictConfig, command: str) -> None:
        super().__init__(cfg, command)
        self._others: dict[str, Workspace] = {}  # of further checkpoints

    def queries(self, source: Any) -> Dataset:
        """Return a dataset of queries from any source; generate them if necessary.

        Args:
            source: a dataset, or one of the sources of ``dmin.queries``.
        """
        from dmin.queries import Generated, Planted

        pooled = getattr(source, "pool", None) or getattr(source, "against", None)
        if pooled and self.command not in ("retrieve", "demo"):
            raise DminError(
                "queries.pool and queries.against are only for `dmin retrieve`. Leave them out."
            )
        if isinstance(source, Planted):
            return source.plant(self.data)
        if isinstance(source, Generated):
            return self.generated(source)
        dataset: Dataset = source
        return dataset

    def generated(self, source: Any) -> Dataset:
        """Return generated queries, from their folder if they were generated before."""
        from dataclasses import asdict

        from dmin.data.video import saved
        from dmin.models.base import weights_digest
        from dmin.models.families.image_conditions import asks_for_images

        if getattr(self.family, "given_images", ()):  # before minutes of loading
            raise asks_for_images(self.family)
        made_of = {
            **asdict(source),
            "prompts": list(source.prompts),
            "weights": weights_digest(self.model.network),
            "sampling": self.model.describe_sampling(),
        }
        if states := made_of.pop("trajectory"):
            made_of["journey"] = states  # as fingerprints of earlier releases have it
        folder = self.outputs / "queries" / f"{self.cfg.name}-{fingerprint(made_of)}"
        with self.lock(folder, done=folder.is_dir()):
            if folder.is_dir():
                self.notes.print(titled("queries", f": found {folder}"))
            else:
                source.generate(self.model, folder)
                self.notes.print(titled("queries", f": generated {folder}"))
        return saved(folder)

    def states(self, source: Any, dataset: Dataset) -> list[Dataset]:
        """Return the recorded intermediate states of generated queries."""
        from dmin.data.image_folder import ImageFolder
        from dmin.data.video import saved
        from dmin.queries import Generated

        if not isinstance(source, Generated) or not isinstance(dataset, ImageFolder):
            return []
        return [saved(folder) for folder in source.states(dataset.root)]

    def query_side(
        self, source: Any, role: str = "queries", methods: Iterable[Method] = ()
    ) -> FeatureSet:
        """Return queries with their features and everything else that methods require."""
        from dmin.attribution import FeatureSet
        from dmin.queries import require_one_shape

        methods = list(methods)
        dataset = self.queries(source)
        if self.collector.noise.shapes == "one":
            require_one_shape(dataset, self.data)
        store = self.store(dataset, role, as_queries=True)
        recorded = any(m.requires.trajectory for m in methods)
        return FeatureSet(
            store,
            dataset,
            trajectory=[
                FeatureSet(self.store(state, f"{role}-{number}", as_queries=True), state)
                for number, state in enumerate(self.states(source, dataset) if recorded else [])
            ],
            checkpoints={
                path: FeatureSet(other.store(dataset, role, as_queries=True), dataset)
                for path, other in self.checkpoints(methods).items()
            },
        )

    def train_side(self, methods: Iterable[Method] = ()) -> FeatureSet:
        """Return the training examples with their features and all else that methods require."""
        from dmin.attribution import FeatureSet

        repeats = self.cfg.collect.get("repeats", True)  # records of before have none
        return FeatureSet(
            self.find_train(),
            self.data,
            repeats=repeats,
            checkpoints={
                path: FeatureSet(other.find_train(), self.data, repeats=repeats)
                for path, other in self.checkpoints(methods).items()
            },
            origin=self.collector,
            encodings=self.cfg.collect.encodings,
        )

    def checkpoints(self, methods: Iterable[Method]) -> dict[str, Workspace]:
        """Return the workspaces of the further checkpoints of methods, by path.

        Raises:
            DminError: the model has no path, or collect.path is set.
        """
        names = dict.fromkeys(name for m in methods for name in m.requires.checkpoints)
        if names and ("path" not in self.cfg.model or self.cfg.collect.path is not None):
            raise DminError(
                "method.checkpoints finds the stores of checkpoints by their model.path: "
                "it needs a model with a path, and collect.path=null."
            )
        return {name: self.at(name) for name in names}

    def at(self, path: str) -> Workspace:
        """Return the workspace of another model, or adapter, with the same settings."""
        if path not in self._others:
            cfg = copy.deepcopy(self.cfg)
            of = "adapter" if cfg.model.get("adapter") else "path"
            OmegaConf.update(cfg, f"model.{of}", path)
            other = self._others[path] = Workspace(cfg, self.command)
            other._asked = f" and model.{of}={path}"
            other.__dict__["data"] = self.data  # the same examples, read once
        return self._others[path]
