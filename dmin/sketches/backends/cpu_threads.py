"""Run work in torch's own threads.

Between two operations torch's threads do not sleep but spin for milliseconds. Threads of
another pool would have to share their cores (on two cores, folding in a pool of threads was
no faster than in one thread). So the work runs in torch's OpenMP threads, by the entry point
that compiled code uses; if the runtime lacks it, a pool of threads is used.
"""

import ctypes
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work(0) … work(count − 1)``, in as many threads as torch may use.

    Args:
        count: number of calls.
        work: should spend its time in compiled loops, which release Python's global lock.
    """
    threads = torch.get_num_threads()
    if min(threads, count) < 2:
        for i in range(count):
            work(i)
        return
    numbers = itertools.count()
    errors: list[BaseException] = []

    def drain(_: Any = None) -> None:
        try:
            while (i := next(numbers)) < count and not errors:
                work(i)
        except BaseException as error:  # compiled code must not receive an exception
            errors.append(error)

    parallel = _openmp()
    if parallel is not None:
        # Always all of torch's threads: OpenMP ends and starts threads when the number changes.
        parallel(_BODY(drain), None, threads, 0)
    else:
        helpers = [_pool(os.getpid(), threads).submit(drain) for _ in range(threads - 1)]
        drain()
        for helper in helpers:
            helper.result()
    if errors:
        raise errors[0]


def with_scratch(loop: Callable[..., int], *arguments: Any) -> None:
    """Call a loop with scratch memory that is kept for the next call.

    Without it each call would map and unmap memory pages, which takes longer than filling them.
    One buffer is kept for each thread, of the largest size that a loop has needed.

    Args:
        loop: takes the float32 scratch memory first; allocates its own if that is too small.
            Returns the number of floats that it needs.
        arguments: the other arguments of the loop.
    """
    scratch = _SCRATCH.pop() if _SCRATCH else np.empty(0, np.float32)
    needed = loop(scratch, *arguments)
    _SCRATCH.append(scratch if len(scratch) >= needed else np.empty(needed, np.float32))


_SCRATCH: list[np.ndarray] = []
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Callable[[Any, None, int, int], None] | None:
    """Return ``GOMP_parallel`` of the OpenMP runtime that torch is linked with, if it has one."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of threads of a process; a forked process gets its own."""
    return ThreadPoolExecutor(threads, "dmin-fold")
