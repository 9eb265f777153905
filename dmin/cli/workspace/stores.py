"""The stores of a configuration: their paths, found or collected."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dmin.cli.config import store_settings
from dmin.cli.workspace.built import Built
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import differences
from dmin.runtime.progress import titled
from dmin.runtime.signals import StopSignals
from dmin.workers.shard import WHOLE, Shard

if TYPE_CHECKING:
    from dmin.collect import GradientCollector
    from dmin.data import Dataset
    from dmin.models import DiffusionModel
    from dmin.store import Manifest, Store


class Stores(Built):
    """The stores of one configuration, under the outputs folder.

    Their paths contain a fingerprint of everything they depend on, so results are found and
    reused, and other settings never overwrite them.

    Args:
        cfg: the validated configuration.
        command: name of the command.
    """

    def __init__(self, cfg: DictConfig, command: str) -> None:
        super().__init__(cfg, command)
        self._asked = ""  # of which further checkpoint these are
        self.made_of: dict[str, Any] = {}  # digests of data and weights that were read

    @cached_property
    def train_manifest(self) -> Manifest:
        """The manifest that the store of the training examples must have."""
        options, data = self.cfg.collect, self.data  # first, as it is read sooner than the model
        place = None if options.path is None else Path(options.path)
        found = self.collector.manifest(data, options.block_size, options.dtype, path=place)
        weights = {"network": found.features["weights"], **found.features.get("encoders", {})}
        self.made_of |= {"data": found.dataset, "weights": weights}
        return found

    @cached_property
    def train_path(self) -> Path:
        """The path of that store: ``collect.path``, or one with its fingerprint."""
        if self.cfg.collect.path is not None:
            return Path(self.cfg.collect.path)
        return self._store_path("train", self.train_manifest, self.data)

    def collect_train(self, stop: StopSignals) -> Store:
        """Return the store of the training examples; collect what is missing of the shard.

        Args:
            stop: signals received so far.
        """
        return self._collect(self.data, "train", self.train_path, self.share, stop)

    def find_train(self) -> Store:
        """Return the complete store of the training examples, which must be there.

        Only ``dmin collect`` makes it: what takes hours must not begin because one setting differs.

        Raises:
            DminError: it does not exist; existing stores are listed with their differences.
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
        """List the most similar stores of this name, and how they differ."""
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
        told = f" The most similar stores: {'; and '.join(nearest)}." if nearest else ""
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
            role: a name for the path and the progress.
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
                "collect.grow=true needs collect.path=..., the path of the store to extend."
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
        """Save the settings in a store, if they belong to it."""
        from dmin.store import StoreWriter

        if self.is_main:
            if not self.cfg.collect.grow:
                StoreWriter(path, self.train_manifest, verify=False).close()
            store_settings.keep(self.cfg, path)

    def _numbers(self, collector: GradientCollector) -> str:
        """Describe the size of a sketch."""
        if not collector.readouts:
            return "losses alone"
        groups = len(self.collector.attributed.groups)
        dim = f"{self.collector.sketch.dim} dimensions"
        return dim if groups == 1 else f"{groups} groups × {dim}"
