"""What earlier code computed, kept in golden/data: later code opens it, agrees, and goes on."""

import functools
import json
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import yaml
from golden import definitions, settings
from golden.definitions import GOLDENS, STORES
from hydra.utils import get_object

from dmin.cli.config.renamed import CHECKS
from dmin.collect.described import refresh_metadata
from dmin.data import Examples
from dmin.runtime.errors import DminError

KNOWN = json.loads(settings.SETTINGS.read_text())
TOLERANCE = 1e-3
# Of rows, as a share of their length; of quantised ones a step is larger.
ROUNDING = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}

# By the processor's arithmetic: another's kernels round otherwise, and only rows are compared.
KNOWN_DIGESTS = json.loads(definitions.BITS.read_text())


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


@pytest.mark.parametrize("name", ["mlp", "removed", "grown", "stable_diffusion_xl"])
def test_a_golden_store_takes_over_metadata_that_changed(name, place):
    golden, by, path = GOLDENS[name], collector(name), place / "train"
    examples = definitions.train_examples(golden).examples
    now = Examples([replace(e, metadata={"artist": f"of {e.id}"}) for e in examples])
    before, digest = segments(path), definitions.Store(path).digest()
    with pytest.raises(DminError, match=r"covers all metadata: .*`dmin store metadata .*/train FO"):
        definitions.collect(golden, by, path, data=now)
    for change in ({"image": 1 - examples[1].image}, {"label": 99}, {"caption": "another"}):
        other = [replace(e, **change) if e is now.examples[1] else e for e in now.examples]
        with pytest.raises(DminError, match=r"collected from other data: content: "):
            refresh_metadata(path, Examples(other))
    refresh_metadata(path, now)
    found = definitions.collect(golden, by, path, data=now)
    assert found.complete and found.digest() == digest and segments(path) == before
    shown = {id: row["artist"] for id, row in zip(found.ids, found.metadata, strict=True)}
    assert shown == {id: f"of {id}" for id in found.ids}
    assert "number" not in found.metadata[0] and found.metadata[0]["label"] == examples[0].label


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
        assert now.manifest.feature_fingerprint == then.manifest.feature_fingerprint
        assert now.manifest.num_blocks == then.manifest.num_blocks
        if digests := KNOWN_DIGESTS.get(definitions.arithmetic()):
            assert now.digest() == digests[name][part]
        np.testing.assert_allclose(now.losses(), then.losses(), rtol=TOLERANCE)
        for readout in then.layout.readouts:
            rows, other = now.features(readout), then.features(readout)
            assert rows.shape == other.shape
            apart = np.linalg.norm(
                (rows - other).reshape(-1, rows.shape[-1] * rows.shape[-2]), axis=1
            )
            assert apart.max() <= ROUNDING[then.layout.dtype]
            np.testing.assert_allclose(now.norms(readout), then.norms(readout), rtol=TOLERANCE)


@pytest.mark.parametrize("target", KNOWN["targets"])
def test_a_target_of_then_is_found(target):
    try:
        assert callable(get_object(settings.current(target)[0]))
    except ImportError:
        if target.startswith("dmin."):
            raise
        pytest.skip("not installed")


# Settings of 0.1.0, by their dotted names, that are another today (None: gone), and why.
EXPLAINED: dict[str, str | None] = {
    f"{place}queries.journey": f"{place}queries.trajectory"
    for place in ("", "benchmark.tasks.generated_digits.", "benchmark.tasks.generated.")
} | {
    f"method.{place}{old}": f"method.{place}{new}"
    for place in ("", "first.", "second.")
    for old, new in (("sharpness", "exponent"), ("lengths", "length_weight"))
}
# Settings that came since.
ADDED: set[str] = {
    *("model.weighting", "model.noise_offset", "model.input_perturbation", "model.loss_type"),
    *("model.huber_c", "model.huber_schedule", "model.shift"),
    *(
        "model.sample_size",
        "model.variance_loss",
        *("queries.prompt", "queries.region", "queries.mask"),
        *("queries.pool", "queries.against"),
        "collect.limit",
        "collect.repeats",
        *("retrieve.beside", "retrieve.places", "retrieve.timesteps"),
    ),
    *("collect.restore", "extras.quiet", "model.text_encoders"),
    *("losses.k", "losses.held_out", "model.query_without"),
    *("model.base_dtype", "model.embeddings"),
    *("serve.host", "serve.port", "serve.queue", "serve.upload_mb"),
    "data.layout",
    *("data.condition_image", "queries.condition_image"),
    *("data.bucket_shapes", "data.upscale", "queries.bucket_shapes", "queries.upscale"),
    *("data.bucket_ratio", "queries.bucket_ratio", "data.draws"),
}
# Settings whose value is another today, by their old one: the new one.
CHANGED: dict[tuple[str, str], object] = {
    # As the column of the data, if the queries have that.
    ("queries.label", "label"): ["${oc.select:data.label,label}", "label"],
    ("queries.text", "text"): ["${oc.select:data.text,text}", "text"],
    # A folder as before, or pictures by their files; the same pictures have the same fingerprint.
    ("queries._target_", "dmin.data.image_folder.ImageFolder"): "dmin.data.pictures.Pictures",
}


@pytest.mark.parametrize("asked", settings.ASKED)
@pytest.mark.parametrize("command", settings.COMPOSED)
def test_a_command_composes_to_the_settings_of_then(command, asked, tmp_path):
    # The default method of `outliers` was one that it refused.
    method = ["method=dmin"] if command == "outliers" else []
    printed = settings.shown(command, [*settings.ASKED[asked], *method], tmp_path)
    now = settings.flat(yaml.safe_load(printed))
    then = settings.flat(yaml.safe_load((settings.CFG / f"{command}.{asked}.yaml").read_text()))
    expected = {}
    for name, value in then.items():
        name = EXPLAINED.get(name, name)
        spared = {"sample": "data", "evaluate": "queries"}.get(command)  # nothing points to it
        if name is not None and settings.reads(command, name) and name.split(".")[0] != spared:
            value = settings.current(value)[0] if name.endswith("_target_") else value
            expected[name] = CHANGED.get((name, value), value) if isinstance(value, str) else value
    assert {name: value for name, value in now.items() if name not in ADDED} == expected


@pytest.mark.slow
@pytest.mark.parametrize("choice", KNOWN["choices"])
def test_a_choice_has_the_settings_of_then(choice):
    group, _, name = choice.rpartition("/")
    now = set(settings.composed(group, name))
    then = {EXPLAINED.get(key, key) for key in KNOWN["choices"][choice]} - {None}
    assert not then - now


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A folder in which training and collecting were repeated, which the other runs start from."""
    place = tmp_path_factory.mktemp("repeated")
    shutil.copytree(settings.RECORDS, place / "then")
    return place, {name: again(name, place) for name in ("train", "collect")}


def again(name, place):
    """Repeat a run; return its new record and what was said."""
    status, printed = settings.dmin("repeat", f"then/{name}", place=place)
    assert status == 0, printed
    (file,) = place.glob(f"outputs/runs/{name}/*/record.json")
    return json.loads(file.read_text()), printed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("train", "collect") else [pytest.mark.slow])
        for name in settings.RUNS
    ],
)
def test_a_run_of_then_is_repeated(name, repeated):
    place, done = repeated
    now, printed = done[name] if name in done else again(name, place)
    then = json.loads((settings.RECORDS / name / "record.json").read_text())
    assert "differs from the record:" in printed and "results:" in printed
    assert now["outcome"] == then["outcome"] == "finished" and now["seed"] == then["seed"]
    # Where a process had more memory before, a collection has no peak to tell.
    assert {*now["results"], "peak"} == {*then["results"], "peak"}
    if name == "doctor":  # a check that has another name today is the same check
        assert "distinguish" not in printed.partition("results:")[2]
        checks = then["results"]["checks"]
        then["results"]["checks"] = {CHECKS.get(key, key): value for key, value in checks.items()}
    # What is the same on any CPU.
    for key in ("rows", "raw_bytes", "queries", "checks"):
        assert now["results"].get(key) == then["results"].get(key), key
