"""Quantised weights: dequantised as files define it, and rounded as trainers do it."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dmin.models.recognition import tensor_names
from dmin.runtime.errors import DminError

BaseDType = Literal["float8_e4m3fn", "float8_e5m2", "float8", "qfloat8", "int8", "nf4"]
"""Types to which the weights of a base model can be rounded."""

# Names of tensors that describe how another weight is quantised.
_BESIDE = re.compile(
    r"(.*)\.(?:scale_weight|weight_scale|scale_input|input_scale|output_scale|comfy_quant|SCB"
    r"|weight_format|weight\.(?:_scale|absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__[nf]p?f?4))"
)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The 16 values of the data type NF4 (QLoRA, arXiv 2305.14314).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


@contextmanager
def plain(
    source: Path, file: Path | None, dtype: torch.dtype
) -> Iterator[tuple[Path, Path | None]]:
    """Context with a temporary copy of a checkpoint whose quantised weights are dequantised.

    float8: ``s w`` with the scale s of a second tensor (``scale_weight``), if there is one.
    bitsandbytes: int8 ``w · SCB/127``; nf4 and fp4 ``absmax[block] · quant_map[w]``, in the dtype
    in which the layer computed. quanto: ``s w`` by rows. Other files are linked, not copied.

    Args:
        source: folder of a pipeline.
        file: a file with weights in the original layout, or None.
        dtype: dtype of the dequantised weights.

    Yields:
        The folder and the file to load.

    Raises:
        DminError: weights are quantised in an unsupported way.
    """
    parts = [part for part in sorted(source.iterdir()) if part.is_dir() and _is_quantised(part)]
    single = file if file is not None and file.is_file() and _needs([file]) else None
    if not parts and single is None:
        yield source, file
        return
    # On Windows a file cannot be deleted while it is mapped.
    with TemporaryDirectory(prefix="dmin-plain-", ignore_cleanup_errors=True) as name:
        copy = Path(name)
        if parts:
            for each in source.iterdir():
                if each not in parts:
                    (copy / each.name).symlink_to(each.absolute(), each.is_dir())
        for part in parts:
            _write_part(part, copy / part.name, dtype)
        if single is not None:
            _write([single], copy, dtype)
        yield (copy if parts else source), (file if single is None else copy / single.name)


def _is_quantised(part: Path) -> bool:
    return "quantization_config" in _config(part) or _needs(list(part.glob("*.safetensors")))


def _config(part: Path) -> dict[str, Any]:
    try:
        found = json.loads((part / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # loading reports the error
    return found if isinstance(found, dict) else {}


def _needs(files: list[Path]) -> bool:
    """Return whether tensors describe how weights are quantised (not for float8 without scale)."""
    try:
        return any(_BESIDE.fullmatch(n) for f in files for n in tensor_names(f))
    except DminError:
        return False  # loading reports the error


def _write_part(part: Path, to: Path, dtype: torch.dtype) -> None:
    """Write a component with dequantised weights."""
    config = _config(part)
    told = config.pop("quantization_config", {})
    files = sorted(part.glob("*.safetensors"))
    if not _needs(files):
        method = told.get("quant_method", "an unknown method")
        raise _unread(part, f"its weights are quantised by {method}, which dmin does not read")
    to.mkdir()
    for each in part.iterdir():
        if each not in files and each.suffix != ".json":
            (to / each.name).symlink_to(each.absolute(), each.is_dir())
    kept = _write(files, to, dtype)
    for each in part.glob("*.json"):
        found = config if each.name == "config.json" else json.loads(each.read_text("utf-8"))
        if "weight_map" in found:
            found["weight_map"] = kept
        (to / each.name).write_text(json.dumps(found))


def _write(files: list[Path], to: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write files with dequantised weights; return the file of each tensor."""
    kept: dict[str, str] = {}
    with ExitStack() as stack:
        opened = {each: stack.enter_context(safe_open(each, "pt")) for each in files}
        where = {name: each for each in files for name in tensor_names(each)}

        def read(name: str) -> Tensor:
            found: Tensor = opened[where[name]].get_tensor(name)
            return found

        for file, one in opened.items():
            state: dict[str, Tensor] = {}
            for name in tensor_names(file):
                try:
                    state |= _numbers(name, read, where, dtype)
                except (DminError, KeyError, ValueError, RuntimeError) as error:
                    raise _unread(file, f"{name} cannot be read: {error}") from error
            kept |= dict.fromkeys(state, file.name)
            save_file(state, to / file.name, metadata=one.metadata())
    return kept


def _unread(place: Path, why: str) -> DminError:
    return DminError(
        f"{place}: {why}. Use the unquantised base model with the same adapter, and set the type "
        f"that its weights were rounded to in training: model.base_dtype="
        f"{'|'.join(get_args(BaseDType))} rounds them in the same way (if unset, "
        f"gradients are computed at the unrounded weights)."
    )


def _numbers(
    name: str, read: Callable[[str], Tensor], names: Collection[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a dequantised tensor by its plain name; nothing for tensors that describe another."""
    beside = _BESIDE.fullmatch(name)
    if name.rpartition(".")[2] == "scaled_fp8" or (
        beside and {f"{beside[1]}.weight", f"{beside[1]}.weight._data"} & set(names)
    ):
        return {}
    plain_name = name.removesuffix("._data")
    layer, weight = plain_name.removesuffix(".weight"), read(name)
    if f"{layer}.comfy_quant" in names:
        told = json.loads(bytes(read(f"{layer}.comfy_quant").tolist()))
        if told.get("format") not in ("float8_e4m3fn", "float8_e5m2"):
            raise DminError(f"its format is {told.get('format')}, not float8")
    scales = (f"{layer}.scale_weight", f"{layer}.weight_scale", f"{plain_name}._scale")
    scale = next((read(each).float() for each in scales if each in names), None)
    bits = (f"{plain_name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    state = next((each for each in bits if each in names), None)
    if state is not None:
        found = _four_bits(weight, plain_name, read, json.loads(bytes(read(state).tolist())))
    elif f"{layer}.SCB" in names and plain_name.endswith(".weight"):
        if read(f"{layer}.weight_format").item() != 0:
            raise DminError("bitsandbytes stored it in a layout for one type of GPU")
        found = weight.float() * (read(f"{layer}.SCB").float() / 127)[:, None]
    elif weight.dtype in (*_FLOAT8, torch.int8) and scale is not None:
        found = _scaled(weight.float(), scale)
    elif weight.dtype in (torch.int8, torch.uint8):
        raise DminError(f"{weight.dtype} in an unknown layout")
    elif weight.dtype in _FLOAT8:
        found = weight
    else:
        return {plain_name: weight}
    return {plain_name: found.to(dtype).contiguous()}


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Return ``s w`` for one s, one per row, or one per block of a row ``[out, blocks, 1]``."""
    if scale.ndim == 3 and weight.ndim == 2:
        return (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
    if scale.numel() not in (1, len(weight)):
        raise DminError(f"its scales {list(scale.shape)} do not fit weights {list(weight.shape)}")
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _four_bits(
    packed: Tensor, name: str, read: Callable[[str], Tensor], told: Mapping[str, Any]
) -> Tensor:
    """Return weights from bitsandbytes' 4-bit codes; the first of two is in the high bits."""
    absmax = read(f"{name}.absmax")
    if absmax.dtype is torch.uint8:  # scales are quantised in turn
        outer = read(f"{name}.nested_absmax").repeat_interleave(told["nested_blocksize"])
        inner = read(f"{name}.nested_quant_map")[absmax.int()]
        absmax = inner * outer[: len(inner)] + told["nested_offset"]
    flat = packed.flatten().view(torch.uint8).int()
    codes = torch.stack([flat >> 4, flat & 15], 1).flatten()
    scale = absmax.repeat_interleave(told["blocksize"])
    count = torch.Size(told["shape"]).numel()
    values = read(f"{name}.quant_map")[codes][:count] * scale[:count]
    return values.reshape(told["shape"]).to(getattr(torch, told["dtype"]))


@torch.no_grad()
def round_weights(network: nn.Module, kind: BaseDType) -> None:
    """Round weights in place, as trainers do while they train an adapter on a quantised model.

    ``float8_e4m3fn``, ``float8_e5m2``: every parameter, without scale. The others round weights of
    linear layers and convolutions: ``float8`` with one scale ``max|w|/448`` per layer; ``qfloat8``
    with one per row, ``int8`` likewise (``max|w|/127``); ``nf4`` with one per block of 64 weights,
    only in linear layers.

    Raises:
        DminError: the kind is unknown.
    """
    if kind not in get_args(BaseDType):
        allowed = ", ".join(get_args(BaseDType))
        raise DminError(f"model.base_dtype={kind!r}: allowed are {allowed}, and null.")
    if kind in ("float8_e4m3fn", "float8_e5m2"):
        for parameter in network.parameters():
            parameter.copy_(parameter.to(getattr(torch, kind)))
        return
    for module in network.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and kind != "nf4"):
            weight = module.weight
            weight.copy_(_rounded(weight.float(), kind))


def _rounded(weight: Tensor, kind: str) -> Tensor:
    if kind == "nf4":
        padded = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))
        blocks = padded.unflatten(0, (-1, 64))
        values = torch.tensor(_NF4, device=weight.device)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
        codes = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)
        return (values[codes] * scale).flatten()[: weight.numel()].reshape(weight.shape)
    largest = 127.0 if kind == "int8" else 448.0
    rows = weight.flatten() if kind == "float8" else weight.flatten(1)
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    codes = (rows / scale).clamp(-largest, largest)
    codes = codes.round() if kind == "int8" else codes.to(torch.float8_e4m3fn).float()
    return (codes * scale).reshape(weight.shape)
