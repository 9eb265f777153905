"""The thread between the loop and the store's writer: order, limits, and what goes wrong."""

import threading
from types import SimpleNamespace

import pytest

from dmin.collect.sketch_writer import BackgroundWriter


class Slow:
    """A store's writer that waits for leave before each block."""

    def __init__(self, fails_at=None):
        self.leave, self.fails_at = threading.Semaphore(0), fails_at
        self.blocks, self.sealed, self.closed = [], [], 0

    def append(self, block, rows):
        self.leave.acquire()
        if block == self.fails_at:
            raise OSError("disk full")
        self.blocks.append(block)

    def seal(self):
        self.sealed = list(self.blocks)

    def close(self):
        self.seal()
        self.closed += 1


def rows(n=3):
    return lambda: SimpleNamespace(ids=["x"] * n)


def test_blocks_are_written_in_order_and_all_before_a_seal_or_the_end():
    store, counted = Slow(), []
    writer = BackgroundWriter(store, counted.append, waiting=4)
    for block in (5, 2, 7):
        writer.append(block, rows(block))
    assert store.blocks == []  # the loop went on meanwhile
    store.leave.release(3)
    writer.seal()
    assert store.sealed == [5, 2, 7] == counted
    store.leave.release()
    writer.append(1, rows())
    writer.close()
    assert store.sealed == [5, 2, 7, 1]


def test_no_more_blocks_wait_than_allowed():
    store = Slow()
    writer = BackgroundWriter(store, lambda n: None, waiting=2)
    loop = threading.Thread(target=lambda: [writer.append(i, rows()) for i in range(4)])
    loop.start()
    loop.join(0.2)
    assert loop.is_alive()  # the fourth does not fit in
    store.leave.release(4)
    loop.join(5)
    writer.close()
    assert store.blocks == [0, 1, 2, 3]


@pytest.mark.parametrize("call", ["append", "seal", "close"])
def test_what_fails_is_raised_by_the_next_call_and_the_rest_is_written(call):
    store, counted = Slow(fails_at=1), []
    writer = BackgroundWriter(store, counted.append, waiting=0)
    store.leave.release(9)
    writer.append(0, rows(7))
    writer.append(1, rows(8))
    with pytest.raises(OSError, match="disk full"):
        {"append": lambda: writer.append(2, rows(9))}.get(call, getattr(writer, call))()
    writer.close()
    assert store.sealed == [0] and counted == [7] and store.closed
