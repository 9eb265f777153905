"""What earlier code computed, kept in golden/data: later code opens it, agrees, and goes on."""

import functools
import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
from golden import definitions
from golden.definitions import GOLDENS, STORES

TOLERANCE = 1e-3
# Of rows, as a share of their length; of quantised ones a step is larger.
ROUNDING = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}


@functools.cache
def expected(name):
    return json.loads((STORES / name / "expected.json").read_text())


@functools.cache
def collector(name):
    """The collector of today's code; where the network's makers changed theirs, it is no golden."""
    for package in ("diffusers", "transformers"):
        made = expected(name)["versions"][package]
        if GOLDENS[name].model not in ("mlp", "ddpm") and version(package) != made:
            pytest.skip(f"made with {package} {made}, whose weights may have other names")
    return definitions.collector(GOLDENS[name])


@pytest.fixture
def place(request, tmp_path):
    """A copy of a golden pair: opening a store leaves something in it."""
    return shutil.copytree(STORES / request.getfixturevalue("name"), tmp_path / "golden")


every = pytest.mark.parametrize("name", GOLDENS)


def segments(place):
    return {file.name: file.read_bytes() for file in sorted(place.rglob("*.h5"))}


@every
def test_a_golden_store_opens_and_answers_as_it_did(name, place):
    train, queries = (definitions.verify(place / part) for part in ("train", "queries"))
    assert train.complete and queries.complete
    assert train.fingerprint == expected(name)["fingerprint"]
    found, then = definitions.answer(GOLDENS[name], train, queries), expected(name)
    for field in ("method", "query_ids", "timesteps", "groups"):
        assert found[field] == then[field], field
    for query, scores in enumerate(then["scores"]):
        np.testing.assert_allclose(found["scores"][query], scores, atol=TOLERANCE)
        # Those with the same score, near enough, may change places.
        ties = np.abs(np.diff(scores)) <= 2 * TOLERANCE
        apart = [not t for t in np.append(False, ties) | np.append(ties, False)]
        ids = np.array(found["train_ids"][query]), np.array(then["train_ids"][query])
        assert ids[0][apart].tolist() == ids[1][apart].tolist()
        assert sorted(ids[0]) == sorted(ids[1])
    shown = {row["number"]: row for row in then["train_metadata"]}
    assert {row["number"]: row for row in found["train_metadata"]} == shown


@every
def test_nothing_of_a_golden_store_is_collected_again(name, place, monkeypatch):
    golden, by = GOLDENS[name], collector(name)

    def refused(*_, **__):
        raise AssertionError("a finished store was worked on")

    monkeypatch.setattr(by.model, "predict", refused)
    monkeypatch.setattr(by.model, "encode", refused)
    before = segments(place)
    train = definitions.collect(golden, by, place / "train")
    queries = definitions.collect_queries(golden, by, place / "queries")
    assert train.complete and queries.complete
    assert segments(place) == before


@every
def test_a_fresh_collection_has_the_golden_rows(name, place, tmp_path):
    golden, by = GOLDENS[name], collector(name)
    fresh = (
        definitions.make(golden, by, tmp_path / "train"),
        definitions.collect_queries(golden, by, tmp_path / "queries"),
    )
    for now, part in zip(fresh, ("train", "queries"), strict=True):
        then = definitions.Store(place / part)
        assert now.ids == then.ids and now.metadata[:] == then.metadata[:]
        assert now.fingerprint == then.fingerprint
        np.testing.assert_allclose(now.losses(), then.losses(), rtol=TOLERANCE)
        for readout in then.layout.readouts:
            rows, other = now.features(readout), then.features(readout)
            assert rows.shape == other.shape
            apart = np.linalg.norm(
                (rows - other).reshape(-1, rows.shape[-1] * rows.shape[-2]), axis=1
            )
            assert apart.max() <= ROUNDING[then.layout.dtype]
            np.testing.assert_allclose(now.norms(readout), then.norms(readout), rtol=TOLERANCE)
