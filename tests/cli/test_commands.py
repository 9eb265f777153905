"""The commands as a user gives them: in a shell, in an empty directory."""

import contextlib
import csv
import json

import numpy as np
import pytest
from command_line import dmin
from PIL import Image

from dmin.attribution import load_rankings
from dmin.cli import main
from dmin.store import Store


def refusal(*arguments, cwd):
    """The one paragraph with which a command ends, in this process: nothing was worked on."""
    with contextlib.chdir(cwd), pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    message = str(end.value)  # which Python prints, with status 1
    assert "\n" not in message
    return message


# The demo at its smallest: half of the digits, a tenth of its network.
NETWORK = "train.model.network.block_out_channels=[16,16]"
SMALLEST = ["experiment=digits", "debug=fast", "data.split=heldout", "extras.threads=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which the demo has run once, at its smallest."""
    place = tmp_path_factory.mktemp("place")
    place.joinpath("first.txt").write_text(dmin("demo", *SMALLEST[1:], NETWORK, cwd=place).stdout)
    return place


def records(place, command):
    return sorted((place / "outputs" / "runs" / command).glob("*/record.json"))


@pytest.mark.slow
class TestDemo:
    def test_it_leaves_model_stores_queries_and_pictures(self, place):
        assert (place / "outputs/models/debug/model_index.json").is_file()
        run = records(place, "demo")[0].parent
        for name in ("gallery.png", "gallery.html", "ranking.csv", "results.csv", "results.png"):
            assert (run / name).stat().st_size > 0
        text = place.joinpath("first.txt").read_text()
        assert "gallery.html" in text and "results.png" in text

    def test_planted_copies_are_found_first(self, place):
        table = list(csv.DictReader((records(place, "demo")[0].parent / "results.csv").open()))
        found = {(r["task"], r["method"], r["metric"]): float(r["mean"]) for r in table}
        assert found["exact_copies", "dmin", "recall@1"] == 1.0
        assert found["exact_copies", "random", "recall@1"] < 0.2

    def test_its_record_tells_how_to_repeat_it(self, place):
        record = json.loads(records(place, "demo")[0].read_text())
        assert record["outcome"] == "finished" and record["seed"] == 0
        assert record["versions"]["torch"] and record["peak_memory_bytes"]["process"] > 0
        assert record["results"]["collect"]["digest"]
        assert (records(place, "demo")[0].parent / "config.yaml").is_file()

    def test_a_second_time_finds_everything_done(self, place):
        before = {p: p.stat().st_mtime_ns for p in place.glob("outputs/stores/*/*.h5")}
        again = dmin("demo", *SMALLEST[1:], NETWORK, cwd=place)
        assert "Predicting" not in again.stdout
        assert {p: p.stat().st_mtime_ns for p in place.glob("outputs/stores/*/*.h5")} == before

    def test_single_commands_share_its_work(self, place):
        dmin("train", *SMALLEST, NETWORK, cwd=place)
        dmin("collect", *SMALLEST, cwd=place)
        dmin("sample", *SMALLEST, cwd=place)
        found = dmin("retrieve", *SMALLEST, "method=grad_cos", "retrieve.k=3", cwd=place)
        assert "by grad_cos" in found.stdout
        for command in ("retrieve", "outliers", "losses"):
            refused = refusal(command, *SMALLEST, f"{command}.k=0", cwd=place)
            assert f"{command}.k=0: show 1 or more" in refused
        assert len(list(place.glob("outputs/stores/debug-train-*"))) == 1

    @pytest.mark.parametrize("method", [[], ["method=training_loss"]])
    def test_outliers_are_shown_and_written(self, place, method):
        found = dmin("outliers", *SMALLEST, *method, "outliers.k=5", cwd=place)
        assert ("by training_loss" if method else "by grad_dot") in found.stdout
        folder = records(place, "outliers")[-1].parent
        scores = [float(r["score"]) for r in csv.DictReader((folder / "outliers.csv").open())]
        assert scores == sorted(scores, reverse=True) and len(scores) > 5
        assert Image.open(folder / "outliers.png").size[0] > 500

    def test_outliers_are_none_of_directions(self, place):
        for method in ("dmin", "pixel_l2"):
            refused = refusal("outliers", *SMALLEST, f"method={method}", cwd=place)
            assert f"method={method} gives every example the same score" in refused

    def test_losses_need_no_gradients_and_tell_of_images_held_out(self, place):
        folders = (place / "outputs/queries").glob("debug-*")  # of the benchmark, and of `sample`
        folder = max(folders, key=lambda each: len(list(each.iterdir())))
        found = dmin("losses", *SMALLEST, "noise.draws=2", folder, "losses.k=5", cwd=place)
        assert "100 held-out images is" in found.stdout and "(95 %:" in found.stdout
        kept = Store(next((place / "outputs/stores").glob("debug-losses-*")))
        assert kept.layout.readouts == () and kept.losses().shape[1] == 2
        rows = list(csv.DictReader((records(place, "losses")[-1].parent / "losses.csv").open()))
        relative = [float(row["relative"]) for row in rows]
        assert relative == sorted(relative, reverse=True) and len(rows) == len(kept)
        # Of the same settings there is a store of gradients, which has the losses too.
        again = dmin("losses", *SMALLEST, "losses.k=5", cwd=place)
        assert "from the differences between timesteps" in again.stdout
        assert "losses alone" not in again.stdout
        assert len(list((place / "outputs/stores").glob("debug-losses-*"))) == 1

    def test_several_methods_stand_side_by_side(self, place):
        asked = ["method=dmin,grad_dot,pixel_l2", "retrieve.k=4"]
        found = dmin("retrieve", *SMALLEST, *asked, cwd=place)
        for told in ("by dmin", "by grad_dot", "by pixel_l2", "dmin and grad_dot share"):
            assert told in found.stdout
        folder = records(place, "retrieve")[-1].parent
        rankings = load_rankings(folder)
        assert [each.method for each in rankings] == ["dmin", "grad_dot", "pixel_l2"]
        first, _, pixels = rankings
        assert first.query_ids == pixels.query_ids and first.maximum == pytest.approx(2, abs=1e-4)
        assert first.about["model"] == "outputs/models/debug" and first.about["adapter"] == "none"
        assert {"weights", "store", "examples", "date", "dmin"} <= set(first.about)
        assert first.blind is not None and first.copy_of is not None and pixels.blind is None
        assert b"\r" not in (folder / "ranking.csv").read_bytes()
        alone = Image.open(records(place, "demo")[0].parent / "gallery.png").size[1]
        assert Image.open(folder / "gallery.png").size[1] > 2 * alone

    def test_a_part_of_a_picture_has_an_answer_of_its_own(self, place):
        folder = next((place / "outputs/queries").glob("debug-*"))
        picture = sorted(folder.glob("*.png"))[0]
        asked = [*SMALLEST, picture, "--prompt=0", "retrieve.k=3"]
        answers = []
        for part in ([], ["--region=0,0,0.5,1", "--places=1"]):
            if answers:
                part += [f"--timesteps={answers[0].timesteps[0]:g}"]
            dmin("retrieve", *asked, *part, cwd=place)
            answers.append(load_rankings(records(place, "retrieve")[-1].parent)[0])
        whole, half = answers
        assert half.timesteps == whole.timesteps[:1] and half.maximum == pytest.approx(1, abs=1e-4)
        assert half.query_metadata[0]["part"] == "0.5 × 1 at (0, 0)"
        assert half.query_ids == whole.query_ids and (half.scores != whole.scores).any()
        maps = np.load(records(place, "retrieve")[-1].parent / "places.npz")
        asked_about, found = f"{half.method}/{half.query_ids[0]}", half.train_ids[0][0]
        of_train, of_query = (maps[f"{of}/{asked_about}/{found}"] for of in ("train", "query"))
        assert of_train.sum() == pytest.approx(of_query.sum(), rel=1e-3)
        assert of_train.sum() == pytest.approx(half.scores[0, 0], abs=0.5)  # k is small here
        assert of_query[:, :4].any() and not of_query[:, 4:].any()
        refused = refusal("retrieve", *asked, *part, "retrieve.group_by=label", cwd=place)
        assert "retrieve.places splits the score of an example, but groups" in refused
        refused = refusal("retrieve", *asked, part[0], "method=pixel_l2", cwd=place)
        assert "compares whole pictures" in refused
        refused = refusal("retrieve", *asked, "--timesteps=1", cwd=place)
        assert "t = 1 is not among the timesteps of the store" in refused

    def test_these_pictures_rather_than_those_are_one_query(self, place):
        folder = next((place / "outputs/queries").glob("debug-*"))
        these, those = (sorted(folder.glob("*.png"))[span] for span in (slice(2), slice(2, 4)))
        (place / "those").mkdir()
        for picture in those:
            (place / "those" / picture.name).write_bytes(picture.read_bytes())
        answers, asked = [], [*SMALLEST, "--prompt=0", "retrieve.k=100000"]  # all there are
        for words in (these, those, [*these, "--against=those"], [these[0], "queries.pool=max"]):
            dmin("retrieve", *asked, *words, cwd=place)
            answers.append(load_rankings(records(place, "retrieve")[-1].parent)[0])
        good, bad, pooled, alone = answers
        means = [dict.fromkeys(good.train_ids[0], 0.0) for _ in range(2)]
        for mean, ranking in zip(means, (good, bad), strict=True):
            for ids, scores in zip(ranking.train_ids, ranking.scores, strict=True):
                for id, score in zip(ids, scores, strict=True):
                    mean[id] += score / 2
        expected = [means[0][id] - means[1][id] for id in pooled.train_ids[0]]
        np.testing.assert_allclose(pooled.scores[0], expected, atol=1e-4)
        (about,) = pooled.query_metadata
        assert about["against"] == [p.name for p in those] and "mean of" in pooled.query_ids[0]
        assert alone.query_ids == good.query_ids[:1]  # one picture alone is asked as it is
        np.testing.assert_allclose(alone.scores[0], good.scores[0], rtol=1e-6)
        # What an example scores with all alike cancels between the two sets.
        some = ["retrieve.where={label: 0}", "retrieve.popularity=true"]
        dmin("retrieve", *asked, *these, "--against=those", *some, cwd=place)
        (found,) = load_rankings(records(place, "retrieve")[-1].parent)
        assert "popularity corrected" in found.method and len(found.train_ids[0]) > 1
        assert all(example["label"] == 0 for example in found.train_metadata[0])
        known = dict(zip(pooled.train_ids[0], pooled.scores[0], strict=True))
        same = [known[id] for id in found.train_ids[0]]
        np.testing.assert_allclose(found.scores[0], same, atol=1e-4)
        for words, told in (
            ([*those, "--against=those"], "would cancel itself"),
            ([*these, "--against=nowhere"], "queries.against=nowhere"),
            ([*these, "queries.pool=max", "index=certified"], "max is not an inner product"),
            ([*these, "queries.pool=mean", "retrieve.places=1"], "retrieve.places=1"),
            ([*these, "--against=those", "method=popularity"], "ignores the query"),
        ):
            assert told in refusal("retrieve", *asked, *words, cwd=place)

    def test_planted_queries_are_seen_to_be_training_images(self, place):
        planted = ["queries=planted", "queries.count=3", "retrieve.k=9999"]
        found = dmin("retrieve", *SMALLEST, *planted, cwd=place)
        assert "retrieve.k=9999: there are " in found.stdout and "all are shown" in found.stdout
        assert found.stdout.count("this query is itself a training image: digit-") == 3

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ("method=dmin,pixel_12", "method=pixel_12: there is no such method. Did you mean"),
            ("method=dmin,encoder", "method=encoder needs method.path"),
            ("method=dmin,over_checkpoints", "method=over_checkpoints averages over several"),
            ("method=dmin,trak index=certified", "index works for one method at a time"),
            ("method=dmin,trak retrieve.min_score=1", "retrieve.min_score works for one method"),
            ("method=dmin,d_trak", "method=d_trak needs the readouts mean_squared_output"),
            (
                "method=dmin,journey_trak",
                "method=journey_trak needs the intermediate states of generated queries",
            ),
        ],
    )
    def test_a_method_that_cannot_run_is_refused_before_the_others_do(self, place, asked, told):
        assert told in refusal("retrieve", *SMALLEST, *asked.split(), cwd=place)
        folder = records(place, "retrieve")[-1].parent
        assert not (folder / "ranking.csv").exists()

    def test_another_training_does_not_replace_the_model(self, place):
        refused = refusal("train", *SMALLEST, NETWORK, "train.steps=6", cwd=place)
        assert "train.steps: 6 here, 5 there" in refused

    def test_a_store_damaged_on_disk_is_refused_and_can_be_mended(self, place):
        store = next(place.glob("outputs/stores/debug-train-*"))
        segment = next(store.glob("segment-*"))
        digest = Store(store).digest()
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 1
        segment.write_bytes(content)
        refused = refusal("retrieve", *SMALLEST, cwd=place)
        assert segment.name in refused
        segment.unlink()
        dmin("collect", *SMALLEST, cwd=place)
        assert Store(store).digest() == digest

    def test_retrieving_does_not_collect_the_training_store(self, place):
        refused = refusal("retrieve", *SMALLEST, "sketch.dim=512", cwd=place)
        assert "Run `dmin collect` with the same settings first" in refused
        assert "dim: 512 here, 256 there" in refused

    def test_a_store_at_a_path_of_its_own_must_fit(self, place):
        store = next(place.glob("outputs/stores/debug-train-*"))
        common = [*SMALLEST, f"collect.path={store}"]
        assert "by dmin" in dmin("retrieve", *common, cwd=place).stdout
        refused = refusal("retrieve", *common, "noise.seed=1", cwd=place)
        assert "noise.seed: 1 here, 0 there" in refused
        refused = refusal("collect", *common, "noise.seed=1", cwd=place)
        assert "noise.seed: 1 here, 0 there" in refused


OWN = ["evaluate", "model=ddpm", "model.path=none", "data=image_folder", "data.root=none"]
REFUSALS = [
    (["collect"], "data"),
    (["collect", "experiment=digits", "sketch.dimm=3"], "sketch.dim"),
    (["collect", "experiment=digits", "sketch.dim=many"], "sketch.dim"),
    (["collect", "experiment=digits", "+sketch.size=3"], "sketch.size"),
    (["collect", "experiment=digit"], "digits"),
    (["collect", "experiment=digits"], "dmin train"),
    (["collect", "experiment=digits", "sketch=oporpp"], "oporp"),
    (["retrieve", "experiment=digits", "trainer=ddp"], "one process"),
    (["evaluate", "data=digits", "model=ddpm", "model.path=x"], "benchmark"),
    (["train", "experiment=digits", "paths.outputs=file/below"], "cannot be written"),
    # A model of one's own, on which nothing is trained; what is missing is named by its setting.
    ([*OWN, "benchmark=dmin_paper"], "Set queries.root=<value>"),
    ([*OWN, "benchmark=dmin_paper", "queries.root=none"], "none: this file does not exist"),
    ([*OWN, "benchmark=dmin_paper", "queries.root=a", "queries.size=x"], "queries.size is 'x'"),
    (["train", *OWN[1:]], "Choices of train: digits_mlp"),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSALS, ids=lambda v: v[-1] if v else "")
def test_what_is_wrong_is_said_in_one_paragraph(arguments, named, tmp_path, capfd):
    (tmp_path / "file").write_text("a file, not a folder")
    assert named in refusal(*arguments, cwd=tmp_path)
    assert "Traceback" not in capfd.readouterr().err


SMALL = [
    "benchmark=digits",
    "extras.threads=1",
    "train.steps=40",
    "sketch.dim=256",
    "timesteps.num=2",
    "collect.readouts=[loss]",
    "benchmark.models=1",
    "benchmark.transforms=false",
    "benchmark.untrained=false",
    "benchmark.tuning.alpha=[0.1,10]",
    "benchmark.tuning.p=[1]",
    "benchmark.tasks.generated.truths.subsets.subsets=4",
    "benchmark.tasks.tune.truths.subsets.subsets=4",
    "benchmark.tasks.generated.truths.union.groups=2",
    "benchmark.tasks.generated.truths.union.random=2",
]


@pytest.mark.slow
def test_a_benchmark_trains_retrains_and_adds_a_method_to_what_it_has(tmp_path):
    dmin("evaluate", *SMALL, "benchmark.methods=[random,dmin]", cwd=tmp_path)
    retrained = {p: p.stat().st_mtime_ns for p in tmp_path.glob("outputs/retrained/*/*.safe*")}
    mine = tmp_path / "mine/method/mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# The norm, whatever the query.\n_target_: mine.Loudest\n")
    tmp_path.joinpath("mine.py").write_text(
        "from dmin.attribution import Method\n\n\n"
        "class Loudest(Method):\n"
        "    name = 'loudest'\n\n"
        "    def score(self, queries, train):\n"
        "        return train.norms['loss'].sum((1, 2, 3)).expand(len(queries.ids), -1)\n"
    )
    more = ["--config-dir", "mine", "benchmark.methods=[random,dmin,spectral,mine]"]
    found = dmin("evaluate", *more, *SMALL, cwd=tmp_path)
    assert "results.html" in found.stdout
    again = {p: p.stat().st_mtime_ns for p in tmp_path.glob("outputs/retrained/*/*.safe*")}
    assert retrained.items() <= again.items() and len(again) > len(retrained)
    run = max((tmp_path / "outputs/runs/evaluate").iterdir())
    rows = list(csv.DictReader((run / "results.csv").open()))
    measured = {(r["method"], r["metric"]) for r in rows}
    for metric in ("LDS", "union@50 %", "leave-out ρ", "AUROC", "mAP"):
        assert {("dmin", metric), ("mine", metric)} <= measured
    assert {r["tuned"] for r in rows if r["method"] == "spectral"} == {"", "planted", "retraining"}
