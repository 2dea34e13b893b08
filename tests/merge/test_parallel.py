"""Tensors side by side: results in order, never more in flight than there is room for, the first error by order."""

import threading
import time

import pytest

from merganser.parallel import ROOM, in_order

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
