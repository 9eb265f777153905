"""The device memory that a model needs, from its configs, before any weight is read.

The network is built on torch's ``meta`` device and runs one (example, timestep) pair there, which
only computes shapes. The tensors that autograd saves for backward are added up, and operations are
counted.
"""

import math
import time
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dmin.collect import GradientCollector
from dmin.data.base import Example, collate
from dmin.runtime import memory
from dmin.runtime.formatting import byte_size, span

_ATEN = torch.ops.aten
_FUSED = _ATEN._scaled_dot_product_flash_attention_for_cpu
# Operations whose results Python code reads: a number, a truth value, whether tensors are equal.
_ASKING = (_ATEN._local_scalar_dense.default, _ATEN.allclose.default, _ATEN.equal.default)
# Operations that torch's counter lacks.
COUNTED = {_FUSED: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
# Cost of collecting in forward passes: the forward pass, the gradients of activations, and those
# of the weights with their sketch (experiments/bench: .6 to 1 of plain training).
PASSES = 3
SIDE = 1024  # of the matrix product that measures a device's speed


class Size(NamedTuple):
    """Memory and operations that a model needs, and those of the device."""

    network: str  # name of its class
    parameters: int
    network_bytes: int
    encoder_bytes: int  # of all encoders; they leave the device after encoding
    kept_bytes: int  # saved per (example, timestep) pair from its forward pass to backward
    pairs: int  # per pass (collect.microbatch)
    operations: int  # of a forward pass of one pair
    all_pairs: int  # of the whole dataset
    free_bytes: int | None  # free memory of the device; None if unknown
    speed: float  # operations per second of a matrix product on the device

    @property
    def needed(self) -> int:
        """Bytes of network and activations, without the gradients' (collect.budget)."""
        return self.network_bytes + self.pairs * self.kept_bytes

    @property
    def seconds(self) -> float:
        """Least time for all pairs, as if all operations were products of large matrices."""
        return PASSES * self.operations * self.all_pairs / self.speed

    def remedies(self, dtype: torch.dtype, offers_checkpointing: bool) -> list[str]:
        """Return settings that make it fit, the cheapest first; none if it fits.

        Args:
            dtype: of the weights.
            offers_checkpointing: whether the network can compute activations again.
        """
        if self.free_bytes is None or self.needed <= self.free_bytes:
            return []
        free, kept = self.free_bytes, max(self.kept_bytes, 1)
        left, halved = free - self.network_bytes, 2 * free - self.network_bytes
        again = "collect.gradient_checkpointing=true "
        found = [f"collect.microbatch={left // kept}"] if left >= kept else []
        if dtype == torch.float32 and halved >= kept:
            pairs = min(self.pairs, halved // kept)
            found.append(f"model.torch_dtype=bfloat16 collect.microbatch={pairs}")
        if left > 0 and offers_checkpointing:
            found.append(f"{again}collect.microbatch=1")
        if left < kept and (kept < free or offers_checkpointing):
            # Activations are not sharded. Recomputed, they are assumed to need half the memory.
            fewer, beside = ("", kept) if kept < free else (again, free // 2)
            parts = math.ceil(self.network_bytes / (free - beside))
            found.append(f"trainer=offload {fewer}collect.microbatch=1")
            found.append(
                f"trainer=fsdp trainer.devices={max(2, parts)} {fewer}collect.microbatch=1"
            )
        return found

    def table(self, remedies: list[str]) -> Table:
        """Return a table for the terminal."""
        title = "Memory and time, predicted from the configs"
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_row(self.network, f"{self.parameters:,} parameters")
        table.add_row("weights", byte_size(self.network_bytes))
        if self.encoder_bytes:
            table.add_row("encoders, only while encoding", byte_size(self.encoder_bytes))
        kept = f"{byte_size(self.kept_bytes)}, times {self.pairs} (collect.microbatch)"
        table.add_row("activations of a pair", kept)
        free = "unknown" if self.free_bytes is None else byte_size(self.free_bytes)
        table.add_row("total", f"{byte_size(self.needed)} of {free}{'' if remedies else ': fits'}")
        for i, remedy in enumerate(remedies):
            table.add_row("" if i else "does not fit; try", remedy)
        at = f"at {self.speed / 1e12:,.2g} TFLOP/s, measured by a matrix product"
        table.add_row("all examples, at least", f"{span(self.seconds)} {at}")
        return table


def predict_size(
    collector: GradientCollector, example: Example, examples: int, device: torch.device
) -> Size:
    """Predict the memory and time that a collector's model needs on a device.

    Args:
        collector: of a model on ``meta``, made in
            :func:`dmin.models.checkpoints.without_weights`.
        example: one example of the data.
        examples: their number.
        device: where it is to run.

    Raises:
        Exception: the model needs values, not only shapes, or rejects those it gets.
    """
    model, network = collector.model, collector.model.network
    attributed = collector.attributed.by_name
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in attributed)
    own = {x.untyped_storage()._cdata for x in (*network.parameters(), *network.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    with ShapesAlone():
        with torch.no_grad():
            x0, condition = model.encode(collate([example]))
        inputs = collector.inputs(x0, condition, [example.id])
        batch = inputs.at(torch.arange(1))
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        with saved_tensors_hooks(keep, lambda t: t), counter as counted, FusedAttention():
            model.predict(batch.x0, batch.noise, batch.t, batch.condition)
    encoders = collector.encoders.values()
    return Size(
        type(network).__name__,
        sum(p.numel() for p in network.parameters()),
        _bytes_of(network),
        sum(map(_bytes_of, encoders)),
        sum(storage.nbytes() for storage in kept.values()),
        collector.pairs,
        counted.get_total_flops(),
        examples * inputs.points * len(collector.readouts),
        _free(device),
        _speed(device, next(network.parameters()).dtype),
    )


class FusedAttention(TorchFunctionMode):
    """Makes attention on ``meta`` save what fused kernels save, not the whole attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention or kwargs.get("enable_gqa"):
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        sides = [told.pop(name) for name in names[:3]]
        told.pop("enable_gqa", None)
        return _FUSED(*sides, **{k: v for k, v in told.items() if v is not None})[0]


class ShapesAlone(TorchDispatchMode):
    """Runs modules on ``meta`` with real inputs: only integers and booleans keep their values.

    Outputs of a tokenizer (tokens, masks, lengths) are computed on the CPU, so that code can read
    them. Every other tensor moves to ``meta`` when it is combined with one there. If code reads a
    tensor on ``meta``, it gets true or one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_meta = any(x.is_meta for x in tensors)
        if func in _ASKING and on_meta:
            number = func is _ASKING[0] and tensors[0].dtype.is_floating_point
            return 1.0 if number else True
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"]).type == "meta"
            if on_meta:
                kwargs["device"] = torch.device("meta")
            elif wanted and _is_whole(func, args, kwargs, tensors):
                kwargs["device"] = torch.device("cpu")
        if on_meta and len(tensors) > 1:
            if "index" in func.overloadpacket.__name__ and isinstance(args[1], list | tuple):
                args = (args[0], _indices(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _is_whole(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Return whether an operation creates integers or booleans."""
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
    if dtype is None:
        return func.overloadpacket is _ATEN.arange and all(isinstance(x, int) for x in args)
    return not dtype.is_floating_point and not dtype.is_complex


def _indices(given: Any) -> list[Tensor | None]:
    """Convert masks to index tensors; a mask without known values is taken as true everywhere."""
    found: list[Tensor | None] = []
    for index in given:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
            continue
        mask = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
        found.extend(mask.nonzero(as_tuple=True))
    return found


def _to_meta(x: Tensor) -> Tensor:
    if x.is_meta:
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


def _bytes_of(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.available()


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product, the best of five."""
    matrix, best = torch.ones(SIDE, SIDE, dtype=dtype, device=device), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best
