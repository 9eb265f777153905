import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dmin.attribution.ranking import Ranking, format_score
from dmin.attribution.ranking_files import records, save_ranking
from dmin.attribution.ranking_json import load_ranking
from dmin.attribution.ranking_table import ranking_table
from dmin.runtime.errors import DminError

QUERIES, K, STEPS = 3, 4, 5


def ranking(**changes: Any) -> Ranking:
    generator = np.random.default_rng(0)
    contributions = generator.normal(size=(QUERIES, K, STEPS)).astype(np.float32)
    order = np.argsort(-contributions.sum(axis=2), axis=1)
    contributions = np.take_along_axis(contributions, order[:, :, None], axis=1)
    rows = generator.permutation(100)[: QUERIES * K].reshape(QUERIES, K)
    parts: dict[str, Any] = {
        "method": "dmin",
        "timesteps": (950, 700, 450, 200, 50),
        "query_ids": ["q-0", "q-1", "q-2"],
        "query_metadata": [{"label": i, "seed": 10 + i} for i in range(QUERIES)],
        "train_rows": rows,
        "train_ids": [[f"train/{row}" for row in line] for line in rows],
        "train_metadata": [[{"label": int(row) % 3} for row in line] for line in rows],
        "scores": contributions.sum(axis=2),
        "contributions": contributions,
    }
    return Ranking(**(parts | changes))


def assert_same(one: Ranking, other: Ranking) -> None:
    for name in ("method", "timesteps", "query_ids", "query_metadata"):
        assert getattr(one, name) == getattr(other, name)
    assert one.train_ids == other.train_ids
    assert one.train_metadata == other.train_metadata
    for name in ("train_rows", "scores", "contributions"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("parted", [True, False])
def test_json_gives_back_every_bit(tmp_path, parted):
    saved = ranking() if parted else ranking(contributions=None)
    folder = save_ranking(saved, tmp_path / "new" / "folder")
    assert_same(saved, load_ranking(folder))
    assert_same(saved, load_ranking(folder / "ranking.json"))


def test_csv_holds_one_line_for_each_query_and_rank(tmp_path):
    saved = ranking()
    save_ranking(saved, tmp_path)
    with (tmp_path / "ranking.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == QUERIES * K
    assert list(lines[0])[:6] == ["query", "rank", "id", "row", "score", "label"]
    assert saved.contributions is not None
    for line, (query, rank) in zip(lines, np.ndindex(QUERIES, K), strict=True):
        assert line["query"] == saved.query_ids[query]
        assert int(line["rank"]) == rank + 1
        assert line["id"] == saved.train_ids[query][rank]
        assert int(line["row"]) == saved.train_rows[query, rank]
        assert np.float32(line["score"]) == saved.scores[query, rank]
        assert int(line["label"]) == saved.train_metadata[query][rank]["label"]
        assert int(line["query_seed"]) == 10 + query
        parts = [np.float32(line[name]) for name in ("t0950", "t0700", "t0450", "t0200", "t0050")]
        np.testing.assert_array_equal(parts, saved.contributions[query, rank])
        assert sum(parts) == pytest.approx(float(line["score"]), abs=1e-5)


def test_csv_survives_captions_with_commas_quotes_and_lines(tmp_path):
    caption = 'a "red", round\nball'
    metadata = [[{"caption": caption, "tags": ["a", "b"]}] * K] * QUERIES
    save_ranking(ranking(train_metadata=metadata), tmp_path)
    with (tmp_path / "ranking.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert line["caption"] == caption
    assert json.loads(line["tags"]) == ["a", "b"]


def test_metadata_never_hides_a_column():
    metadata = [[{"score": "mine", "t0950": "too", "query_label": "also"}] * K] * QUERIES
    saved = ranking(train_metadata=metadata)
    record = records(saved)[0]
    assert record["score"] == saved.scores[0, 0]
    assert record["query_label"] == 0
    assert record["metadata_score"] == "mine"
    assert record["metadata_t0950"] == "too"
    assert record["metadata_query_label"] == "also"


def test_records_are_tidy_where_metadata_differs():
    metadata: list[list[dict[str, Any]]] = [[{} for _ in range(K)] for _ in range(QUERIES)]
    metadata[2][1] = {"caption": "only here"}
    lines = records(ranking(train_metadata=metadata))
    assert all(list(line) == list(lines[0]) for line in lines)
    assert [line["caption"] for line in lines].count("only here") == 1


def test_numbers_read_as_a_person_would_write_them():
    record = records(ranking(scores=np.full((QUERIES, K), 0.9), contributions=None))[0]
    assert repr(record["score"]) == "0.9"


def test_numpy_metadata_becomes_json(tmp_path):
    metadata = [{"label": np.int64(7), "box": np.arange(2)}] * QUERIES
    save_ranking(ranking(query_metadata=metadata), tmp_path)
    assert load_ranking(tmp_path).query_metadata[0] == {"label": 7, "box": [0, 1]}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"scores": np.zeros(3)}, "scores"),
        ({"scores": np.zeros((QUERIES, 0))}, "scores"),
        ({"scores": -ranking().scores}, "descending"),
        ({"scores": np.full((QUERIES, K), np.nan), "contributions": None}, "finite"),
        ({"query_ids": ["a", "b"]}, "query_ids"),
        ({"query_ids": ["a", "b", "a"]}, "a different name for each query"),
        ({"query_metadata": []}, "query_metadata"),
        ({"train_rows": np.zeros((QUERIES, K + 1))}, "train_rows"),
        ({"train_ids": [["a"] * K, ["a"] * K, ["a"] * (K - 1)]}, "train_ids"),
        ({"train_metadata": [[{}] * K] * (QUERIES + 1)}, "train_metadata"),
        ({"timesteps": (1, 2)}, "contributions"),
        ({"timesteps": (950, 700, 450, 200, 950)}, "timestep once"),
        ({"contributions": 2 * ranking().contributions}, "sum to them"),
    ],
)
def test_parts_that_disagree_are_refused_by_name(changes, named):
    with pytest.raises(DminError, match=named):
        ranking(**changes)


def test_contributions_may_carry_the_rounding_of_half_precision():
    exact = ranking()
    assert exact.contributions is not None
    rounded = replace(exact, contributions=exact.contributions.astype(np.float16))
    assert rounded.contributions is not None and rounded.contributions.dtype == np.float32


def test_times_in_the_unit_interval_are_named_as_such():
    assert ranking(timesteps=(1.0, 0.75, 0.5, 0.25, 0.05)).timestep_names[1:3] == ["t0.75", "t0.5"]


def test_same_label_is_none_where_a_label_is_missing():
    some = ranking(train_metadata=[[{"label": "0"}, {"label": 1}, {}, {"label": None}]] * QUERIES)
    assert [some.same_label(0, rank) for rank in range(K)] == [True, False, None, None]


@pytest.mark.parametrize(
    "text",
    ["[", "{}", '{"schema": 1, "queries": []}', '{"schema": 99}', "[1]", '{"schema": 1}'],
)
def test_a_file_that_is_no_ranking_is_refused(tmp_path, text):
    (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(DminError, match=r"ranking\.json"):
        load_ranking(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DminError, match="No ranking"):
        load_ranking(tmp_path / "nothing")


def test_table_shows_ids_labels_and_scores_as_they_are():
    saved = ranking(query_ids=["[red]q[/red]", "q-1", "q-2"])
    console = Console(width=200, record=True, file=io.StringIO())
    table = ranking_table(saved, max_queries=2, columns=3)
    console.print(table)
    text = console.export_text()
    assert table.row_count == 2 and len(table.columns) == 4
    assert "[red]q[/red]" in text and "q-2" not in text
    for rank in range(3):
        assert saved.train_ids[1][rank] in text
        assert format_score(saved.scores[1, rank]) in text
    assert saved.train_ids[1][3] not in text


def test_table_shows_as_many_examples_as_their_ids_leave_room_for():
    ids = [[f"folder/image-{row:04d}.jpg" for row in range(K)]] * QUERIES
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table := ranking_table(ranking(train_ids=ids), width=80))
    text = console.export_text()
    assert len(table.columns) == 3 and ids[0][1] in text and ids[0][2] not in text


@pytest.mark.parametrize(
    "score, text",
    [(0.3456, "0.346"), (-0.5, "-0.500"), (0, "0.000"), (3.2e-7, "3.2e-07"), (12345, "1.2e+04")],
)
def test_scores_for_people(score, text):
    assert format_score(score) == text
