"""Tensors side by side: results in order, never more in flight than there is room for, the first error by order."""

import threading
import time
from functools import partial

import pytest
import torch

from merganser import parallel
from merganser.merge import merge
from merganser.parallel import ROOM, beside, in_order
from merganser.steps import spectrum

LARGE, SMALL = ROOM * 3 // 5, ROOM // 5


class Held:
    """Counts what is in flight while items are worked on."""

    def __init__(self):
        self.now, self.most, self.lock = [], [], threading.Lock()

    def __call__(self, size):
        with self.lock:
            self.now.append(size)
            self.most.append(tuple(self.now))
        time.sleep(0.002)
        with self.lock:
            self.now.remove(size)
        return size


def test_small_items_run_beside_a_large_one_and_two_large_ones_do_not():
    sizes = [SMALL, LARGE, LARGE, SMALL, SMALL, LARGE, SMALL] * 4
    held = Held()
    assert list(in_order(held, sizes, sizes, 2)) == sizes
    assert max(map(sum, held.most)) <= ROOM
    assert any(sorted(some) == [SMALL, LARGE] for some in held.most)


def test_an_item_larger_than_the_room_runs_alone():
    sizes = [SMALL, 2 * ROOM, SMALL, 2 * ROOM]
    held = Held()
    assert list(in_order(held, sizes, sizes, 3)) == sizes
    assert max(map(sum, held.most)) <= 2 * ROOM


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_by_order_is_raised_after_what_comes_before_it(workers):
    def work(item):
        if item > 2:
            raise ValueError(str(item))
        return item

    seen = []
    with pytest.raises(ValueError, match="3"):
        seen.extend(in_order(work, range(9), [1] * 9, workers))
    found = in_order(work, range(9), [1] * 9, workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    found.close()


def test_parts_of_one_item_are_done_by_idle_threads_and_inline_where_there_is_none():
    def work(item):
        seen, names = [0] * 4, set()

        def part(k):
            seen[k] += 1
            names.add(threading.get_ident())
            time.sleep(0.005)

        beside([partial(part, k) for k in range(4)])
        assert seen == [1] * 4
        return len(names)

    assert list(in_order(work, [0], [1], 3)) == [1], "alone it is no loop over threads"
    some = list(in_order(work, range(3), [ROOM] * 3, 3))
    assert max(some) > 1, "large ones run one at a time, beside idle threads"
    assert max(some) <= 3
    assert work(0) == 1


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_in_a_part_is_raised_and_gives_its_thread_back(at):
    def part(k):
        if k == at:
            raise ValueError("part")

    def work(item):
        if item == 0:
            with pytest.raises(ValueError, match="part"):
                beside([partial(part, k) for k in range(2)])
            return 0
        seen = set()

        def named(k):
            seen.add(threading.get_ident())
            time.sleep(0.005)

        beside([partial(named, k) for k in range(2)])
        return len(seen)

    assert list(in_order(work, range(3), [ROOM] * 3, 2)) == [0, 2, 2]


@pytest.mark.parametrize("how", ["knots | ties", "iso_c", "tsv", "cart"])
def test_the_number_of_threads_does_not_change_a_byte(how, monkeypatch):
    """Large matrices are worked on in two parts where a thread is idle: here they count as large from 8 on."""
    monkeypatch.setattr(spectrum, "WIDE", 8)
    monkeypatch.setattr(spectrum, "BAND", 16)
    monkeypatch.setattr(parallel, "ROOM", 1)  # each alone
    rng = torch.Generator().manual_seed(0)
    base = {f"layer{k}": torch.randn(96, 70 + k, generator=rng) for k in range(3)}
    experts = {n: {k: w + 0.1 * torch.randn(w.shape, generator=rng) for k, w in base.items()} for n in "abc"}
    before, merged = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            merged.append(merge(base, experts, how))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], merged[0][name]) for one in merged for name in base)
