"""The sections of a configuration that are no calls, and their settings with their defaults."""

from dataclasses import dataclass, field, fields
from typing import Literal


@dataclass
class Paths:
    """The section ``paths``."""

    outputs: str = "outputs"


@dataclass
class Collect:
    """The section ``collect``; see ``GradientCollector`` and its ``collect``."""

    path: str | None = None
    grow: bool = False
    params: str = "all"
    groups: str | dict | None = None
    readouts: list[str] = field(default_factory=lambda: ["loss"])
    block_size: int = 32
    microbatch: int | Literal["auto"] = 64
    memory: int | None = None
    budget: int | None = None
    gradient_checkpointing: bool = False
    kernels: Literal["auto", "triton", "torch"] = "auto"
    dtype: str = "float16"
    segment_bytes: int = 64 << 20
    seal_seconds: float = 60.0
    workers: int = 0
    encodings: str | None = None
    keep_encodings: bool = False
    requeue: bool = False
    wait_seconds: float = 86400.0


@dataclass
class Shard:
    """The section ``shard``; see ``dmin.workers.shard.Shard``."""

    id: int = 0
    num: int = 1


@dataclass
class Doctor:
    """The section ``doctor``; see ``dmin.doctor.diagnose``."""

    examples: int = 4


@dataclass
class Retrieve:
    """The section ``retrieve``; see ``dmin.attribution.retrieve`` and its ``Selection``."""

    k: int = 10
    rows: int | None = None
    order: str = "proponents"
    confidence: bool = True
    min_score: float | None = None
    where: dict | None = None
    group_by: str | None = None
    group_score: str = "sum"
    split: bool = False
    popularity: bool = False
    device: str = "cpu"


@dataclass
class Outliers:
    """The section ``outliers``."""

    k: int = 24


@dataclass
class Extras:
    """The section ``extras``: how a run shows and limits itself."""

    print_config: bool = True
    threads: int | None = None


@dataclass
class Root:
    """The settings at the top of a configuration; any other there is refused.

    A section annotated with a dataclass of its own is held to that one's fields in the same way.
    """

    seed: int = 0
    name: str | None = None
    tags: list[str] | None = None
    paths: Paths | None = None
    model: dict | None = None
    data: dict | None = None
    queries: dict | None = None
    sketch: dict | None = None
    timesteps: dict | None = None
    noise: dict | None = None
    collect: Collect | None = None
    shard: Shard | None = None
    doctor: Doctor | None = None
    method: dict | None = None
    index: dict | None = None
    retrieve: Retrieve | None = None
    outliers: Outliers | None = None
    train: dict | None = None
    benchmark: dict | None = None
    trainer: dict | None = None
    logger: dict | None = None
    extras: Extras | None = None


ROOT_KEYS = tuple(setting.name for setting in fields(Root))
