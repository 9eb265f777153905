"""Parts of a dataset keep the ids and the order of the whole."""

import pytest

from dmin.data import Examples, Subset, describe_dataset
from dmin.data.shapes import Shapes
from dmin.runtime.errors import DminError

WHOLE = Shapes(examples=40, size=8)


def ids(dataset):
    return [dataset[index].id for index in range(len(dataset))]


def test_named_examples_come_in_the_order_of_the_whole():
    wanted = [WHOLE.ids[n] for n in (7, 2, 30)]
    assert ids(Subset(WHOLE, wanted)) == [WHOLE.ids[n] for n in (2, 7, 30)]


@pytest.mark.parametrize("asked", [{"count": 10}, {"fraction": 0.25}])
def test_a_draw_is_keyed_by_its_seed_and_grows(asked):
    drawn = ids(Subset(WHOLE, **asked))
    assert len(set(drawn)) == 10 and drawn == sorted(drawn)
    assert drawn == ids(Subset(WHOLE, **asked)) == Subset(WHOLE, **asked).ids
    assert drawn != ids(Subset(WHOLE, **asked, seed=1))
    assert set(drawn) < set(ids(Subset(WHOLE, count=11)))


def test_all_of_it_and_hardly_any():
    assert ids(Subset(WHOLE, fraction=1)) == WHOLE.ids
    assert len(Subset(WHOLE, fraction=1e-9)) == 1


def test_a_dataset_without_a_list_of_ids_is_read_for_them():
    plain = Examples([WHOLE[n] for n in range(5)])
    assert ids(Subset(plain, WHOLE.ids[3:5])) == WHOLE.ids[3:5] == Subset(plain, WHOLE.ids[3:5]).ids


def test_the_description_tells_the_whole_and_the_part():
    other = Shapes(examples=40, size=8, seed=1)
    parts = [Subset(WHOLE, count=5), Subset(WHOLE, count=5, seed=1), Subset(other, count=5)]
    described = [describe_dataset(part) for part in parts]
    assert described[0] != described[1] and described[0] != described[2]
    assert described[0] == describe_dataset(Subset(WHOLE, Subset(WHOLE, count=5).ids))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give exactly one of ids, count and fraction"),
        ({"count": 1, "fraction": 0.5}, "give exactly one"),
        ({"count": 41}, "count=41, but the dataset has 40"),
        ({"count": 0}, "count=0"),
        ({"fraction": 0.0}, "fraction=0"),
        ({"fraction": 1.1}, "fraction=1.1"),
        ({"ids": ["x", WHOLE.ids[0]]}, "1 of 2 ids are not in the dataset, such as 'x'"),
        ({"ids": []}, "one or more"),
        ({"ids": [WHOLE.ids[0]] * 2}, "each once"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(asked, message):
    with pytest.raises(DminError, match=message):
        Subset(WHOLE, **asked)
