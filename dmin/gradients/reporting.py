"""Parameters that report each operation that uses them."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_NO_GRADIENT = {Tensor.detach, Tensor.requires_grad_, cast(Any, Tensor.data).__get__}


def _leaves(x: Any) -> Sequence[Any]:
    """Return the leaves of a nested argument or result."""
    return pytree.tree_leaves(x) if isinstance(x, tuple | list | dict) else (x,)


def reporting_class(note: Callable[[nn.Parameter], None]) -> type[nn.Parameter]:
    """Return a class for parameters that report each operation that computes with them."""

    class ReportingParameter(nn.Parameter):
        @classmethod
        def __torch_function__(
            cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if func in _NO_GRADIENT:
                return result
            # True for ``h[0] = parameter``, but not for setting or getting (None) an attribute.
            computes = result is None and func.__name__ not in ("__get__", "__set__")
            if computes or any(isinstance(x, Tensor) for x in _leaves(result)):
                for leaf in chain.from_iterable(map(_leaves, (*args, *(kwargs or {}).values()))):
                    if isinstance(leaf, cls):
                        note(leaf)
            return result

    return ReportingParameter
