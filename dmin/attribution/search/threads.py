"""Run work in as many threads as torch uses, with results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from threading import Barrier
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def in_threads(
    work: Callable[[In], Out], items: Sequence[In], compiled: bool = False
) -> Iterator[Out]:
    """Yield results in order; a few items are computed ahead, each by one thread.

    Args:
        work: applied to each item.
        items: in order.
        compiled: the work runs in compiled loops that do not call
            torch. Then existing threads are reused (starting new ones with torch
            takes milliseconds), and the caller is one of them: as an additional thread
            it would compete for a core while holding Python's lock. Otherwise the caller's
            torch operations use one thread meanwhile.
    """
    threads = min(torch.get_num_threads(), len(items))
    with _compiled_threads(threads) if compiled else _threads_of_one(threads) as pool:
        if pool is None:
            yield from map(work, items)
            return
        waiting: deque[tuple[Future[Out], In]] = deque()
        rest = iter(items)

        def submit(count: int) -> None:
            waiting.extend((pool.submit(work, item), item) for item in islice(rest, count))

        submit(2 * threads)
        try:
            while waiting:
                while compiled and not waiting[0][0].done() and _take_over(work, waiting):
                    pass
                done = waiting.popleft()[0].result()
                submit(1)
                yield done
        finally:
            for each, _ in waiting:
                each.cancel()


def _take_over(work: Callable[[In], Out], waiting: deque[tuple[Future[Out], In]]) -> bool:
    """Compute the first item not yet begun; return whether there was one."""
    for place, (future, item) in enumerate(waiting):
        if future.cancel():
            mine: Future[Out] = Future()
            try:
                mine.set_result(work(item))
            except Exception as error:  # raised when its turn comes
                mine.set_exception(error)
            waiting[place] = mine, item
            return True
    return False


@cache
def _lasting_pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="dmin-search")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_lasting_pool.cache_clear)


@contextmanager
def _compiled_threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _lasting_pool(count - 1) if count > 1 else None
    finally:
        torch.set_num_threads(before)


@contextmanager
def _threads_of_one(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """Return a pool whose threads use one torch thread each; None if one thread is enough."""
    before = torch.get_num_threads()
    all_set = Barrier(count + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it is first asked for
        all_set.wait()

    torch.set_num_threads(1)
    try:
        if count <= 1:
            yield None
            return
        with ThreadPoolExecutor(count, initializer=settle) as pool:
            for _ in range(count):
                pool.submit(int)
            all_set.wait()
            yield pool
    finally:
        torch.set_num_threads(before)
