"""What the golden artefacts are made of; used by the script that makes them and by the test.

Weights and images are integers of PCG64 times powers of two, so they are the same bits on every
machine, and need not be kept.
"""

import functools
import hashlib
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import get_method, instantiate
from models.tiny import BUILDERS
from toy_ddpm import TINY_UNET

from dmin import Example, Examples, GradientCollector, Store, retrieve

# All that is not of the public face of the package stands here.
from dmin.cli.config.groups import config_directory
from dmin.cli.help import COMMANDS  # noqa: F401
from dmin.collect import predict_trainer
from dmin.collect.append import collect_more
from dmin.runtime.fingerprint import array_digest
from dmin.store.maintenance import verify  # noqa: F401
from dmin.store.removal import remove

DATA = Path(__file__).parent / "data"
STORES, BITS = DATA / "stores", DATA / "bits.json"
TINY_MLP = {"width": 4, "depth": 1, "embedding": 4}
CLASSES = 10
WORDS = ("a red cat", "dog", "blue", "cat", "red dog", "a blue dog", "a cat")


@dataclass(frozen=True)
class Golden:
    """A training store and a store of queries to it."""

    model: str
    sketch: str = "auto"
    dim: int = 32
    settings: dict[str, Any] = field(default_factory=dict)  # of the sketch, beside dim
    timesteps: dict[str, Any] = field(default_factory=lambda: {"_": "stratified", "num": 2})
    noise: dict[str, Any] = field(default_factory=lambda: {"_": "shared"})
    collector: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float16"
    train: int = 4
    history: str | None = None  # grown, removed or sharded


# TensorSketch of what is large in such a model, block-cyclic of the rest.
AUTO = {"block": 16, "from_size": 128, "from_kernel": 512}

GOLDENS = {
    "ddpm": Golden("ddpm", settings=AUTO, timesteps={"_": "stratified", "num": 3}),
    "stable_diffusion": Golden("stable_diffusion", settings=AUTO, collector={"groups": "block"}),
    "stable_diffusion_xl": Golden(
        "stable_diffusion_xl",
        settings=AUTO,
        collector={"readouts": ["loss", "mean_squared_output"]},
    ),
    "stable_diffusion_3": Golden(
        "stable_diffusion_3", settings=AUTO, noise={"_": "shared", "draws": 2}
    ),
    "flux": Golden("flux", settings=AUTO, dtype="int8"),
    "dit": Golden("dit", settings=AUTO, dtype="float32", timesteps={"_": "dmin", "num": 3}),
    "pixart": Golden("pixart", settings=AUTO, noise={"_": "per_example", "seed": 3}),
    "sana": Golden("sana", settings=AUTO, train=3, collector={"params": "attn"}),
    "hunyuan_dit": Golden(
        "hunyuan_dit", settings=AUTO, train=3, timesteps={"_": "explicit", "values": [700, 20]}
    ),
    "mlp": Golden(
        "mlp", settings=AUTO, timesteps={"_": "log_snr", "num": 3}, collector={"groups": "layer"}
    ),
    "sketch_auto": Golden("ddpm", settings={**AUTO, "seed": 7}, dtype="bfloat16"),
    "sketch_block_cyclic": Golden("ddpm", "block_cyclic", 64, {"block": 16}),
    "sketch_factored": Golden("ddpm", "factored"),
    "sketch_gaussian": Golden("mlp", "gaussian", dtype="float32"),
    "sketch_mask_sjlt": Golden("ddpm", "mask_sjlt", settings={"keep": 512}),
    "sketch_none": Golden("mlp", "none", train=3),
    "sketch_oporp": Golden("ddpm", "oporp", 64, dtype="int8"),
    "sketch_sjlt": Golden("ddpm", "sjlt", settings={"nonzeros": 2}, collector={"groups": "block"}),
    "sketch_tensor_sketch": Golden("ddpm", "tensor_sketch", settings={"block": 16}),
    "grown": Golden("mlp", "block_cyclic", 64, {"block": 16}, train=7, history="grown"),
    "removed": Golden("mlp", "block_cyclic", 64, {"block": 16}, train=6, history="removed"),
    "sharded": Golden(
        "mlp",
        "block_cyclic",
        64,
        {"block": 16},
        noise={"_": "shared", "draws": 2, "antithetic": True},
        collector={"readouts": ["loss", "mean_output"], "groups": {"bias": "bias$", "rest": "."}},
        train=8,
        dtype="int8",
        history="sharded",
    ),
}
BLOCK = 2  # examples
MISSING = 3  # the example that is taken out of the store called removed
BEFORE = 4  # examples of the store called grown, before it grew


def drawn(name: str, count: int) -> np.ndarray:
    """Return integers from −2¹⁵ to 2¹⁵ − 1, the same everywhere, keyed by a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(count)
    return (raw >> np.uint64(48)).astype(np.int64) - 2**15


def set_weights(module: torch.nn.Module, name: str) -> None:
    """Give a module's weights and saved buffers values that are exact in any arithmetic."""
    for key, tensor in sorted(module.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        values = drawn(f"{name}.{key}", tensor.numel()).reshape(tuple(tensor.shape))
        if tensor.ndim > 1:
            fan_in = math.prod(tensor.shape[1:])
            values = np.ldexp(values.astype(np.float64), -15 - fan_in.bit_length() // 2 + 1)
        elif key.endswith(("weight", "running_var")):  # of norms
            values = 1 + np.ldexp(values.astype(np.float64), -17)
        else:
            values = np.ldexp(values.astype(np.float64), -18)
        # Shared ones are written more than once: the last name wins, everywhere.
        tensor.copy_(torch.from_numpy(values).to(tensor.dtype))


_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def setting(group: str, choice: str) -> dict[str, Any]:
    """Return what a choice of a configuration group says, its target included."""
    return yaml.safe_load((config_directory() / group / f"{choice}.yaml").read_text())


@functools.cache
def checkpoint(family: str) -> Path:
    """Return the folder of a family's tiny checkpoint."""
    path = Path(_FOLDER.name) / family
    if family in BUILDERS:
        pipeline = BUILDERS[family]()
        for name, component in sorted(pipeline.components.items()):
            if isinstance(component, torch.nn.Module):
                set_weights(component, f"{family}.{name}")
        pipeline.save_pretrained(str(path))
    else:
        kind = get_method(setting("model", family)["_target_"]).__self__
        if family == "ddpm":
            model = kind.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"})
        else:
            model = kind.small(**TINY_MLP)
        set_weights(model.network, family)
        model.save_pretrained(path)
    return path


# What is asked of the tiny ones because their texts are short.
_LOADED = {
    "stable_diffusion_3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 12, "sample_size": [16, 16]},
    "pixart": {"max_sequence_length": 12},
    "sana": {"max_sequence_length": 12},
}


@functools.cache
def model(family: str) -> Any:
    """Return a family's tiny model, loaded as the commands load it; tests must not change it."""
    changes = {"path": str(checkpoint(family)), **_LOADED.get(family, {})}
    return instantiate({**setting("model", family), **changes}, _convert_="all")


def examples(golden: Golden, what: str, numbers: list[int]) -> Examples:
    """Return images that the model takes, with labels and captions."""
    size = {"ddpm": 8, "mlp": 8, "sana": 32, "hunyuan_dit": 32}.get(golden.model, 16)
    shape = (1 if size == 8 else 3, size, size)
    found = []
    for number in numbers:
        values = drawn(f"{what} {number}", math.prod(shape)).reshape(shape) + 2**15
        image = torch.from_numpy(np.ldexp(values.astype(np.float32), -16))
        label = (3 * number + len(what)) % CLASSES
        caption = WORDS[(number + len(what)) % len(WORDS)]
        found.append(Example(f"{what}/{number}", image, label, caption, {"number": number}))
    return Examples(found)


def train_examples(golden: Golden) -> Examples:
    """Return the training examples as the dataset is in the end."""
    return examples(golden, "train", list(range(golden.train)))


def queries(golden: Golden) -> Examples:
    """Return the queries."""
    return examples(golden, "query", [0, 1])


def _built(group: str, settings: dict[str, Any]) -> Any:
    choice = settings["_"]
    changes = {key: value for key, value in settings.items() if key != "_"}
    return instantiate({**setting(group, choice), **changes}, _convert_="all")


def collector(golden: Golden) -> GradientCollector:
    """Return the collector of a pair."""
    dim = {} if golden.sketch == "none" else {"dim": golden.dim}
    return GradientCollector(
        model(golden.model),
        sketch=_built("sketch", {"_": golden.sketch, **dim, **golden.settings}),
        timesteps=_built("timesteps", golden.timesteps),
        noise=_built("noise", golden.noise),
        microbatch=8,
        **golden.collector,
    )


def collect(golden: Golden, by: GradientCollector, folder: Path, **options: Any) -> Store:
    """Collect the training store into a folder, or what is missing there, with one call."""
    data = options.pop("data", None) or train_examples(golden)
    return by.collect(data, folder, block_size=BLOCK, dtype=golden.dtype, **_quiet(), **options)


def collect_queries(golden: Golden, by: GradientCollector, folder: Path) -> Store:
    """Collect the store of queries."""
    options = {"block_size": BLOCK, "dtype": "float16", "as_queries": True, **_quiet()}
    return by.collect(queries(golden), folder, **options)


def make(golden: Golden, by: GradientCollector, folder: Path) -> Store:
    """Make the training store with its history: grown, sharded, with a row removed."""
    if golden.history == "sharded":
        for shard in (1, 0):
            found = collect(golden, by, folder, shard=shard, shards=2)
    elif golden.history == "grown":
        first = examples(golden, "train", list(range(BEFORE)))
        collect(golden, by, folder, data=first)
        found = collect_more(by, train_examples(golden), folder, **_quiet())
    else:
        found = collect(golden, by, folder)
    if golden.history == "removed":
        remove(found, [f"train/{MISSING}"])
    return Store(folder)


def _quiet() -> dict[str, Any]:
    return {"trainer": predict_trainer(accelerator="cpu", enable_progress_bar=False)}


def answer(golden: Golden, train: Store, asked: Store) -> dict[str, Any]:
    """Return the whole ranking of all queries by DMin's score, the one of no method named."""
    ranking = retrieve(asked, train, k=len(train))
    return {
        "method": ranking.method,
        "query_ids": ranking.query_ids,
        "train_ids": ranking.train_ids,
        "scores": [[float(f"{score:.6g}") for score in row] for row in ranking.scores.tolist()],
        "timesteps": list(ranking.timesteps),
        "groups": list(ranking.groups),
        "train_metadata": ranking.train_metadata[0],
    }


def arithmetic():
    """Return what a few operations give here, to the bit."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 16, 16, generator=draw)
    y = F.conv2d(x, torch.randn(8, 8, 3, 3, generator=draw), padding=1)
    rows = F.silu(y).flatten(2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(rows, rows, rows)
    norm = F.layer_norm(mixed @ torch.randn(8, 24, generator=draw), (24,))
    return array_digest(norm.numpy(), norm.exp().sum(1).numpy())
