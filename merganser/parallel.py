"""Tensors side by side: one thread each, results in order, and never more in flight than the largest tensor needs.

Where a large tensor keeps others from being begun, `beside` takes the threads that are idle for parts of its work.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

ROOM = 1 << 25  # entries of all experts in flight that are always allowed, so that small models use all cores


@dataclass(frozen=True)
class Threads:
    """The threads of a loop over tensors: a permit each, and a pool for those that help out."""

    free: threading.Semaphore
    helpers: ThreadPoolExecutor


_mine: threading.local = threading.local()  # the `Threads` of the loop that this thread works for


def beside(parts: Sequence[Callable[[], None]]) -> None:
    """Do all parts of one tensor's work, those on idle threads that are to be had at once.

    They may be done in any order and write to places of their own, so that it makes no difference to the result.
    """
    threads: Threads | None = getattr(_mine, "threads", None)
    mine, handed = [parts[0]], []
    for part in parts[1:]:
        if threads is None or not threads.free.acquire(blocking=False):
            mine.append(part)
        else:
            handed.append(threads.helpers.submit(_helping, threads.free, part))
    try:
        for part in mine:
            part()
    finally:
        wait(handed)
    for one in handed:
        one.result()


def _helping(free: threading.Semaphore, part: Callable[[], None]) -> None:
    try:
        part()
    finally:
        free.release()


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

    ``sizes`` (what an item holds: entries of all experts) bound what is in flight: as many items as fit beside each other
    into the largest of them, or into ``ROOM`` where that is more, so memory grows with neither the model nor the number of
    threads. The first item that fits is begun next, so that small ones run beside a large one.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    room = max(ROOM, *sizes)
    stop = threading.Event()
    waiting = list(range(len(items)))
    flying: dict[Future[R], int] = {}
    done: dict[int, Future[R]] = {}

    def guarded(item: T) -> R:
        if stop.is_set():
            raise RuntimeError("stopped")
        _mine.threads = threads
        with threads.free:
            return work(item)

    def begin() -> None:
        while len(flying) < workers:
            free = room - sum(sizes[at] for at in flying.values())
            fitting = next((at for at in waiting if sizes[at] <= free), None)
            if fitting is None:
                return
            waiting.remove(fitting)
            flying[pool.submit(guarded, items[fitting])] = fitting

    with pool_of(workers) as pool, pool_of(workers - 1) as helpers:
        threads = Threads(threading.Semaphore(workers), helpers)
        try:
            for at in range(len(items)):
                while at not in done:
                    begin()
                    for ended in wait(flying, return_when=FIRST_COMPLETED).done:
                        done[flying.pop(ended)] = ended
                begin()  # before the caller takes its time with the result
                yield done.pop(at).result()
        finally:
            stop.set()


def pool_of(workers: int) -> ThreadPoolExecutor:
    """Return a pool whose threads run every operation on themselves alone."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
