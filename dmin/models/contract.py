"""Check what a model returns against its contract, at the first example and in every pass."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dmin.diffusion.inputs import SHARED, NoisedBatch
from dmin.gradients.parameters import some_of
from dmin.models.base import Condition, Prediction
from dmin.models.masked import encode, predict, side_by_side
from dmin.runtime.errors import DminError

_FAULTS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
_SEEN: WeakSet[nn.Module] = WeakSet()
"""Models whose encodings were checked not to depend on the number of examples."""
_HOOKS = {"layerwise_casting", "peft_autocast_disable"}  # of diffusers, which compute the same


def check_model(model: Any) -> None:
    """Refuse a model without the required members.

    Raises:
        DminError: it has no network with initialised parameters, no ``predict``, or no timesteps;
            or hooks of others move its weights.
    """
    network = getattr(model, "network", None)
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise DminError(
            f"{_of(model)}.network is {_kind(network)}. It must be the torch module with the "
            f"parameters that are to be attributed: set self.network in __init__, after "
            f"super().__init__()."
        )
    require_values([name for name, p in network.named_parameters() if is_lazy(p)])
    for name, module in network.named_modules():
        _require_in_place(name or "the network", module)
    if not callable(getattr(model, "predict", None)) or not len(getattr(model, "timesteps", ())):
        raise DminError(
            f"{_of(model)} needs a method predict(x0, noise, t, condition) and timesteps, its "
            f"timesteps in the order of sampling. Subclass dmin.models.DiffusionModel."
        )


def require_values(empty: Collection[str]) -> None:
    """Refuse parameters without values: those of lazy layers, or on the meta device.

    Args:
        empty: their names.

    Raises:
        DminError: there are some.
    """
    if empty:
        raise DminError(
            f"{len(empty)} parameter(s) of the network have no values yet: {some_of(empty)}. Load "
            f"its weights; lazy layers (nn.LazyLinear) have to be called once before."
        )


def _require_in_place(name: str, module: nn.Module) -> None:
    """Refuse hooks of accelerate and diffusers that move weights or keep features of a pass."""
    hook = getattr(module, "_hf_hook", None)
    names = {*getattr(getattr(module, "_diffusers_hook", None), "hooks", ())} - _HOOKS
    for each in getattr(hook, "hooks", [hook]):  # one, or several in one
        if getattr(each, "offload", hasattr(each, "prev_module_hook")):
            names.add(type(each).__name__)
    if names:
        raise DminError(
            f"{name} has a hook ({some_of(names)}) that moves its weights, or keeps features from "
            f"one pass to the next. Load the model without offloading and caches; trainer=offload "
            f"keeps weights in host memory."
        )


def check_weights(network: nn.Module) -> None:
    """Refuse weights in which small gradients are lost.

    Raises:
        DminError: some are float16.
    """
    half = [name for name, p in network.named_parameters() if p.dtype is torch.float16]
    if half:
        raise DminError(
            f"{len(half)} parameters of the network are float16 (such as {half[0]}), which rounds "
            f"small gradients to zero. Load it in float32 or bfloat16 (model.torch_dtype, or "
            f"network.to(torch.bfloat16))."
        )


def check_precision(network: nn.Module) -> None:
    """Refuse weights in which gradients are lost, and a precision missing from the fingerprint.

    Raises:
        DminError: float16 weights, or ``torch.autocast`` around the collection.
    """
    check_weights(network)
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if kinds:
        raise DminError(
            f"torch.autocast is on ({', '.join(kinds)}): gradients would be of another precision "
            f"than the store says. Collect without it (bfloat16: model.torch_dtype=bfloat16)."
        )


def encoded(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
    """Return the checked result of a model's ``encode``.

    For a user's own model without encoders, the first example is also encoded alone, once.

    Args:
        model: a :class:`~dmin.models.base.DiffusionModel`.
        batch: the argument of its ``encode``.

    Raises:
        DminError: ``encode`` fails, or its result violates the contract.
    """
    if "drawn" in batch:
        return side_by_side([encoded(model, each) for each in batch["drawn"]])
    found = _encoded(model, batch)
    count = len(batch["id"])
    is_own = not type(model).__module__.startswith("dmin.")
    if is_own and count > 1 and model not in _SEEN and not getattr(model, "encoders", {}):
        # The first axis of a condition may have the batch's length by chance.
        alone = _encoded(model, {name: value[:1] for name, value in batch.items()})
        for name, value in alone[1].items():
            whole = found[1][name]
            alike = value.shape[1:] == whole.shape[1:]
            if not (torch.equal(value, whole) if name.startswith(SHARED) else alike):
                raise DminError(
                    f"{_of(model)}.encode: the condition {name!r} is {list(whole.shape)} "
                    f"for {count} examples and {list(value.shape)} for the first alone. An "
                    f"example's condition must not depend on the others: pad to a fixed length."
                )
        _SEEN.add(model)
    return found


def predicted(model: Any, batch: NoisedBatch) -> Prediction:
    """Return the checked result of a model's ``predict`` for noised examples.

    Args:
        model: a :class:`~dmin.models.base.DiffusionModel`.
        batch: the noised examples.

    Raises:
        DminError: ``predict`` or the network fails, or the result violates the contract.
    """
    try:
        found = predict(model, batch)
    except _FAULTS as error:
        shapes = {"x0": batch.x0, "noise": batch.noise, "t": batch.t, **batch.condition}
        told = ", ".join(f"{name} {list(value.shape)}" for name, value in shapes.items())
        _explain(error, f"{_of(model)}.predict fails, given {told}")
    _check_prediction(found, len(batch.t), f"{_of(model)}.predict")
    return found


class _Declared(Mapping[str, Any]):
    """The metadata of an example, restricted to the columns that the model declares."""

    def __init__(self, model: Any, known: Mapping[str, Any]) -> None:
        columns = ("label", "caption", *getattr(model, "metadata_columns", ()))
        self._known = {name: known[name] for name in columns if name in known}
        self._columns, self._model = columns, _of(model)

    def __getitem__(self, column: str) -> Any:
        """Return the value of a declared column."""
        if column not in self._columns:
            raise DminError(
                f"{self._model}.encode reads {column!r} of the metadata, which may change after a "
                f"store was collected. Declare it in the class: metadata_columns = [{column!r}]."
            )
        return self._known[column]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of declared columns that exist."""
        return iter(self._known)

    def __len__(self) -> int:
        """Return the number of declared columns that exist."""
        return len(self._known)


def _encoded(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
    ids, name = batch["id"], f"{_of(model)}.encode"
    if "metadata" in batch:
        batch = {**batch, "metadata": [_Declared(model, facts) for facts in batch["metadata"]]}
    try:
        found = encode(model, batch)
    except _FAULTS as error:
        _explain(error, f"{name} fails at {len(ids)} example(s) from {ids[0]!r} on")
    if not isinstance(found, tuple) or len(found) != 2:
        raise DminError(
            f"{name} returns {_kind(found)}. It must return x0, a tensor with one row for each "
            f"example, and the condition, a dict of tensors (empty if there is none)."
        )
    x0, condition = found
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.ndim < 2:
        raise DminError(
            f"{name} returns {_kind(x0)} as x0. It must be a tensor of floating point, [batch, "
            f"...]: join several tensors into one (torch.cat of the flattened tensors) and split "
            f"them in predict."
        )
    if len(x0) != len(ids):
        raise DminError(
            f"{name} returns x0 of {list(x0.shape)} for {len(ids)} example(s). Its first axis must "
            f"be that of the examples."
        )
    if not isinstance(condition, Mapping):
        raise DminError(
            f"{name} returns {_kind(condition)} as the condition. It must be a dict of tensors, "
            f"empty if there is none."
        )
    for key, value in condition.items():
        _check_condition(name, key, value, len(ids))
    return x0, condition


def _check_condition(name: str, key: Any, value: Any, count: int) -> None:
    """Refuse a condition that neither has one row per example nor is named as shared."""
    if not isinstance(value, Tensor):
        raise DminError(
            f"{name} returns {_kind(value)} as the condition {key!r}. It must be a tensor with one "
            f"row for each example: stack a list, leave out None, and keep data shared by all "
            f"examples in the model, or as a tensor named {SHARED + str(key)!r}."
        )
    if not str(key).startswith(SHARED) and (not value.ndim or len(value) != count):
        raise DminError(
            f"{name} returns the condition {key!r} of {list(value.shape)} for {count} example(s). "
            f"Its first axis must be that of the examples. If it is the same for all of them, name "
            f"it {SHARED + str(key)!r}: predict then receives it whole under that name."
        )


def _check_prediction(found: Any, count: int, name: str) -> None:
    fields = ("prediction", "target", "weight")
    if not all(hasattr(found, field) for field in fields):
        raise DminError(
            f"{name} returns {_kind(found)}. It must return a dmin.models.Prediction(prediction, "
            f"target, weight)."
        )
    output = found.prediction
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != count:
        raise DminError(
            f"{name}: the prediction is {_kind(output)}, but must have {count} rows, one each."
        )
    own = getattr(found, "loss", None)
    target = found.target
    if own is None and (not isinstance(target, Tensor) or target.shape != output.shape):
        raise DminError(
            f"{name}: the target is {_kind(target)} and the prediction {_kind(output)}. They must "
            f"have the same shape; return a loss other than the squared error as Prediction(..., "
            f"loss=[batch])."
        )
    rows = {"weight": found.weight, "bound": getattr(found, "bound", None), "loss": own}
    for field, value in rows.items():
        if value is None and (field != "weight" or own is not None):
            continue
        if not isinstance(value, Tensor) or value.shape != (count,):
            raise DminError(
                f"{name}: the {field} is {_kind(value)}, but must be one number for each "
                f"example, [{count}]: do not take the mean over the batch."
            )
    dropped = getattr(found, "dropped", None)
    if dropped is not None:
        _check_prediction(dropped.prediction, count, f"{name} (dropped)")


def _explain(error: Exception, what: str) -> NoReturn:
    """Raise a model's exception as a DminError with the line of its code."""
    # The loss of another process is not an error of the model; the session explains it.
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    own = [f for f in frames if "site-packages" not in f.filename and ours not in f.filename]
    place = (own or frames)[-1]
    raise DminError(
        f"{what}: {type(error).__name__}: {error} ({Path(place.filename).name}, line "
        f"{place.lineno}: {place.line}). `dmin doctor` checks whether it is fixed."
    ) from error


def _of(model: Any) -> str:
    return type(model).__name__


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"
