"""Backends that evaluate sketches: torch, compiled loops on a CPU, Triton on a GPU."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

from torch import Tensor, float32  # `torch` is a module of this package

from dmin.runtime.errors import DminError
from dmin.sketches.backends.base import Backend
from dmin.sketches.backends.cpu import CpuBackend
from dmin.sketches.backends.gpu import GpuBackend
from dmin.sketches.backends.torch import TorchBackend

Kernels = Literal["auto", "triton", "torch"]


def backend_for(values: Tensor, kernels: str, budget: int) -> Backend:
    """Return the backend that evaluates maps in one pass.

    Rows in double precision, as the test oracle needs them, are always computed by torch.

    Args:
        values: the rows; their device and dtype select the backend.
        kernels: ``auto``, ``triton`` or ``torch``.
        budget: most bytes of per-example gradients in memory at once.

    Raises:
        DminError: ``triton`` is requested, but the rows are not on a GPU.
    """
    if kernels == "triton" and not (values.is_cuda or interpreted()):
        raise DminError(
            f"kernels=triton, but the rows are on {values.device}: Triton's kernels run on a GPU. "
            f"Set kernels=auto."
        )
    single = values.dtype == float32
    if single and (kernels == "triton" or (kernels == "auto" and values.is_cuda and installed())):
        return GpuBackend(budget)
    if single and kernels != "torch" and values.device.type == "cpu":
        return CpuBackend(budget)
    return TorchBackend(budget)


def check_kernels(kernels: str) -> None:
    """Check the setting ``kernels``.

    Raises:
        DminError: the value is unknown, or Triton is requested and not installed.
    """
    if kernels not in get_args(Kernels):
        raise DminError(
            f"kernels={kernels!r}: allowed are auto (compiled loops on a CPU, Triton on a GPU "
            f"where it is installed), triton, and torch (plain torch operations everywhere)."
        )
    if kernels == "triton" and not installed():
        raise DminError(
            "kernels=triton, but Triton is not installed. It comes with torch for CUDA; else "
            "pip install triton, or set kernels=auto."
        )


@cache
def installed() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on a CPU, as in tests."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
