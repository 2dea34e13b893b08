"""The search for a scale: the highest of a curve with one peak, with fewer looks than scales."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.sweep import tried


@given(n=st.integers(1, 20), peak=st.floats(-2, 22), width=st.floats(0.5, 30))
def test_the_highest_of_one_peak_is_found(n, peak, width):
    scales = [0.1 * (k + 1) for k in range(n)]
    looked = []

    def on_val(by):
        looked.append(by)
        return 0.9 - abs(by / 0.1 - 1 - peak) / width

    points = tried(on_val, scales)
    best = max(points, key=lambda point: point["val"])
    assert best["val"] == max(on_val(by) for by in scales)
    assert [point["scale"] for point in points] == sorted({point["scale"] for point in points})
    assert len(points) <= max(5, -(-n // 2) + 2)


def test_past_the_peak_nothing_is_tried():
    looked = []

    def on_val(by):
        looked.append(by)
        return 1 - 0.1 * abs(by - 3)

    tried(on_val, list(range(1, 14)))
    assert sorted(looked) == [1, 2, 3, 4, 5, 7], "1, 3, 5, 7 and the neighbours of 3"
    assert looked.index(7) < looked.index(2)


@pytest.mark.parametrize("scales", [[], [0.5], [0.3, 0.1, 0.2]])
def test_few_scales_are_all_tried_in_order(scales):
    assert [p["scale"] for p in tried(lambda by: by, scales)] == sorted(scales)
    assert [p["scale"] for p in tried(lambda by: -by, list(range(9)), all_of_them=True)] == list(range(9))
