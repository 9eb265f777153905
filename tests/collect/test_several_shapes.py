"""Images of several shapes in one collection: blocks stay the unit, shapes are no matter."""

import json

import numpy as np
import pytest
import torch
from latent_model import Latent
from PIL import Image

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples
from dmin.data.ids import one_of_each_shape
from dmin.data.image_folder import ImageFolder
from dmin.data.subset import Subset
from dmin.data.training_folder import Together
from dmin.diffusion.noise import PerExampleNoise, SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.doctor import diagnose
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store

SHAPES = [(8, 8), (6, 12), (12, 6)]


def mixed(count=13):
    generator = torch.Generator().manual_seed(0)
    return Examples(
        [
            Example(f"e{n}", torch.rand(1, *SHAPES[5 * n % 7 % 3], generator=generator), n % 10)
            for n in range(count)
        ]
    )


def make(noise=None, **settings):
    noise = noise or SharedNoise(shapes="field", draws=2)
    return GradientCollector(Latent(), BlockCyclic(32, block=16), Stratified(2), noise, **settings)


def collect(collector, dataset, path, **options):
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector.collect(dataset, path, block_size=4, trainer=trainer, **options)


@pytest.mark.parametrize("noise", [None, SharedNoise(shapes="own"), PerExampleNoise()])
def test_rows_are_those_of_each_shape_alone(noise, tmp_path):
    dataset = mixed()
    store = collect(make(noise), dataset, tmp_path / "mixed", dtype="float32")
    assert store.ids == [e.id for e in dataset.examples]
    assert [row["label"] for row in store.metadata] == [e.label for e in dataset.examples]
    found, norms, losses = store.features("loss"), store.norms("loss"), store.losses()
    for shape in SHAPES:
        rows = [n for n, e in enumerate(dataset.examples) if e.image.shape[1:] == shape]
        alone = collect(
            make(noise),
            Examples([dataset[row] for row in rows]),
            tmp_path / f"alone{shape}",
            dtype="float32",
        )
        np.testing.assert_allclose(found[rows], alone.features("loss"), atol=1e-5)
        np.testing.assert_allclose(norms[rows], alone.norms("loss"), rtol=1e-4)
        np.testing.assert_allclose(losses[rows], alone.losses(), rtol=1e-4)


def test_a_resumed_run_and_kept_encodings_give_the_same_bits(tmp_path):
    dataset = mixed()
    kept = {"encodings": tmp_path / "e", "keep_encodings": True}
    store = collect(make(), dataset, tmp_path / "s", segment_bytes=1, **kept)
    digest = store.digest()
    for segment in sorted((tmp_path / "s").glob("segment-*"))[1:]:
        segment.unlink()
    assert Store(tmp_path / "s").missing_blocks
    assert collect(make(), dataset, tmp_path / "s", segment_bytes=1, **kept).digest() == digest
    anew = collect(make(), dataset, tmp_path / "anew", segment_bytes=1)
    assert anew.digest() == digest


def test_a_second_shape_is_refused_until_its_noise_is_settled(tmp_path):
    message = r"'e0' is \[2, 4, 4\], 'e1' \[2, 6, 3\].*noise\.shapes=field"
    with pytest.raises(DminError, match=message):
        collect(make(SharedNoise()), mixed(), tmp_path / "s")
    assert not list((tmp_path / "s").glob("segment-*"))
    # Encodings that are there already do not hide it.
    collect(make(), mixed(), tmp_path / "a", encodings=tmp_path / "e", keep_encodings=True)
    with pytest.raises(DminError, match=message):
        collect(make(SharedNoise()), mixed(), tmp_path / "s", encodings=tmp_path / "e")
    squares = Examples([e for e in mixed().examples if e.image.shape[1:] == (8, 8)])
    assert len(collect(make(SharedNoise()), squares, tmp_path / "t")) == len(squares)


def test_the_size_of_the_microbatch_is_found_on_one_shape(tmp_path):
    store = collect(make(microbatch="auto"), mixed(), tmp_path / "auto", dtype="float32")
    fixed = collect(make(), mixed(), tmp_path / "fixed", dtype="float32")
    np.testing.assert_allclose(store.features("loss"), fixed.features("loss"), atol=1e-5)


def test_the_doctor_takes_examples_of_one_shape():
    found = diagnose(make(), mixed(), trainer=predict_trainer(accelerator="cpu"))
    assert found.passed and found.cost.examples == 13


def test_a_folder_in_buckets(tmp_path):
    sizes = [(60, 40), (40, 60), (50, 50), (61, 40), (200, 10)]
    for number, (width, height) in enumerate(sizes):
        Image.new("L", (width, height), 50 * number).save(tmp_path / f"{number}.png")
    dataset = ImageFolder(tmp_path, size=32, aspect="buckets", bucket_step=8, mode="L", label=None)
    shapes = [tuple(example.image.shape[1:]) for example in dataset]
    assert shapes == [(24, 40), (40, 24), (32, 32), (24, 40), (16, 64)]
    labelled = Examples([Example(e.id, e.image, 0, None, {}, e.sizes) for e in dataset])
    store = collect(make(), labelled, tmp_path / "s")
    assert store.ids == [f"{n}.png" for n in range(5)]
    square = ImageFolder(tmp_path, size=32, mode="L", label=None)
    assert square.describe() != dataset.describe() and "aspect" not in square.describe()


def test_an_image_that_does_not_fit_is_refused_before_the_first_block(tmp_path):
    for number in range(13):
        size = (8, 8) if number < 11 else (6, 12)
        Image.new("L", size, 20 * number).save(tmp_path / f"{number:02}.png")
    rows = [{"file_name": f"{number:02}.png", "label": 1} for number in range(13)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = ImageFolder(tmp_path, mode="L")
    assert one_of_each_shape(folder) == [0, 11]
    assert one_of_each_shape(ImageFolder(tmp_path, mode="L", size=8)) == []
    together = Together({"a": Subset(folder, ids=["11.png", "12.png"]), "b": folder})
    assert one_of_each_shape(together) == [0, 2]
    with pytest.raises(DminError, match=r"several shapes: '00\.png' is .*'11\.png'"):
        collect(make(SharedNoise()), folder, tmp_path / "s", segment_bytes=1)
    assert not list((tmp_path / "s").glob("segment*"))
    assert not list(tmp_path.glob("s.encodings/*/block*"))
