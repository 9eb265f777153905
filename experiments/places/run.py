"""Do maps of where a score comes from find the part that two pictures share?

python experiments/places/run.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn.functional import conv2d

from dmin import Example, Examples, FeatureSet, GradientCollector, Ranking, places
from dmin.attribution import score_matrix
from dmin.attribution.methods.dmin import DMin
from dmin.collect import predict_trainer
from dmin.data.digits import Digits
from dmin.data.part import dimmed
from dmin.diffusion import SharedNoise, Stratified
from dmin.evaluation.metrics import bootstrap
from dmin.gallery.pictures import overlaid, smoothed, to_picture
from dmin.models import DDPM
from dmin.runtime.escape import write_csv
from dmin.sketches import Auto
from dmin.train import fit_trainer, train
from experiments.parts.run import NETWORK, SCHEDULER
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURES, PLANTS, SIDE, HALF = 1000, 100, 16, 8


def quarters(split: str, count: int, seed: int) -> list[Example]:
    """Return pictures of four digits, drawn without regard to each other."""
    digits, found = Digits(split), []
    drawn = np.random.default_rng(seed).integers(0, len(digits), (count, 4))
    for number, four in enumerate(drawn.tolist()):
        a, b, c, d = (digits[i].image for i in four)
        image = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
        found.append(Example(f"{split}-{number:04d}", image))
    return found


def quarter(number: int) -> tuple[slice, slice]:
    """Return where a quarter of a picture is."""
    y, x = divmod(number, 2)
    return slice(HALF * y, HALF * y + HALF), slice(HALF * x, HALF * x + HALF)


@dataclass(frozen=True)
class Plant:
    """A training picture, and a held-out one into which a quarter of it was put."""

    source: Example
    query: Example
    came_from: int
    put_at: int


def plants(data: list[Example], held_out: list[Example], move: bool, region: bool) -> list[Plant]:
    """Return the plants, of pictures drawn once; asked about as a whole, or by their quarter."""
    draw, found = np.random.default_rng(2), []
    chosen = draw.choice(len(data), PLANTS, replace=False)
    for source, target in zip(chosen.tolist(), held_out, strict=True):
        came_from, by = int(draw.integers(4)), 1 + int(draw.integers(3))
        put_at = (came_from + by) % 4 if move else came_from
        image = target.image.clone()
        image[:, *quarter(put_at)] = data[source].image[:, *quarter(came_from)]
        mask = None
        if region:
            mask = torch.zeros_like(image)
            mask[:, *quarter(put_at)] = 4
        found.append(
            Plant(data[source], replace(target, image=image, mask=mask), came_from, put_at)
        )
    return found


def overlap(values: np.ndarray, number: int) -> float:
    """Return the IoU of a quarter with as large an area of the largest values."""
    truth, top = np.zeros((2, SIDE, SIDE), bool)
    truth[quarter(number)] = True
    top.flat[np.argsort(-values, axis=None, kind="stable")[: truth.sum()]] = True
    return float((top & truth).sum() / (top | truth).sum())


def maps_of(model: DDPM, made: list[Plant], place: Path) -> list:
    """Return the maps of each plant's source and query."""
    collector = GradientCollector(model, Auto(4096), Stratified(3), SharedNoise())
    sides = []
    for role, examples in (("q", [p.query for p in made]), ("x", [p.source for p in made])):
        data = Examples(examples)
        store = collector.collect(data, place / role, trainer=predict_trainer())
        sides.append(FeatureSet(store, data, origin=collector))
    queries, train = sides
    scores = np.diag(score_matrix(queries, train, DMin()))[:, None]
    ids = [[p.source.id] for p in made]
    metadata: list[dict] = [{} for _ in made]
    own = Ranking(
        method="dmin",
        timesteps=collector.timesteps,
        query_ids=queries.store.ids,
        query_metadata=metadata,
        train_rows=np.arange(len(made))[:, None],
        train_ids=ids,
        train_metadata=[[each] for each in metadata],
        scores=scores,
    )
    return list(places(queries, train, own, shown=1).values())


def by_pixels(plant: Plant) -> np.ndarray:
    """Return how little pixels at the same places differ."""
    return -smoothed((plant.query.image - plant.source.image)[0].square().numpy())


def by_template(plant: Plant) -> np.ndarray:
    """Return a quarter where the asked quarter of the query fits best, wherever that is."""
    patch = plant.query.image[:, *quarter(plant.put_at)]
    picture = plant.source.image
    norms = conv2d(picture.square()[None], torch.ones_like(patch)[None]).sqrt().clamp(min=1e-6)
    fit = (conv2d(picture[None], patch[None]) / norms)[0, 0]
    y, x = divmod(int(fit.argmax()), fit.shape[1])
    found = np.zeros((SIDE, SIDE))
    found[y : y + HALF, x : x + HALF] = 1
    return found


def draw(made: list[Plant], maps: list) -> None:
    """Draw six plants: query, its map, training picture, its map."""
    figure, grid = plt.subplots(3, 8, figsize=(11, 4.4), dpi=130)
    for number in range(6):
        plant, found = made[number], maps[number]
        row, left = number % 3, 4 * (number // 3)
        query, source = (
            to_picture(each.numpy(), "")
            for each in (dimmed(plant.query.image, plant.query.mask), plant.source.image)
        )
        shown = [
            ("query", query),
            ("where in it", overlaid(query, found.query)),
            ("training picture", source),
            ("where in it", overlaid(source, found.train)),
        ]
        for column, (title, picture) in enumerate(shown):
            axes = grid[row, left + column]
            axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "results.png")


def main() -> None:
    """Measure, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/places"))
    parser.add_argument("--steps", type=int, default=800)
    asked = ("quarter", "whole", "quarter, moved")
    parser.add_argument("--asked", nargs="+", choices=asked, default=asked[:1])
    settings = parser.parse_args()
    data, held_out = quarters("train", PICTURES, 0), quarters("heldout", PLANTS, 1)
    build = partial(DDPM.build, {**NETWORK, "sample_size": SIDE}, SCHEDULER)
    place = settings.cache / "model"
    if place.is_dir():
        model = DDPM.from_pretrained(place)
    else:
        trainer = fit_trainer(accelerator="cpu")
        model = train(build, Examples(data), steps=settings.steps, batch_size=32, trainer=trainer)
        model.save_pretrained(place)
    torch.manual_seed(0)
    models = {"trained": model, "untrained": build().eval()}
    lines = []

    def add(by: str, asked: str, where: str, found: list[float]) -> None:
        known = bootstrap(np.array(found))
        figures = {"IoU": known.mean, "low": known.low, "high": known.high}
        lines.append(
            {"by": by, "asked": asked, "where": where}
            | {name: f"{value:.3f}" for name, value in figures.items()}
        )
        print(lines[-1], flush=True)
        write_csv(HERE / "results.csv", lines)

    for asked in settings.asked:
        move = asked.endswith("moved")
        made = plants(data, held_out, move, region=asked != "whole")
        add("pixels", asked, "training picture", [overlap(by_pixels(p), p.came_from) for p in made])
        if asked != "whole":
            fits = [overlap(by_template(p), p.came_from) for p in made]
            add("template", asked, "training picture", fits)
        for name, each in models.items():
            maps = maps_of(each, made, settings.cache / f"{name}-{asked.replace(', ', '-')}")
            pairs = list(zip(maps, made, strict=True))
            found = [overlap(smoothed(m.train), p.came_from) for m, p in pairs]
            add(name, asked, "training picture", found)
            found = [overlap(smoothed(m.query), p.put_at) for m, p in pairs]
            add(name, asked, "query", found)
            rest = np.array([m.rest / m.score for m in maps])
            print(f"  rest of the score: {np.abs(rest).mean():.4f} on average")
            if (name, asked) == ("trained", "quarter"):
                draw(made, maps)


if __name__ == "__main__":
    with recorded(__file__, pictures=PICTURES, plants=PLANTS, seeds=[0, 1, 2]):
        main()
