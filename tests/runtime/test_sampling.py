"""Samples that are evenly spaced."""

from itertools import pairwise

import pytest

from dmin.runtime.sampling import evenly


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 3), (100, 100), (5, None), (3, 9)])
@pytest.mark.parametrize("ends", [False, True])
def test_places_ascend_with_steps_that_differ_by_one_at_most(total, count, ends):
    found = evenly(total, count, ends)
    assert len(found) == min(total, count or total) and found[0] == 0
    steps = {b - a for a, b in pairwise(found)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)
    if ends and len(found) > 1:
        assert found[-1] == total - 1
