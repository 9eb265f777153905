"""What do the corrected defaults change against DMin as published? See README.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dmin.attribution import DMin, FeatureSet, score_matrix
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Dataset, Examples
from dmin.data.digits import Digits
from dmin.data.shapes import Shapes
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.processes import RectifiedFlow
from dmin.diffusion.timesteps import DMinCubic, Stratified
from dmin.doctor.timestep_report import report_of
from dmin.evaluation import GroundTruth, SameColumn, SameLabel, Source
from dmin.evaluation.metrics import bootstrap, measure
from dmin.models import DiffusionModel, Prediction
from dmin.queries import Planted
from dmin.runtime.escape import write_csv
from dmin.sketches import OPORP, BlockCyclic
from dmin.train import fit_trainer, train
from experiments.record import recorded

HERE = Path(__file__).parent
DIGITS = OmegaConf.load(Path(__file__).parents[2] / "conf" / "train" / "digits_unet.yaml").model
BATCH = {"digits": 64, "shapes": 32}
WIDTH, LENGTH = 32, 12  # of captions


class ShapesFlow(DiffusionModel):
    """SD3's transformer on the pixels of captioned shapes, trained as a flow shifted by 3."""

    def __init__(self, target: Any = "velocity") -> None:
        super().__init__()
        self.network = SD3Transformer2DModel(
            sample_size=32,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
        )
        self.process = RectifiedFlow({"num_train_timesteps": 1000, "shift": 3.0}, target=target)
        self.timesteps = self.process.timesteps

    def encode(self, batch):
        """Return pixels in [−1, 1], and captions as the fixed random vectors of their words."""
        text = torch.zeros(len(batch["image"]), LENGTH, WIDTH)
        for row, caption in zip(text, batch["caption"], strict=True):
            for place, word in zip(row, caption.split(), strict=False):
                place[:] = torch.randn(
                    WIDTH, generator=torch.Generator().manual_seed(crc32(word.encode()))
                )
        return 2 * batch["image"] - 1, {"text": text, "pooled": text.mean(1)}

    def predict(self, x0, noise, t, condition):
        """Return the velocity, or what the published code compares it with."""
        noised, target, weight = self.process(x0, noise, t)
        prediction = self.network(noised, condition["text"], condition["pooled"], timestep=t).sample
        return Prediction(prediction, target, weight)

    def describe(self):
        """Return the loss."""
        return {**super().describe(), **self.process.describe()}


@dataclass(frozen=True)
class Variant:
    """One way to collect, and to score with."""

    world: str
    schedule: str  # published or stratified
    sketch: str  # OPORP or block-cyclic
    target: str = "model"  # or noise, as published for SD3

    @property
    def name(self) -> str:
        return "-".join((self.world, self.schedule, self.sketch, self.target))


VARIANTS = [
    Variant("digits", "published", "OPORP"),
    Variant("digits", "published", "block-cyclic"),
    Variant("digits", "stratified", "block-cyclic"),
    Variant("shapes", "published", "OPORP", "noise"),
    Variant("shapes", "published", "OPORP"),
    Variant("shapes", "stratified", "block-cyclic", "noise"),
    Variant("shapes", "stratified", "block-cyclic"),
]
SCHEDULES = {"published": DMinCubic(10), "stratified": Stratified(10)}
SKETCHES = {"OPORP": lambda dim: OPORP(dim), "block-cyclic": lambda dim: BlockCyclic(dim)}


class Setup:
    """Models, data and stores: made once, found again."""

    def __init__(self, cache: Path, dim: int) -> None:
        self.cache, self.dim = cache, dim
        digits, shapes = Digits("train").examples, Shapes(examples=600, minority=0.1)
        self.trained_on = {"digits": Examples(digits[:1000]), "shapes": shapes}
        # A part of them is enough to search among.
        self.train = {
            "digits": Examples(digits[:300]),
            "shapes": Examples([shapes[i] for i in range(200)]),
        }
        heldout = Shapes("heldout", examples=40, minority=0.5)
        self.queries: dict[str, dict[str, Dataset]] = {
            "digits": {"heldout": Examples(Digits("heldout").examples[:40])},
            "shapes": {"heldout": heldout},
        }
        for name, queries in self.queries.items():
            queries["noisy"] = Planted("noisy", count=40, noise=0.3).plant(self.train[name])

    def model(self, name: str, target: str) -> DiffusionModel:
        """Return a trained model."""
        build = ShapesFlow
        if name == "digits":
            build = instantiate(DIGITS, _convert_="all")
        file = self.cache / f"{name}.pt"
        if not file.is_file():
            trainer = fit_trainer(accelerator="cpu", enable_progress_bar=False)
            data, size = self.trained_on[name], BATCH[name]
            trained = train(
                build, data, steps=1500, batch_size=size, learning_rate=2e-3, trainer=trainer
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(trained.network.state_dict(), file)
        model = ShapesFlow("noise") if target == "noise" else build()
        model.network.load_state_dict(torch.load(file))
        return model.eval()

    def sides(self, variant: Variant) -> dict[str, FeatureSet]:
        """Return the training examples and all queries of a variant with their features."""
        collector = GradientCollector(
            self.model(variant.world, variant.target),
            SKETCHES[variant.sketch](self.dim),
            SCHEDULES[variant.schedule],
        )
        sides = {}
        for role, data in {
            "train": self.train[variant.world],
            **self.queries[variant.world],
        }.items():
            trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
            path = self.cache / f"{variant.name}-{role}"
            sides[role] = FeatureSet(
                collector.collect(data, path, trainer=trainer, seal_seconds=10), data
            )
        return sides


def tasks(world: str) -> list[tuple[str, str, GroundTruth, str]]:
    """Return what is measured: column, queries, what is right, metric."""
    found: list[tuple[str, str, GroundTruth, str]] = [
        ("noisy copy recall@1", "noisy", Source(), "recall@1"),
    ]
    if world == "digits":
        return [("class P@10", "heldout", SameLabel(), "precision@10"), *found]
    return [("source mAP", "heldout", SameColumn("source"), "mAP"), *found]


def rows_of(variant: Variant, sides: dict[str, FeatureSet]) -> Iterator[dict[str, Any]]:
    """Measure a variant with and without re-normalisation."""
    report = report_of(sides["train"].store)
    blind = sum(entry.blind for entry in report)
    for renormalise in (False, True):
        for column, role, truth, metric in tasks(variant.world):
            scores = score_matrix(sides[role], sides["train"], DMin(renormalise=renormalise))
            relevant = truth.relevant(sides[role].store, sides["train"].store)
            values, kept = measure(metric, scores, relevant), slice(None)
            if column == "source mAP":  # of the minority: the majority is found by chance
                kept = [row["source"] == "print" for row in sides[role].store.metadata]
            yield {
                **vars(variant),
                "renormalised": renormalise,
                "blind": blind,
                "metric": column,
                **bootstrap(values[kept])._asdict(),
                "chance": float(relevant[kept].mean())
                if "recall" not in metric
                else 1 / len(relevant[0]),
            }


def steps_of(variant: Variant, sides: dict[str, FeatureSet]) -> Iterator[dict[str, Any]]:
    """Measure each timestep by itself."""
    train, report = sides["train"], report_of(sides["train"].store)
    for index, entry in enumerate(report):
        weights = [float(index == other) for other in range(len(report))]
        found = {}
        for column, role, truth, metric in tasks(variant.world):
            scores = score_matrix(sides[role], train, DMin(weights))
            relevant = truth.relevant(sides[role].store, train.store)
            values, kept = measure(metric, scores, relevant), slice(None)
            if column == "source mAP":  # of the minority: the majority is found by chance
                kept = [row["source"] == "print" for row in sides[role].store.metadata]
            found[column] = float(values[kept].mean())
        yield {**vars(variant), **entry._asdict(), "blind": entry.blind, **found}


def folded(variant: Variant, sides: dict[str, FeatureSet]) -> Iterator[dict[str, Any]]:
    """Measure noisy copies at smaller k, folded from the same store, both ways."""
    train, noisy = sides["train"].store, sides["noisy"].store
    relevant = Source().relevant(noisy, train)
    rows = [store.features("loss")[:, 0, :, 0].astype(np.float32) for store in (noisy, train)]
    dim = rows[0].shape[-1]
    for small in (16, 32, 64, 256, 1024, dim):
        cut = [r.reshape(*r.shape[:2], -1, small).sum(2) for r in rows]
        for renormalise in (False, True):
            sides_ = [
                r / np.linalg.norm(r, axis=-1, keepdims=True) if renormalise else r for r in cut
            ]
            scores = np.einsum("qtk,ntk->qn", *sides_, optimize=True)
            value = bootstrap(measure("recall@1", scores, relevant))
            yield {**vars(variant), "k": small, "renormalised": renormalise, **value._asdict()}


def across_shapes(setup: Setup) -> Iterator[dict[str, Any]]:
    """Ask for the source of images in another shape than it has: what must they share of noise?

    Half of the training images are cut to 24 × 32; each query is a source in the other shape.
    """
    examples = [setup.train["shapes"][i] for i in range(200)]
    cut = [replace(e, image=e.image[:, 4:-4]) for e in examples]
    train = Examples([(cut if i % 2 else examples)[i] for i in range(200)])
    queries = Examples(
        [
            replace((examples if i % 2 else cut)[i], id=f"q{i}", metadata={"source_id": e.id})
            for i, e in enumerate(examples[:60])
        ]
    )
    model = setup.model("shapes", "model")
    for shapes in ("own", "field"):
        noise = SharedNoise(shapes=shapes)
        collector = GradientCollector(model, BlockCyclic(setup.dim), Stratified(10), noise)
        sides = []
        for role, data in {"queries": queries, "train": train}.items():
            trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
            path = setup.cache / f"shapes-noise-{shapes}-{role}"
            sides.append(
                FeatureSet(collector.collect(data, path, trainer=trainer, seal_seconds=10), data)
            )
        scores = score_matrix(*sides, DMin())
        relevant = Source().relevant(sides[0].store, sides[1].store)
        best = np.argsort(-scores, axis=1)[:, :10]
        same = (best % 2) != (np.arange(60)[:, None] % 2)
        yield {
            "noise.shapes": shapes,
            "recall@1": float(measure("recall@1", scores, relevant).mean()),
            "recall@10": float(measure("recall@10", scores, relevant).mean()),
            "first ten of the query's shape": float(same.mean()),
        }


def measured(setup: Setup, variant: Variant) -> dict[str, list[dict[str, Any]]]:
    """Measure a variant, unless that was done before."""
    file = setup.cache / f"{variant.name}.json"
    if not file.is_file():
        sides = setup.sides(variant)
        small = variant.sketch == "block-cyclic" and variant.target == "model"
        found = {
            "results": list(rows_of(variant, sides)),
            "timesteps": list(steps_of(variant, sides)),
            "renormalised": list(folded(variant, sides)) if small else [],
        }
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def main() -> None:
    """Train, collect, measure, write tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/dmin_paper"))
    parser.add_argument("--dim", type=int, default=4096)
    options = parser.parse_args()
    setup = Setup(options.cache, options.dim)
    table, steps, folds = [], [], []
    for variant in VARIANTS:
        print(variant.name, flush=True)
        found = measured(setup, variant)
        table += found["results"]
        steps += found["timesteps"]
        folds += found["renormalised"]
    shapes = list(across_shapes(setup))
    tables = {"results": table, "timesteps": steps, "renormalised": folds, "shapes": shapes}
    for name, rows in tables.items():
        lines = (
            {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
        write_csv(HERE / f"{name}.csv", lines)
    print(json.dumps(shapes, indent=1))


if __name__ == "__main__":
    with recorded(__file__, seeds={"train": 0, "noise": 0, "sketch": 0}):
        main()
