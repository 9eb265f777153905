"""Opponents, filters, groups and bounds against numpy."""

import csv
import io

import numpy as np
import pytest
import rich
from made_stores import cosines, drawn, made

from dmin.attribution import DMin, FeatureSet, GradDot, retrieve
from dmin.attribution.methods.popularity import PopularityCorrected
from dmin.attribution.ranking_files import records, save_ranking
from dmin.attribution.ranking_json import load_ranking
from dmin.attribution.ranking_table import ranking_table
from dmin.attribution.search.selection import Selection
from dmin.attribution.self_influence import outlier_scores, save_self_influence, self_influence
from dmin.runtime.errors import DminError

METADATA = [
    {"label": row % 3, "artist": ["ada", "bo", None, "cy"][row % 4], "held": row < 5}
    for row in range(50)
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    train = made(folder / "x", drawn(50), metadata=METADATA)
    return made(folder / "q", drawn(3, seed=1)), train


@pytest.fixture(scope="module")
def scores(stores):
    return cosines(*stores).sum(-1)


@pytest.mark.parametrize("rows", [3, None])
def test_opponents_are_the_end_of_the_sort(stores, scores, rows):
    found = retrieve(*stores, k=6, rows=rows, selection=Selection(order="opponents"))
    order = np.argsort(scores, axis=1, kind="stable")[:, :6]
    assert np.array_equal(found.train_rows, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), atol=2e-6)
    np.testing.assert_allclose(found.contributions.sum(-1), found.scores, atol=2e-6)


@pytest.mark.parametrize("rows", [3, None])
@pytest.mark.parametrize(
    "where, allowed",
    [
        ({"label": 1}, lambda m: m["label"] == 1),
        ({"label": "1"}, lambda m: m["label"] == 1),
        ({"label": [0, 2], "artist": "ada"}, lambda m: m["label"] != 1 and m["artist"] == "ada"),
        ({"held": True}, lambda m: m["held"]),
    ],
)
def test_filters(stores, scores, rows, where, allowed):
    found = retrieve(*stores, k=3, rows=rows, selection=Selection(where=where))
    kept = np.array([allowed(each) for each in METADATA])
    order = np.argsort(-np.where(kept, scores, -np.inf), axis=1, kind="stable")[:, :3]
    assert np.array_equal(found.train_rows, order)


@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
@pytest.mark.parametrize("order", ["proponents", "opponents"])
@pytest.mark.parametrize("where", [None, {"label": [0, 1]}])
def test_groups(stores, scores, rows, kind, order, where):
    chosen = Selection(order=order, where=where, group_by="artist", group_score=kind)
    found = retrieve(*stores, k=3, rows=rows, selection=chosen)
    sign = -1 if order == "opponents" else 1
    for query in range(3):
        expected = {}
        for name in ("ada", "bo", "cy"):
            members = [
                row
                for row, each in enumerate(METADATA)
                if each["artist"] == name and (where is None or each["label"] < 2)
            ]
            values = sign * scores[query, members]
            best = members[int(np.argmax(values))]
            expected[name] = sign * getattr(np, kind)(values), best
        ranked = sorted(expected, key=lambda name: -sign * expected[name][0])
        assert [each["artist"] for each in found.train_metadata[query]] == ranked
        np.testing.assert_allclose(
            found.scores[query], [expected[name][0] for name in ranked], atol=1e-5
        )
        assert found.train_rows[query].tolist() == [expected[name][1] for name in ranked]


def test_groups_say_what_they_are_in_every_form(stores, tmp_path):
    chosen = Selection(where={"label": [0, 1]}, group_by="artist")
    found = retrieve(*stores, k=2, selection=chosen)
    artists = [each["artist"] for each in METADATA if each["label"] < 2]
    sizes = [[artists.count(found.label(query, rank)) for rank in range(2)] for query in range(3)]
    assert found.group_sizes.tolist() == sizes and len(np.unique(sizes)) > 1
    record = records(load_ranking(save_ranking(found, tmp_path)))[0]
    assert (record["group"], record["examples"]) == (found.label(0, 0), sizes[0][0])
    rich.print(ranking_table(found), file=(text := io.StringIO()))
    assert "Which artist is behind each" in text.getvalue()
    assert f"{found.label(0, 0)} of {sizes[0][0]}" in text.getvalue()
    assert found.same_label(0, 0) is None  # its artist is shown, not its label
    assert "of each artist: the sum" in found.notes["score"]


def test_a_bound_leaves_each_query_its_own_number(stores, scores, tmp_path):
    bound = float(np.sort(scores.ravel())[-12])
    found = retrieve(*stores, k=20, selection=Selection(min_score=bound - 1e-4))
    counts = (scores >= bound - 1e-4).sum(1)
    assert [found.count(query) for query in range(3)] == counts.tolist()
    assert found.scores.shape[1] == counts.max()
    assert len(records(found)) == 12
    save_ranking(found, tmp_path)
    with (tmp_path / "ranking.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    assert load_ranking(tmp_path).count(0) == counts[0]


def test_a_bound_on_opponents_is_on_their_strength(stores, scores):
    chosen = Selection(order="opponents", min_score=0.3)
    found = retrieve(*stores, k=50, selection=chosen)
    counts = (scores <= -0.3).sum(1)
    assert [found.count(query) for query in range(3)] == counts.tolist()


def test_parquet_where_it_can_be(stores, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = retrieve(*stores, k=2)
    save_ranking(found, tmp_path)
    lines = parquet.read_table(tmp_path / "ranking.parquet").to_pylist()
    assert lines == records(found)


def test_self_influence(stores):
    found = self_influence(stores[1], DMin(keep_norms=True), rows=7)
    norms = stores[1].norms("loss")[..., 0].astype(np.float64)
    lengths = stores[1].lengths("loss").astype(np.float64)
    np.testing.assert_allclose(found, np.square(norms * lengths).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(self_influence(stores[1], DMin()), 3, rtol=1e-5)


def test_self_influence_is_written_with_the_largest_first(stores, tmp_path):
    store, scores = stores[1], self_influence(stores[1], DMin(keep_norms=True))
    order = save_self_influence(store, scores, tmp_path / "o.csv")
    assert order.tolist() == sorted(range(len(store)), key=lambda row: -scores[row])
    lines = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [line["id"] for line in lines] == [store.ids[row] for row in order]
    assert [line["label"] for line in lines] == [str(store.metadata[r]["label"]) for r in order]
    np.testing.assert_allclose([float(line["score"]) for line in lines], scores[order], rtol=1e-5)
    assert np.array_equal(outlier_scores(FeatureSet(store), DMin(keep_norms=True)), scores)
    with pytest.raises(DminError, match=r"method=dmin gives every example the same .*grad_dot"):
        outlier_scores(FeatureSet(store), DMin())


@pytest.mark.parametrize("base", [DMin(), GradDot()])
def test_popularity_is_the_mean_score_with_training_examples(stores, base):
    train = FeatureSet(stores[1])
    method = PopularityCorrected(base, references=10)
    found = retrieve(stores[0], train, method, k=50)
    whole = train.block(range(50), base.requires)
    asked = base.transform_query(FeatureSet(stores[0]).block(range(3), base.requires))
    places = np.linspace(0, 49, 10).round().astype(int)
    popular = base.score(base.transform_query(train.block(places, base.requires)), whole).mean(0)
    expected = (base.score(asked, whole) - popular).numpy()
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, order, 1), atol=1e-4)
    np.testing.assert_allclose(found.contributions.sum(-1), found.scores, atol=1e-4)
    slow = method.score(
        method.transform_query(FeatureSet(stores[0]).block(range(3), base.requires)), whole
    )
    np.testing.assert_allclose(slow, expected, atol=1e-4)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"order": "best"}, "proponents or opponents"),
        ({"group_score": "median"}, "sum or mean or max"),
    ],
)
def test_choices_are_named(chosen, message):
    with pytest.raises(DminError, match=message):
        Selection(**chosen)


@pytest.mark.parametrize(
    "chosen, k, message",
    [
        ({"where": {"style": 1}}, 1, "no metadata 'style': they have artist, held, label"),
        ({"where": {"label": 7}}, 1, r"label = 7; its values are 0, 1, 2\."),
        ({"where": {"label": 1}}, 18, r"k=18: choose 1 … 17.*that `where` allows"),
        ({"group_by": "artist"}, 4, "k=4: choose 1 … 3, the number of values of artist"),
        ({"min_score": 9.0}, 3, "leaves no example"),
    ],
)
def test_what_cannot_be_asked(stores, chosen, k, message):
    with pytest.raises(DminError, match=message):
        retrieve(*stores, k=k, selection=Selection(**chosen))


@pytest.mark.parametrize(
    "asked",
    [
        *({"k": k} for k in (0, -1, 2.0, "3", None, float("nan"))),
        *({"rows": rows} for rows in (-1, 2.5, "all")),
        *({"device": device} for device in ("nowhere", "meta", "cuda:99")),
    ],
    ids=str,
)
def test_what_is_no_number_and_no_device_is_refused_by_name(stores, asked):
    ((name, value),) = asked.items()
    with pytest.raises(DminError, match=f"^{name}='?{value}"):
        retrieve(*stores, **{"k": 1, **asked})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_score", ("x", float("nan"), float("inf"), [1])),
        ("group_by", (["artist"], "", 3)),
        ("where", ("label=3", ["label"])),
        ("order", ("best", None)),
        ("group_score", ("median", 1)),
    ],
)
def test_a_selection_of_another_type_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(DminError, match=f"^{name}"):
            Selection(**{name: value})
