"""Record, while a network runs, whether the order of its rows depends on data."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

# Operations that take positions from a tensor. Lookups in parameters keep the order of the index.
_INDEXING = {
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in (
        *("gather", "take", "take_along_dim", "index_select", "masked_select", "repeat_interleave"),
        *("index_add", "index_copy", "index_put", "masked_scatter", "scatter", "scatter_add"),
        *("scatter_reduce", "index_add_", "index_copy_", "index_put_", "masked_scatter_"),
        *("scatter_", "scatter_add_", "scatter_reduce_"),
    )
    if hasattr(holder, name)
} | {Tensor.__getitem__, Tensor.__setitem__}
# Operations that order rows by data, or convert it to Python values, which can decide anything.
_DECIDING = {
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in (
        *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"),
        *("__contains__", "equal", "allclose", "nonzero", "argwhere", "sort", "msort", "unique"),
        *("unique_consecutive", "bincount"),
    )
    if hasattr(holder, name)
} | {F.one_hot}
# Operations that use only dtype, device or shape of their second tensor.
_AS = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# Operations that draw random numbers: an order by these differs in each pass.
_DRAWING = {torch.randperm, torch.rand, torch.randn, torch.randint, torch.multinomial}


class DataDependence(TorchFunctionMode):
    """Records whether positions or decisions depend on the tensors passed to :meth:`begins`.

    Attributes:
        found: whether they do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: bool = False
        self._data = WeakIdKeyDictionary()

    def begins(self, inputs: Iterable[Tensor]) -> None:
        """Treat tensors as data, and everything that is computed from them."""
        for tensor in inputs:
            self._data[tensor] = True

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and record whether it depends on data."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = args[:1] if func in _AS else (args, kwargs)
        used = [self._is_data(x) for x in pytree.tree_leaves(given)]
        if any(used) or func in _DRAWING:
            self.found = self.found or self._decides(func, args, kwargs)
            self.begins(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
            if result is None and args and isinstance(args[0], Tensor):
                self.begins(args[:1])
        return result

    def _is_data(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self._data

    def _decides(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        if func in _DECIDING:
            return True
        others = [*args[1:], *kwargs.values()]
        if func is F.embedding:  # rows of a computed table may belong to examples
            return any(map(self._is_somebodys, others[:1]))
        if func is torch.where:
            return not others
        if func not in _INDEXING:
            return False
        if func is Tensor.__setitem__:  # only the index counts, not x in out[..., 0::2] = x
            return any(map(self._is_data, pytree.tree_leaves(others[:1])))
        index = [x for x in pytree.tree_leaves(others) if self._is_data(x)]
        # A lookup in a constant table keeps the order of the index. A second tensor is written.
        return not others or bool(index and (self._is_somebodys(args[0]) or len(index) > 1))

    def _is_somebodys(self, x: Any) -> bool:
        return isinstance(x, Tensor) and (x.requires_grad or self._is_data(x))
