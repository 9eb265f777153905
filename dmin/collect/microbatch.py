"""The number of (example, timestep) pairs that fit into one pass, found by trying."""

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmin.collect.peak_memory import allocated_bytes, peak_bytes
from dmin.gradients.ownership import Ownership
from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, os_failure
from dmin.runtime.fingerprint import fingerprint

# Trying larger sizes ends where doubling makes pairs this little faster.
WORTHWHILE = 1.05
# Of the free memory of a GPU, where no limit is given: fragments and other blocks need some.
SHARE_OF_FREE = 0.85


def find_microbatch(
    attempt: Callable[[int], Any], most: int, device: torch.device, limit: int | None = None
) -> int:
    """Return the number of (example, timestep) pairs to run in one pass.

    Sizes 1, 2, 4, … are tried until one exceeds the GPU memory or the limit, or is no longer
    faster per pair than the previous one.

    Args:
        attempt: runs one pass of so many pairs.
        most: pairs there are.
        device: where they run.
        limit: bytes that a pass may take, including activations. None: on a GPU most of the free
            memory, on a CPU no limit. On a CPU only growth of the process's peak is measured: what
            fits below an earlier peak counts as zero.

    Raises:
        DminError: a single pair takes more.
    """
    if limit is None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = int(SHARE_OF_FREE * (torch.cuda.mem_get_info(device)[0] + cached))
    most_bytes = float("inf") if limit is None else limit
    before = allocated_bytes(device)
    _, taken = _measured(attempt, 1, device, before)  # warms up: its time does not count
    if taken > most_bytes:
        raise DminError(
            f"one pair of example and timestep takes {taken:,.0f} bytes, more than the limit of "
            f"{limit:,}. Set collect.gradient_checkpointing=true or collect.budget lower, "
            f"attribute fewer parameters with collect.params, or raise collect.memory."
        )
    found, fastest, size = 1, 0.0, 1
    while size <= most:
        seconds, taken = _measured(attempt, size, device, before)
        if taken > most_bytes or size / seconds < WORTHWHILE * fastest:
            break
        found, fastest, size = size, size / seconds, 2 * size
    return found


def examined_size(run: Callable[[Ownership, int], Any], size: int, device: torch.device) -> int:
    """Return how many pairs to run in a pass of a network whose passes may have to be examined.

    Where data decide the order of rows, each pass of several pairs is examined, at the cost of two
    to four backward passes; pairs alone need none.

    Args:
        run: runs one pass of so many pairs with given knowledge of the rows.
        size: what :func:`find_microbatch` returned for passes that are not examined.
        device: where they run.

    Returns:
        1 if data decide the order and single pairs are faster, else ``size``.
    """
    ownership = Ownership()
    if size > 1:
        run(ownership, size)
    if not ownership.routed:
        return size
    run(ownership, 1)  # warms up
    together, alone = (_measured(partial(run, ownership), n, device, 0)[0] for n in (size, 1))
    return 1 if size * alone < together else size


def agree_on_microbatch(path: Path, find: Callable[[], int]) -> int:
    """Return the size noted in a file; find it and note it if there is none.

    The first process to note one decides for all, and for every run that resumes the store.

    Args:
        path: the file, see :func:`note_of`.
        find: called if nothing is saved.
    """
    try:
        if not path.is_file():
            note = (json.dumps({"microbatch": find()}) + "\n").encode()
            with suppress(FileExistsError):
                commit(path, note, overwrite=False)
        return int(json.loads(path.read_text())["microbatch"])
    except OSError as error:
        raise os_failure("note the size of the microbatch in", path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DminError(
            f"{path} is damaged ({error!r}). Delete it: the size is then determined again."
        ) from error


def note_of(store: Path, device: torch.device, **settings: Any) -> Path:
    """Return the file next to a store with its microbatch for a kind of device.

    Args:
        store: the store's folder.
        device: whose kind counts (name and memory), not the single machine.
        settings: further settings that the size depends on.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        kind: list[Any] = [torch.cuda.get_device_name(device), memory]
    else:
        kind = [platform.machine(), torch.get_num_threads()]
    key = fingerprint({"device": [device.type, *kind], **settings})
    return store.with_name(f"{store.name}.microbatch-{key}.json")


def _measured(
    attempt: Callable[[int], Any], size: int, device: torch.device, before: int
) -> tuple[float, float]:
    """Return seconds and peak bytes of a pass; infinite if it runs out of GPU memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        attempt(size)
        if on_gpu:
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return float("inf"), float("inf")
    seconds = time.perf_counter() - start
    # What PeakMemory resets meanwhile is the forward pass, which backward overtakes.
    return seconds, peak_bytes(device) - before
