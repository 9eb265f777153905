"""Objects described by a configuration, built at first use and then reused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dmin.cli.config.groups import groups
from dmin.cli.jobs.processes import is_main, make_trainer
from dmin.cli.jobs.slurm import Processes
from dmin.runtime.errors import DminError
from dmin.runtime.progress import console, titled
from dmin.runtime.signals import StopSignals
from dmin.workers.lock import hold
from dmin.workers.shard import WHOLE, Shard

if TYPE_CHECKING:
    import lightning

    from dmin.collect import GradientCollector
    from dmin.data import Dataset
    from dmin.models import DiffusionModel

# Those of the section `collect` that change features, or how much is computed at once.
COLLECTOR_SETTINGS = (
    *("readouts", "params", "groups", "microbatch"),
    *("memory", "budget", "gradient_checkpointing", "kernels"),
)
RENDEZVOUS = 300.0  # seconds; less than the ranks of a job wait for each other (trainer=ddp)


def build(node: Any) -> Any:
    """Instantiate a node of the configuration, with plain lists and mappings."""
    return instantiate(node, _convert_="all")


def build_queries(node: Any) -> Any:
    """Build the source of the queries; errors name the settings of queries.

    Raises:
        DminError: it cannot be built. Messages say ``queries.…`` where datasets say
            ``data.…``.
    """
    try:
        return build(node)
    except InstantiationException as error:
        if not isinstance(error.__cause__, DminError):
            raise
        told = re.sub(r"\bdata\.(?=\w+=)", "queries.", str(error.__cause__))
        raise DminError(told) from error


class Built:
    """The objects of one configuration, and the processes that work on it.

    Args:
        cfg: the validated configuration.
        command: name of the command.
    """

    def __init__(self, cfg: DictConfig, command: str) -> None:
        self.cfg = cfg
        self.command = command
        self.is_main: bool = is_main(cfg.trainer)
        quiet = bool(cfg.extras.get("quiet"))  # records of before have none
        self.console: Console = console(quiet=not self.is_main)  # of results
        self.notes: Console = console(quiet=quiet or not self.is_main)  # on what is being done
        self.logger: Any = None  # that the command was given
        self.run_folder: Path = Path(HydraConfig.get().runtime.output_dir)
        self.outputs: Path = Path(cfg.paths.outputs)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if cfg.extras.threads is not None:
            import torch

            torch.set_num_threads(cfg.extras.threads)

    @cached_property
    def data(self) -> Dataset:
        """The training examples, or the selected part of them."""
        from dmin.data.subset import Subset

        dataset: Dataset = build(self.cfg.data)
        for line in getattr(dataset, "summary", "").splitlines():
            self.console.print(titled("data", f": {line}"))
        limit = self.cfg.collect.get("limit")  # records of before have none
        if limit is not None and limit < 1:
            raise DminError(f"collect.limit={limit}: give a number of examples, 1 or more.")
        if limit is None or limit >= len(dataset):
            return dataset
        return Subset(dataset, count=limit)

    @property
    def family(self) -> Any:
        """The class of the model, or what else makes it; nothing is loaded."""
        target = get_object(self.cfg.model["_target_"])
        return getattr(target, "__self__", target)

    @cached_property
    def model(self) -> DiffusionModel:
        """The trained model."""
        from dmin.models.logging_filters import hide_bars

        if self.notes.quiet:
            hide_bars()
        with self.notes.status("loading the model"):
            model: DiffusionModel = build(self.cfg.model)
        return model

    @cached_property
    def collector(self) -> GradientCollector:
        """The collector of model, sketch, timesteps and noise."""
        self.require_conditions(self.data)  # before minutes of loading
        return self.collector_of(self.model)

    def require_conditions(self, dataset: Any, setting: str = "data") -> None:
        """Check that images have the captions or condition images that the model needs."""
        from dmin.data.checked import require_captions
        from dmin.models.families.image_conditions import lacking

        family, settings = self.family, self.resolved("model")
        reads = getattr(family, "reads_captions", None)
        if hasattr(dataset, "facts") and reads is not None and reads(settings):
            empty = settings.get("empty_captions") == "keep"
            require_captions(dataset, family.__name__, setting, empty)
        shown = getattr(family, "reads_condition_images", lambda settings: False)(settings)
        if shown and getattr(dataset, "condition_image", "") is None:
            raise lacking(family.__name__, dataset.ids[0], setting)

    def collector_of(self, model: DiffusionModel) -> GradientCollector:
        """Return a collector with these settings, of any model."""
        from dmin.collect import GradientCollector

        collect = self.resolved("collect")
        return GradientCollector(
            model,
            build(self.cfg.sketch),
            build(self.cfg.timesteps),
            build(self.cfg.noise),
            **{name: collect[name] for name in COLLECTOR_SETTINGS},
        )

    def trainer(self) -> lightning.Trainer:
        """Return a new Lightning trainer."""
        return make_trainer(self.cfg, self.command)

    @cached_property
    def share(self) -> Shard:
        """The shard of this job."""
        return Shard(self.cfg.shard.id, self.cfg.shard.num)

    @contextmanager
    def lock(
        self,
        path: Path,
        done: bool = False,
        shard: Shard = WHOLE,
        stop: StopSignals | None = None,
    ) -> Iterator[None]:
        """Hold the lock of an output path, so that no other job computes the same.

        Args:
            path: of a store, a model or a folder of queries.
            done: whether it already exists.
            shard: the part that is computed.
            stop: signals that end the waiting.
        """
        if done or not self.is_main:  # the main process has it for all of them
            yield
            return
        limit, tell = self.cfg.collect.wait_seconds, self.notes.print
        if not Processes.of(self.cfg.trainer).alone:
            limit = min(limit, RENDEZVOUS)  # the other ranks wait for this one
        with hold(path, shard, wait=limit, on_wait=tell, stop=stop):
            yield

    def resolved(self, name: str) -> Any:
        """Return a part of the configuration as plain values, all interpolations resolved."""
        part = self.cfg[name]
        return OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part

    def require_one_process(self, shards: bool = False) -> None:
        """Refuse several processes for commands that cannot use them.

        Args:
            shards: whether the command can work in shards.
        """
        if self.share.shards > 1 and not shards:
            raise DminError(
                f"shard.num={self.share.shards}: only `dmin collect` and `dmin retrieve` work "
                f"in shards. Set shard=one."
            )
        trainer = self.cfg.trainer
        if trainer.get("devices") not in (1, "1", "auto") or trainer.get("num_nodes", 1) != 1:
            raise DminError(
                f"trainer.devices={trainer.get('devices')}, trainer.num_nodes="
                f"{trainer.get('num_nodes', 1)}: this command runs in one process. Run `dmin "
                f"collect` with several processes first, then this one with trainer.devices=1."
            )

    def need(self, name: str) -> Any:
        """Return a group's node; raise if the group is not chosen."""
        if self.cfg[name] is None:
            raise DminError(
                f"{name} is not chosen. Set {name}=<choice>. Choices of {name}: "
                f"{', '.join(groups().get(name, []))}."
            )
        return self.cfg[name]
