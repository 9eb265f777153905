"""A device of torch's without double precision, as Apple's; its tensors are on the host."""

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device):
        return torch.get_rng_state()

    def set_rng_state(self, state, device):
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("single", _Module())
DEVICE = torch.device("single", 0)
WIDE = {torch.float64, torch.complex128}


class Narrow(torch.Tensor):
    """A tensor on the device.

    Args:
        inner: what it is on the host.
    """

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in WIDE:
            raise TypeError(f"the device has no {inner.dtype}")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout
        )
        made.inner = inner
        return made

    def untyped_storage(self):
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _on_host(function, *args, **(kwargs or {}))


def _on_host(function, *args, **kwargs):
    """Do on the host what is asked of the device; what was made for it is there."""
    named = {id(x.inner): x for x in tree_leaves((args, kwargs)) if isinstance(x, Narrow)}
    device = kwargs.get("device")
    there = bool(named) if device is None else device.type == DEVICE.type
    if there and device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    args, kwargs = tree_map_only(Narrow, lambda x: x.inner, (args, kwargs))
    found = function(*args, **kwargs)
    if not there:
        return found
    return tree_map_only(
        torch.Tensor, lambda x: named[id(x)] if id(x) in named else Narrow(x), found
    )


def _by(function):
    return lambda *args, **kwargs: _on_host(function, *args, **kwargs)


# What reaches the device itself: factories, and what `torch.tensor` makes of them.
_aten = torch.ops.aten
_library = torch.library.Library("aten", "IMPL")
for _made in (_aten.empty.memory_format, _aten.empty_strided.default, _aten.copy_.default):
    _library.impl(_made, _by(_made), "PrivateUse1")
