"""Tensors side by side: one thread each, results in order, and never more in flight than the largest tensor needs."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

ROOM = 1 << 24  # entries in flight that are always allowed, so that small models use all cores


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Let every operation run on one thread, since tensors are what runs in parallel; yield how many may."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_order(work: Callable[[T], R], items: Sequence[T], sizes: Sequence[int], workers: int) -> Iterator[R]:
    """Yield ``work(item)`` of each item in order, computed by ``workers`` threads.

    ``sizes`` (entries) bound what is in flight: as many items as fit beside each other into the largest of them, or
    into ``ROOM`` where that is more, so memory grows with neither the model nor the number of threads.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    room = max(ROOM, *sizes)
    stop = threading.Event()
    flying: deque[tuple[Future[R], int]] = deque()
    held = 0

    def guarded(item: T) -> R:
        if stop.is_set():
            raise RuntimeError("stopped")
        return work(item)

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item, size in zip(items, sizes, strict=True):
                while flying and (held + size > room or len(flying) >= 2 * workers):
                    done, freed = flying.popleft()
                    yield done.result()
                    held -= freed
                flying.append((pool.submit(guarded, item), size))
                held += size
            while flying:
                yield flying.popleft()[0].result()
        finally:
            stop.set()
            for left, _ in flying:
                left.cancel()
