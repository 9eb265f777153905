"""Where the commands find what they work on: stores, queries and models, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dmin.cli.config import store_settings
from dmin.cli.workspace.built import Built
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.runtime.progress import titled
from dmin.runtime.signals import StopSignals
from dmin.workers.shard import WHOLE, Shard

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method
    from dmin.collect import GradientCollector
    from dmin.data import Dataset
    from dmin.models import DiffusionModel
    from dmin.store import Manifest, Store


class Workspace(Built):
    """The model, data and stores of one configuration.

    Stores and generated queries stand under the outputs folder at paths that carry a fingerprint of
    everything they depend on. So equal work is found and not done again, and other settings never
    overwrite it.

    Args:
        cfg: the validated configuration.
        command: name of the command it is for.
    """

    def __init__(self, cfg: DictConfig, command: str) -> None:
        super().__init__(cfg, command)
        self._others: dict[str, Workspace] = {}  # of further checkpoints
        self._asked = ""  # of which of them this one is
        self.made_of: dict[str, Any] = {}  # digests of data and weights that were read

    @cached_property
    def train_manifest(self) -> Manifest:
        """What the store of the training examples has to be."""
        options, data = self.cfg.collect, self.data  # first, as it is read sooner than the model
        place = None if options.path is None else Path(options.path)
        found = self.collector.manifest(data, options.block_size, options.dtype, path=place)
        weights = {"network": found.features["weights"], **found.features.get("encoders", {})}
        self.made_of |= {"data": found.dataset, "weights": weights}
        return found

    @cached_property
    def train_path(self) -> Path:
        """Where that store stands: ``collect.path``, or a path that carries its fingerprint."""
        if self.cfg.collect.path is not None:
            return Path(self.cfg.collect.path)
        return self._store_path("train", self.train_manifest, self.data)

    def collect_train(self, stop: StopSignals) -> Store:
        """Return the store of the training examples; collect what is missing of the shard.

        Args:
            stop: signals heard so far.
        """
        return self._collect(self.data, "train", self.train_path, self.share, stop)

    def find_train(self) -> Store:
        """Return the complete store of the training examples, which must be there.

        Only ``dmin collect`` makes it: what takes hours must not begin because one setting differs.

        Raises:
            DminError: it is not there; names the stores that are, and what differs.
        """
        from dmin.collect.described import as_found, warn_if_stale
        from dmin.store import Store
        from dmin.store.comparison import manifest_differences, metadata_remedy

        path = self.train_path
        manifest = as_found(self.train_manifest, self.data, path)
        if not (path / "manifest.json").is_file():
            raise DminError(
                f"there is no store of the training examples for these settings ({path}). Run "
                f"`dmin collect` with the same settings{self._asked} first."
                f"{self._other_stores(manifest)}"
            )
        store = Store(path)
        # While it grows it may be asked by the data of before, or by those that it grows by.
        found = manifest_differences(manifest, store.manifest, counted=not store.changed)
        if store.planned is not store.manifest and found:
            found = manifest_differences(manifest, store.planned, counted=False)
        lines = [line for each in found.values() for line in each]
        if lines:
            raise DminError(
                f"{path} was collected with other settings: {'; '.join(lines)}. Use its settings, "
                f"or another collect.path.{metadata_remedy(manifest, store.manifest, path)}"
            )
        store.require_complete()
        warn_if_stale(store, self.data)
        return store

    def _other_stores(self, manifest: Manifest) -> str:
        """Say which stores of this name come nearest, and how they differ."""
        from dmin.store import Store
        from dmin.store.comparison import metadata_remedy

        found, remedies = [], []
        for path in (self.outputs / "stores").glob(f"{self.cfg.name}-train-*"):
            other = Store(path, verify=False).manifest
            lines = differences(manifest.document(), other.document())
            # What follows from the features stands among them already.
            lines = [line for line in lines if not line.startswith("layout.")] or lines
            found.append((len(lines), f"{path} ({'; '.join(lines[:4])})"))
            if other.comparable() == manifest.comparable():
                remedies.append(metadata_remedy(manifest, other, path))
        nearest = [told for _, told in sorted(found)[:2]]
        told = f" The nearest there is: {'; and '.join(nearest)}." if nearest else ""
        return told + next(filter(None, remedies), "")

    def _store_path(
        self, role: str, manifest: Manifest, dataset: Dataset, beside: Any = None
    ) -> Path:
        from dmin.collect.described import place_of

        place = self.outputs / "stores" / f"{self.cfg.name}-{role}-"
        return place_of(place, manifest, dataset, beside)

    def store(
        self,
        dataset: Dataset,
        role: str,
        as_queries: bool = False,
        model: DiffusionModel | None = None,
        losses_only: bool = False,
    ) -> Store:
        """Return the complete store of a dataset; collect what is missing of it.

        Args:
            dataset: the examples.
            role: a word for the path and for the progress shown.
            as_queries: whether the examples are queries.
            model: another than the configured one.
            losses_only: without gradients.
        """
        options = self.cfg.collect
        collector = self.collector if model in (None, self.model) else self.collector_of(model)
        collector = collector.losses_only() if losses_only else collector
        manifest = collector.manifest(dataset, options.block_size, options.dtype, as_queries)
        beside = collector.model.describe_query() if as_queries else None
        path = self._store_path(role, manifest, dataset, beside)
        return self._collect(dataset, role, path, as_queries=as_queries, collector=collector)

    def _collect(
        self,
        dataset: Dataset,
        role: str,
        path: Path,
        shard: Shard = WHOLE,
        stop: StopSignals | None = None,
        as_queries: bool = False,
        collector: GradientCollector | None = None,
    ) -> Store:
        from dmin.collect import CollectOptions
        from dmin.collect.append import collect_more
        from dmin.store import Store

        options, collector = self.cfg.collect, collector or self.collector
        if role == "train" and options.grow and options.path is None:
            raise DminError(
                "collect.grow=true needs collect.path=..., the store that is to grow: a store of "
                "other data has another name."
            )
        known = (path / "manifest.json").is_file()
        self.notes.print(
            titled(
                role,
                f": {len(dataset):,} examples × {len(collector.timesteps)} "
                f"timesteps × {collector.attributed.count:,} parameters → "
                f"{self._numbers(collector)}" + (f" (found {path})" if known else ""),
            )
        )
        done = known and not options.grow and Store(path, verify=False).complete
        with self.lock(path, done, shard, stop=stop):
            if role == "train" and not options.grow:
                self._keep_settings(path)
            names = CollectOptions.__dataclass_fields__
            settings = {name: options[name] for name in names if name in options}
            settings |= dict(
                as_queries=as_queries,
                shard=shard.shard,
                shards=shard.shards,
                stop=stop,
                wait=0.0 if role == "train" else options.wait_seconds,
                trainer=self.trainer(),
            )
            if role == "train" and options.grow:
                grown = collect_more(collector, dataset, path, options.restore, **settings)
                self._keep_settings(path)
                return grown
            return collector.collect(dataset, path, **settings)

    def _keep_settings(self, path: Path) -> None:
        """Keep the settings beside a store of theirs; of another's settings it complains."""
        from dmin.store import StoreWriter

        if self.is_main:
            if not self.cfg.collect.grow:
                StoreWriter(path, self.train_manifest, verify=False).close()
            store_settings.keep(self.cfg, path)

    def _numbers(self, collector: GradientCollector) -> str:
        """Say how many numbers are kept of a gradient."""
        if not collector.readouts:
            return "losses alone"
        groups = len(self.collector.attributed.groups)
        dim = f"{self.collector.sketch.dim} dimensions"
        return dim if groups == 1 else f"{groups} groups × {dim}"

    def queries(self, source: Any) -> Dataset:
        """Return a dataset of queries from any source; generate what is not there.

        Args:
            source: a dataset, or one of the sources of ``dmin.queries``.
        """
        from dmin.queries import Generated, Planted

        pooled = getattr(source, "pool", None) or getattr(source, "against", None)
        if pooled and self.command not in ("retrieve", "demo"):
            raise DminError("queries.pool and queries.against are for `dmin retrieve`: omit them.")
        if isinstance(source, Planted):
            return source.plant(self.data)
        if isinstance(source, Generated):
            return self.generated(source)
        dataset: Dataset = source
        return dataset

    def generated(self, source: Any) -> Dataset:
        """Return generated queries, from their folder if they were generated before."""
        from dataclasses import asdict

        from dmin.data.image_folder import ImageFolder
        from dmin.models.base import weights_digest

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
        return ImageFolder(folder, mode=None)

    def states(self, source: Any, dataset: Dataset) -> list[Dataset]:
        """Return what generated queries looked like while they were generated, if recorded."""
        from dmin.data.image_folder import ImageFolder
        from dmin.queries import Generated

        if not isinstance(source, Generated) or not isinstance(dataset, ImageFolder):
            return []
        return [ImageFolder(folder, mode=None) for folder in source.states(dataset.root)]

    def query_side(
        self, source: Any, role: str = "queries", methods: Iterable[Method] = ()
    ) -> FeatureSet:
        """Return queries with their features, and what else some methods require of them."""
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
        """Return the training examples with their features, and what else methods require."""
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
        """Return the workspaces of the further checkpoints that methods name, by their path.

        Raises:
            DminError: the model has no path, or its store was given a place of its own.
        """
        names = dict.fromkeys(name for m in methods for name in m.requires.checkpoints)
        if names and ("path" not in self.cfg.model or self.cfg.collect.path is not None):
            raise DminError(
                "method.checkpoints names models by their model.path, and finds their stores by "
                "fingerprint: it needs a model with a path, and collect.path=null."
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
