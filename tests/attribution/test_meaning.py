"""What a score means: bound, percentile, tier, copies, and which timesteps made the order."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attribution.made_stores import drawn, made, preset

from dmin.attribution import (
    Blend,
    Certified,
    DMin,
    FeatureSet,
    GradCos,
    GradDot,
    Popularity,
    Random,
    SharpEnergy,
    confidence,
    load_ranking,
    load_rankings,
    merged,
    retrieve,
    retrieve_part,
    save_ranking,
    score_matrix,
)
from dmin.attribution.confidence import (
    noise_deviations,
    sketch_deviations,
    tiers_of,
    widened,
    with_confidence,
)
from dmin.attribution.copies import namesakes, with_copies
from dmin.attribution.search.contenders import best_of_all
from dmin.attribution.search.index import Found, Index
from dmin.attribution.search.selection import Selection
from dmin.attribution.wording import (
    spell_against,
    spell_blind,
    spell_copies,
    spell_percentile,
    spell_same_as,
    spell_scale,
    spell_tiers,
)
from dmin.data.base import Example, Examples
from dmin.queries import Planted
from dmin.runtime.errors import DminError
from dmin.workers.shard import Shard

N = 90


@pytest.fixture(autouse=True)
def every_bar(monkeypatch):
    """Show bars of stores that name no sketch."""
    monkeypatch.setattr(confidence, "bars_of", lambda *_: {"sketch", "total"})


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    place = tmp_path_factory.mktemp("meaning")
    rows = drawn(N // 3, dim=32)
    rows = np.concatenate([rows, rows, rows[::-1]])  # every score three times
    metadata = [{"label": row % 3} for row in range(N)]
    asked = rows[:4] + 0.5 * drawn(4, dim=32, seed=5)
    return FeatureSet(made(place / "q", asked)), FeatureSet(
        made(place / "t", rows, metadata=metadata)
    )


def share_below(sides, method, found, keep=slice(None)):
    """Sort all scores there are and count those that are worse than each one found."""
    all_ = score_matrix(*sides, method)[:, keep].astype(np.float64)
    sign = 1 if found.order == "proponents" else -1
    worse = (sign * all_[:, None] < sign * found.scores[:, :, None] - 1e-6).mean(2)
    return 100 * worse


def ties(sides, method, found):
    """Return the percents of all scores that equal each one found but for rounding."""
    all_ = score_matrix(*sides, method).astype(np.float64)
    near = 1e-5 * np.abs(all_).max()
    return 100 * (np.abs(all_[:, None] - found.scores[:, :, None]) <= near).mean(2)


def percentiles(found):
    return np.array(
        [[found.percentile(q, r) for r in range(found.scores.shape[1])] for q in range(4)]
    )


@pytest.mark.parametrize("k", [1, 4, 7, N])
@pytest.mark.parametrize("order", ["proponents", "opponents"])
@pytest.mark.parametrize("rows", [None, 5])
def test_percentiles_are_those_of_a_full_sort(sides, k, order, rows):
    for method in (DMin(), preset("spectral_energy")):
        found = retrieve(*sides, method, k, rows, Selection(order=order))
        assert found.candidates == N and found.sample is None
        apart = np.abs(percentiles(found) - share_below(sides, method, found))
        # Copies in other places of a block may differ in the last digit, of sums that no inner
        # product is: each may count or not.
        exact = isinstance(method, DMin)
        assert (apart <= (1e-9 if exact else ties(sides, method, found) + 1e-9)).all()


def test_percentiles_count_what_where_allows_what_an_index_proves_and_what_parts_found(sides):
    keep = np.arange(N) % 3 == 1
    found = retrieve(*sides, k=4, selection=Selection(where={"label": 1}))
    assert found.candidates == keep.sum()
    assert percentiles(found) == pytest.approx(share_below(sides, DMin(), found, keep), abs=1e-9)
    plain = retrieve(*sides, k=4)
    certified = retrieve(*sides, k=4, index=Certified(8))
    parts = [retrieve_part(*sides, Shard(i, 4).range(N), k=4) for i in range(4)]
    for other in (certified, merged(parts, 4)):
        assert np.array_equal(other.at_least, plain.at_least) and other.candidates == N


def test_groups_are_counted_among_groups(sides):
    found = retrieve(*sides, k=2, selection=Selection(group_by="label"))
    assert found.candidates == 3 and found.at_least.tolist() == [[1, 2]] * 4
    assert found.maximum is None  # a sum over examples has no bound that says anything


class Blindfold(Index):
    """Looks at the first rows, and knows of no others."""

    def search(self, linear, store, k, sign=1, keep=None):
        scores, rows, _ = best_of_all(linear, store, k, np.arange(len(store)) < 2 * k)
        return Found(scores, rows, np.full(len(rows), k))

    def note(self):
        return ""


def test_an_index_that_cannot_count_has_a_sample_which_is_said(tmp_path):
    rows = drawn(400, dim=32)
    train = FeatureSet(made(tmp_path / "t", rows, block_size=50))
    asked = FeatureSet(made(tmp_path / "q", rows[:3] + drawn(3, dim=32, seed=5)))
    found = retrieve(asked, train, k=9, index=Blindfold())
    scores = score_matrix(asked, train, DMin())
    true = 100 * (scores[:, None] < found.scores[:, :, None]).mean(2)
    assert found.sample == 128
    assert (
        np.abs(
            np.array([[found.percentile(q, r) for r in range(9)] for q in range(3)]) - true
        ).max()
        < 12
    )
    assert "by a sample of 128" in spell_percentile(found, 0, 0)
    assert found.typical == pytest.approx(np.median(scores, axis=1), abs=0.1)


def test_the_usual_score_is_the_median(sides):
    for order in ("proponents", "opponents"):
        found = retrieve(*sides, k=4, selection=Selection(order=order))
        assert found.typical == pytest.approx(np.median(score_matrix(*sides, DMin()), axis=1))


METHODS = {
    "dmin": lambda: DMin(),
    "weighted": lambda: DMin([1, 0.5, -2]),
    "grad_cos": GradCos,
    "spectral": lambda: preset("spectral"),
    "z_sum": lambda: preset("z_sum"),
    "sharp": lambda: SharpEnergy(length_weight=0.7),
    "blend": lambda: Blend(SharpEnergy(), DMin()),
    "popularity": Popularity,
    "random": Random,
}


@pytest.mark.parametrize("name", METHODS)
def test_no_score_is_beyond_the_maximum(sides, name):
    for order in ("proponents", "opponents"):
        found = retrieve(*sides, METHODS[name](), 4, None, Selection(order=order))
        if found.maximum is None:
            assert name in ("sharp", "blend")
            continue
        sign = 1 if order == "proponents" else -1
        assert (sign * found.scores <= sign * found.maximum[:, None] + 1e-4).all()


def test_the_maximum_of_cosines_is_the_sum_of_the_weights_and_a_copy_reaches_it(sides):
    train = sides[1]
    for method, most in ((DMin(), 3), (DMin([1, 0.5, 2]), 3.5), (GradCos(), 1)):
        found = retrieve(train, train, method, 1)
        assert found.maximum == pytest.approx(most, rel=1e-5)
        assert found.scores[:, 0] == pytest.approx(most, rel=1e-5)
    assert retrieve(*sides, GradDot(), 1).maximum is None
    assert spell_scale(retrieve(train, train, k=1), 0, 0) == "3.000 of 3"


@pytest.mark.parametrize("draws", [1, 3])
def test_tiers_are_what_comparing_all_pairs_says(tmp_path, draws):
    rows = drawn(40, draws=draws, dim=64, seed=8)
    rows[1:5] = rows[0] + 0.3 * drawn(4, draws=draws, dim=64, seed=1)
    rows[5:9] = rows[0] + 0.9 * drawn(4, draws=draws, dim=64, seed=2)
    asked, train = (
        FeatureSet(made(tmp_path / "q", rows[:1])),
        FeatureSet(made(tmp_path / "t", rows)),
    )
    wide = retrieve(asked, train, k=24)
    found = with_confidence(wide, asked, train, DMin(), 12)
    scores = wide.scores[0].astype(np.float64)
    asked_for = asked, train, DMin(), 0, wide.train_rows[0]
    errors = [sketch_deviations(*asked_for)]
    errors += [noise_deviations(*asked_for, scores)] if draws > 1 else []
    errors = widened(errors)
    drawn_again = scores + np.random.default_rng(9).normal(size=(20_000, len(errors))) @ errors
    tiers, start, close = [0], 0, 0
    for j in range(1, 13):
        deviations = [
            abs(scores[i] - scores[j]) / max((drawn_again[:, i] - drawn_again[:, j]).std(), 1e-12)
            for i in range(start, j)
        ]
        close += any(1.8 < d < 2.1 for d in deviations)  # chance of the resamples decides
        tiers.append(tiers[-1] + (max(deviations) > 1.96))
        start = j if tiers[-1] > tiers[-2] else start
    assert close == 0 and len(set(tiers)) >= 3
    assert found.tiers[0].tolist() == tiers[:12]
    assert bool(found.tier_goes_on[0]) == (tiers[12] == tiers[11])


def test_tiers_have_every_extreme():
    noise = np.random.default_rng(0).normal(size=(500, 5)) / 500**0.5
    assert tiers_of(np.array([5.0, 4, 3, 2, 1]), 1e-3 * noise).tolist() == [0, 1, 2, 3, 4]
    assert tiers_of(np.array([5.0, 4, 3, 2, 1]), 1e3 * noise).tolist() == [0] * 5
    shared = 1e3 * noise[:, :1] + 1e-3 * noise  # an error that all have alike is none
    assert tiers_of(np.array([5.0, 4, 3, 2, 1]), shared).tolist() == [0, 1, 2, 3, 4]
    copies = np.ones((10, 3))
    assert tiers_of(np.ones(3), copies).tolist() == [0, 0, 0]
    assert tiers_of(np.ones(1), noise[:, :1]).tolist() == [0]


def test_centred_contributions_sum_to_zero_and_shares_to_one(sides):
    found = retrieve(*sides, k=12)
    assert np.abs(found.centred.sum(1)).max() < 1e-6
    of_score = found.scores - found.scores.mean(1, keepdims=True)
    assert found.centred.sum(2) == pytest.approx(of_score, abs=1e-5)
    assert found.order_shares.sum(1) == pytest.approx(1, abs=1e-5)
    # One timestep that says the same of all decides nothing, however much it adds.
    parts = np.stack([np.full(12, 9.0), np.linspace(1, 0, 12), np.zeros(12)], axis=-1)[None]
    invented = replace(
        found.first(12),
        **{
            name: getattr(found, name)[:1] for name in ("query_ids", "query_metadata", "train_rows")
        },
        **{name: getattr(found, name)[:1] for name in ("train_ids", "train_metadata", "at_least")},
        scores=parts.sum(2),
        contributions=parts,
        maximum=None,
        typical=None,
    )
    assert invented.order_shares[0] == pytest.approx([0, 1, 0], abs=1e-6)
    assert spell_against(invented, invented.order_shares[0]) is None
    opposed = spell_against(invented, np.array([-0.27, 1.26, 0.01]))
    assert opposed == f"t = {invented.timesteps[0]:g} (−27 %)"
    least = float(invented.scores[0, 5])
    cut = replace(invented, min_score=least)
    assert cut.count(0) == 6 and np.abs(cut.centred[0, :6].sum(0)).max() < 1e-6


def images(count=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 5, 5), generator=generator).float() / 255
    return Examples([Example(f"i{n}", image, n % 3) for n, image in enumerate(pixels)])


def planted(copies=3):
    """Return exact copies as queries, and training images that all stand there several times."""
    once = images()
    train = [Example(f"{e.id}-{c}", e.image, e.label) for c in range(copies) for e in once]
    return Planted("exact", 4, seed=1).plant(once), Examples(train)


def test_planted_copies_are_one_card_and_ranks_stay_true(tmp_path):
    queries, train = planted()
    rows = drawn(30, dim=32)
    asked = rows[[int(e.metadata["source_id"][1:]) for e in queries]]
    sides = (
        FeatureSet(made(tmp_path / "q", asked), queries),
        FeatureSet(made(tmp_path / "t", np.tile(rows, (3, 1, 1, 1, 1))), train),
    )
    for method in (DMin(), None):
        wide = retrieve(*sides, method, 12)
        pictures = {f"t-{n}": e.image.numpy() for n, e in enumerate(train)}
        asked_for = {f"q-{n}": e.image.numpy() for n, e in enumerate(queries)}
        for k in (5, 2):
            found = with_copies(wide.first(k), asked_for.get, pictures.get, wide)
            assert found.train_ids == [ids[:k] for ids in wide.train_ids]
            for query in range(4):
                source = int(queries[query].metadata["source_id"][1:])
                alike = {f"t-{source + 30 * copy}" for copy in range(3)}
                first = found.train_ids[query][0]
                assert {first, *found.copies(query, 0)} == alike == set(found.same_as[query])
                assert found.cards(query) == ([0, 3] if k == 5 else [0])
                assert spell_copies(found, query, 0) == "× 3"
                assert "itself a training image" in spell_same_as(found, query)


def test_a_copy_is_one_of_pixels_not_of_names_or_scores(tmp_path):
    rows = drawn(4, dim=16)
    rows[1] = rows[0]  # another picture of the same gradient
    sides = [FeatureSet(made(tmp_path / name, rows)) for name in ("t", "q")]
    found = retrieve(*reversed(sides), k=4)
    pictures = {f"t-{n}": np.full((1, 2, 2), n / 4) for n in range(4)}
    asked = {f"q-{n}": np.full((1, 2, 2), 0.9) for n in range(4)}
    asked["q-3"] = np.full((1, 4, 1), 0.75)  # the pixels of t-3 in another shape
    known = with_copies(found, asked.get, pictures.get)
    assert [known.cards(query) for query in range(4)] == [[0, 1, 2, 3]] * 4
    assert known.same_as == [[]] * 4 and spell_same_as(known, 0) is None
    renamed = replace(found.first(1), query_ids=["t-3", "b", "c", "d"])
    asked = {"t-3": pictures["t-3"], **dict.fromkeys("bcd", pictures["t-0"] + 0.1)}
    maybe = {"t-3": ["t-2", "t-3"]}
    assert with_copies(renamed, asked.get, pictures.get, maybe=maybe).same_as[0] == ["t-3"]


def test_training_images_that_may_be_a_query_have_its_name_or_its_file(tmp_path):
    theirs = {"t-0": "a", "t-1": "b", "t-2": "a", "gone": "a"}
    t, q = (FeatureSet(made(tmp_path / n, drawn(3, dim=16))) for n in ("t", "q"))
    t.dataset, q.dataset = (
        SimpleNamespace(file_digests=lambda found=found: found)
        for found in (theirs, {"q-0": "a", "q-1": "c"})
    )
    assert namesakes(q, t) == {"q-0": ["t-0", "t-2"], "q-1": [], "q-2": []}
    assert namesakes(t, FeatureSet(t.store))["t-1"] == ["t-1"]


def full(sides, tmp_path):
    wide = retrieve(*sides, k=12)
    found = with_confidence(wide, *sides, DMin(), 6)
    shades = {id: np.full((1, 2, 2), int(id[2:]) % 30 / 30) for row in wide.train_ids for id in row}
    asked = dict.fromkeys(found.query_ids, np.zeros((1, 2, 2)))
    found = with_copies(found, asked.get, shades.get, wide)
    about = {"model": "my/model", "weights": "raw", "date": "2026-12-01 10:00 UTC"}
    return replace(found, about=about, blind=(900.0,), notes={"rank of first": "8", "b": "x"})


def every_key(content):
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from every_key(value)
    elif isinstance(content, list):
        for value in content:
            yield from every_key(value)


def test_the_file_gives_all_of_it_back_and_has_no_key_with_a_space(sides, tmp_path):
    found = full(sides, tmp_path)
    save_ranking(found, tmp_path)
    again = load_ranking(tmp_path)
    for name, value in vars(found).items():
        other = getattr(again, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other), name
        else:
            assert value == other, name
    content = json.loads((tmp_path / "ranking.json").read_text())
    assert (content["format"], content["version"]) == ("dmin-ranking", 3)
    assert not [key for key in every_key(content) if " " in key]
    assert b"\r" not in (tmp_path / "ranking.csv").read_bytes()


def test_several_methods_are_one_file(sides, tmp_path):
    found = [retrieve(*sides, method, 3) for method in (DMin(), Random())]
    save_ranking(found, tmp_path)
    assert [each.method for each in load_rankings(tmp_path)] == ["dmin", "random"]
    with pytest.raises(DminError, match=r"dmin, random.*load_rankings"):
        load_ranking(tmp_path)
    lines = (tmp_path / "ranking.csv").read_text().splitlines()
    assert lines[0].startswith("method,query,rank,id") and len(lines) == 1 + 2 * 4 * 3


OLD = """{"schema": 1, "method": "dmin", "order": "proponents", "min_score": null, "group_by": null,
"notes": {"rank of sharp energy": "8"}, "timesteps": [900.0, 100.0], "groups": [], "queries": [
{"id": "q", "metadata": {"label": 3}, "examples": [{"id": "a", "row": 4, "score": 1.5, "error": 0.1,
"stability": 0.9, "metadata": {}, "contributions": [1.0, 0.5]}]}]}"""


def test_a_file_of_the_first_version_is_read(tmp_path):
    (tmp_path / "ranking.json").write_text(OLD)
    (found,) = load_rankings(tmp_path)
    assert found.scores.tolist() == [[1.5]] and found.notes == {"rank of sharp energy": "8"}
    assert found.errors is found.stability is None  # bars of before version 3 did not hold
    assert found.maximum is None and found.tiers is None
    assert spell_scale(found, 0, 0) == "1.500" and spell_percentile(found, 0, 0) is None
    assert spell_tiers(found, 0) == [] and spell_blind(found) is None


def test_the_words(sides, tmp_path):
    found = full(sides, tmp_path)
    assert spell_percentile(found, 0, 0) == "above 96 % of 90"  # three copies of 90
    assert "t = 900" in spell_blind(found) and "1 of 3 timesteps is blind" in spell_blind(found)
    told = replace(found, tiers=np.tile([0, 0, 1, 2, 2, 2], (4, 1)), tier_goes_on=[True] * 4)
    assert spell_tiers(told, 0) == [
        "1 to 2 cannot be distinguished",
        "3 stands alone",
        "4 to 6 and what follows cannot be distinguished",
    ]
    large = replace(found, candidates=100_000, at_least=np.ones((4, 6)))
    assert spell_percentile(large, 0, 0) == "above 99.999 % of 100,000"
