"""Who drew what is behind a drawing? Two design houses, a model that was never told of either.

python experiments/artists/run.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from hydra.utils import instantiate
from PIL import Image

from dmin import Auto, Example, Examples, FeatureSet, GradientCollector, retrieve
from dmin.attribution import Ranking
from dmin.attribution.scores import score_matrix
from dmin.collect import predict_trainer
from dmin.data.image_folder import ImageFolder
from dmin.diffusion import SharedNoise, Stratified
from dmin.evaluation.metrics import bootstrap, measure
from dmin.gallery.pictures import to_picture
from dmin.models import DDPM
from dmin.runtime.escape import write_csv
from experiments.artists.drawings import drawings
from experiments.artists.sheet import Card, save_sheet
from experiments.artists.training import trained, untrained
from experiments.record import recorded

HERE = Path(__file__).parent
STEPS, K, EACH = 4541, 5, 5
GRADIENTS = ("dmin", "grad_cos", "spectral_energy", "sharp_energy", "blend")
IMAGES = ("pixel_l2", "pixel_cosine", "ssim")
METRICS = {"P@5": f"precision@{K}", "mAP": "mAP"}
SHOWN = 5  # queries on a sheet
Scores = dict[tuple[str, str], np.ndarray]
"""[queries, examples] by model and method."""


def method(name: str):
    """Return a method with the settings of its YAML."""
    conf = HERE.parents[1] / "conf"
    settings = yaml.safe_load((conf / f"method/{name}.yaml").read_text())
    for default in settings.pop("defaults", []):  # of blend: two others in one
        for group, other in dict(default if isinstance(default, dict) else {}).items():
            part = group.rpartition("@")[2]
            of = yaml.safe_load((conf / f"method/{other}.yaml").read_text())
            settings[part] = of | settings.get(part, {})
    return instantiate(settings)


class World:
    """A model, and the stores that it makes of drawings."""

    def __init__(self, model: DDPM, data: ImageFolder, place: Path) -> None:
        self.model, self.place = model, place
        self.collector = GradientCollector(model, Auto(4096), Stratified(10), SharedNoise())
        self.train = self.side(data, "train")

    def side(self, data: ImageFolder | Examples, name: str) -> FeatureSet:
        """Return the features of some drawings, with the drawings."""
        store = self.collector.collect(data, self.place / name, trainer=predict_trainer())
        return FeatureSet(store, data)


def artists(data: ImageFolder | Examples) -> np.ndarray:
    """Return who drew each."""
    return np.array([data[i].metadata.get("artist") for i in range(len(data))])


def by_subject(values: np.ndarray, queries: ImageFolder) -> np.ndarray:
    """Return the mean of both artists' drawings of each subject, which are asked about as one."""
    subject = np.array([id.partition("-")[2] for id in queries.ids])
    return np.array([values[subject == one].mean() for one in np.unique(subject)])


def figures(scores: Scores, name: tuple[str, str], queries: ImageFolder, data: ImageFolder):
    """Return how far the query's artist comes first, with intervals over subjects."""
    who, of = artists(queries), artists(data)
    found: dict[str, float] = {}

    def add(column: str, values: np.ndarray) -> None:
        estimate = bootstrap(by_subject(values, queries))
        told = (estimate.mean, estimate.low, estimate.high)
        found.update(zip((column, f"{column} low", f"{column} high"), told, strict=True))

    def values(name: tuple[str, str], metric: str) -> np.ndarray:
        return measure(metric, scores[name], who[:, None] == of[None])

    for column, metric in METRICS.items():
        mine = values(name, metric)
        add(column, mine)
        found |= {f"{column} {artist}": mine[who == artist].mean() for artist in np.unique(who)}
    add("P@5 over ssim", values(name, METRICS["P@5"]) - values(("none", "ssim"), METRICS["P@5"]))
    if name[0] == "trained":
        before = values(("untrained", name[1]), METRICS["P@5"])
        add("P@5 over untrained", values(name, METRICS["P@5"]) - before)
    kind, kinds = ([each[i].label for i in range(len(each))] for each in (queries, data))
    same = np.array(kind)[:, None] == np.array(kinds)[None]
    found["kind P@5"] = measure(METRICS["P@5"], scores[name], same).mean()
    told = {column: f"{value:.3f}" for column, value in found.items()}
    return {"model": name[0], "method": name[1], **told}


def original(data: ImageFolder, id: str) -> Image.Image:
    """Return a drawing as its artist made it, at 64 × 64 on white."""
    drawn = Image.open(Path(data.root) / id).convert("RGBA")
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(drawn)
    return paper.convert("RGB")


def cards(ranking: Ranking, query: int, data: ImageFolder) -> list[Card]:
    """Return what is behind a query."""
    ids, scores = ranking.train_ids[query], ranking.scores[query]
    known = ranking.train_metadata[query]
    return [
        Card(original(data, id), facts["artist"], f"{score:.2f}")
        for id, score, facts in zip(ids, scores, known, strict=True)
    ]


def held_out_sheet(
    answers: dict[str, Ranking], queries: ImageFolder, data: ImageFolder, file: str
) -> None:
    """Draw the first drawings of the kinds in turn, of either artist in turn."""
    kinds = sorted({queries[i].label for i in range(len(queries))})[:SHOWN]
    rows = []
    for number, kind in enumerate(kinds):
        artist = ("Noto", "Twemoji")[number % 2]
        those = [i for i in range(len(queries)) if queries[i].label == kind]
        at = next(i for i in those if queries[i].metadata["artist"] == artist)
        shown = Card(original(queries, queries.ids[at]), artist, queries[at].caption or "")
        rows.append([[shown], *(cards(each, at, data) for each in answers.values())])
    save_sheet(rows, ["held out", *answers], HERE / file)


def generated_sheet(ranking: Ranking, samples: Examples, data: ImageFolder) -> None:
    """Draw one generated picture of each kind."""
    rows = []
    for at in range(0, len(samples), EACH):
        picture = to_picture(samples[at].image.numpy(), "")
        shown = Card(picture, None, str(samples[at].label))
        rows.append([[shown], cards(ranking, at, data)])
    save_sheet(rows, ["generated", "behind it, by dmin"], HERE / "generated.png")


def generated(model: DDPM) -> Examples:
    """Return pictures of each kind that the model makes."""
    kinds = [kind for kind in model.label_names for _ in range(EACH)]
    images = model.sample(kinds, list(range(len(kinds))), steps=50)
    made = zip(kinds, images, strict=True)
    return Examples([Example(f"{n:03d}-{k}", image, label=k) for n, (k, image) in enumerate(made)])


def first_artists(scores: np.ndarray, data: ImageFolder) -> np.ndarray:
    """Return the share of Noto's drawings among the first of each query."""
    first = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return (artists(data)[first] == "Noto").mean(1)


def main() -> None:
    """Measure, and write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/artists"))
    parser.add_argument("--packages", type=Path, help="folder of the packages of npm; "
                        "fetched into the cache if they are not there")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    cache = settings.cache
    sets = drawings(cache / "drawings", settings.packages or cache / "packages")
    data, queries = sets["train"], sets["heldout"]
    scores: Scores = {}
    # The trained model comes last: what is drawn is behind its answers.
    for name in ("untrained", "trained"):
        model, place = untrained(data), cache / name
        if name == "trained":
            model, place = trained(data, place, settings.steps), cache / f"of-{settings.steps}"
        world = World(model, data, place)
        asked = world.side(queries, "heldout")
        for each in GRADIENTS:
            scores[name, each] = score_matrix(asked, world.train, method(each))
    for each in IMAGES:
        scores["none", each] = score_matrix(asked, world.train, method(each))
    write_csv(HERE / "results.csv", [figures(scores, name, queries, data) for name in scores])
    behind_it, alike = "behind it, by dmin", "most alike, by SSIM"
    ten, five = (retrieve(asked, world.train, method("dmin"), k) for k in (2 * K, K))
    held_out_sheet({behind_it: ten}, queries, data, "results.png")
    beside = {behind_it: five, alike: retrieve(asked, world.train, method("ssim"), K)}
    held_out_sheet(beside, queries, data, "alike.png")
    samples = generated(model)
    made = world.side(samples, "generated")
    generated_sheet(retrieve(made, world.train, method("dmin"), K), samples, data)
    write_csv(HERE / "generated.csv", behind(made, world, data))


def behind(made: FeatureSet, world: World, data: ImageFolder) -> list[dict[str, str]]:
    """Return the share of Noto's drawings behind each generated picture, by some methods."""
    names = ("dmin", "spectral_energy", "blend", "ssim")
    shares = {m: first_artists(score_matrix(made, world.train, method(m)), data) for m in names}
    ids = list(made.store.ids)
    return [{"id": id, **{m: f"{shares[m][row]:.1f}" for m in names}} for row, id in enumerate(ids)]


if __name__ == "__main__":
    with recorded(__file__, subjects="Animals & Nature", seeds=[0]):
        main()
