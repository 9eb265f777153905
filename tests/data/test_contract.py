"""What every dataset of conf/data promises."""

import importlib.util
import json
import pickle

import examples_on_disk as on_disk
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dmin.cli.config.groups import config_directory, groups
from dmin.data import Example, Examples, collate, describe_dataset
from dmin.data.module import CollectData
from dmin.runtime.errors import DminError

WRITE = {
    "image_folder": on_disk.write_folder,
    "video_folder": on_disk.write_clips,
    "webdataset": on_disk.write_shards,
    "hf_dataset": on_disk.write_table,
}
# Their captions stand in files of their own.
FOLDERS = dict.fromkeys(("masked_folder", "drawn_folder", "training_folder"), on_disk.write_folder)
# What a choice cannot know by itself, and what keeps it small.
VALUES = {
    "image_folder": ["data.root={place}"],
    "video_folder": ["data.root={place}"],
    "webdataset": ["data.shards='{place}'"],
    "hf_dataset": ["data.path={place}", "data.text=text", "data.label=label"],
    "training_folder": ["data.root={place}", "data.captions.missing=empty"],
    "drawn_folder": ["data.root={place}", "data.captions.missing=empty", "data.draws.flip=0.5"],
    "masked_folder": [
        "data.root={place}",
        "data.captions.missing=empty",
        "data.masks.suffix=.png",  # each picture is its own mask
    ],
    "training_run": ["+data@data.datasets.some=digits"],
    "shapes": ["data.examples=7"],
    "subset": ["data@data.dataset=digits", "data.count=7"],
}
CHOICES = groups()["data"]


def build(name, place=None):
    if name == "hf_dataset" and importlib.util.find_spec("datasets") is None:
        pytest.skip("needs the extra data")
    values = [value.format(place=place) for value in VALUES.get(name, [])]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("dmin", ["model=ddpm", f"data={name}", *values])
    return instantiate(cfg.data, _convert_="all")


@pytest.fixture(params=CHOICES)
def make(request, tmp_path):
    """A function that builds the dataset anew each time."""
    if request.param == "hf_dataset":
        pytest.importorskip("datasets")
    write = (WRITE | FOLDERS).get(request.param)
    place = write(tmp_path / "place") if write else None
    return lambda: build(request.param, place)


def everything(dataset):
    return [dataset[index] for index in range(len(dataset))]


def assert_same(ours, theirs):
    assert [e.id for e in ours] == [e.id for e in theirs]
    assert [e.describe() for e in ours] == [e.describe() for e in theirs]
    assert all(torch.equal(a.image, b.image) for a, b in zip(ours, theirs, strict=True))


def test_examples_are_as_promised(make):
    examples = everything(make())
    assert len(examples) > 0 and all(isinstance(e, Example) for e in examples)
    assert len({e.id for e in examples}) == len(examples)
    assert len(collate(examples)["id"]) == len(examples)  # checks dtype, range and shape
    assert all(e.image.shape[0] in (1, 3) for e in examples)
    assert all(isinstance(e.label, int | str | None) for e in examples)
    assert all(isinstance(e.caption, str | None) for e in examples)
    json.dumps([e.describe() for e in examples], allow_nan=False)


def test_a_second_construction_and_a_pickled_copy_hold_the_same(make):
    first = make()
    assert_same(everything(first), everything(make()))
    assert_same(everything(first), everything(pickle.loads(pickle.dumps(first))))


def test_ids_are_listed_as_they_are(make):
    dataset = make()
    if hasattr(dataset, "ids"):
        assert list(dataset.ids) == [e.id for e in everything(dataset)]


def test_describing_is_deterministic_and_json(make):
    described = describe_dataset(make())
    assert described == describe_dataset(make()) == json.loads(json.dumps(described))
    assert described["examples"] == len(make())


def test_examples_do_not_depend_on_the_order_of_reading(make):
    dataset = make()
    backwards = [dataset[index] for index in reversed(range(len(dataset)))]
    assert_same(backwards[::-1], everything(dataset))


def test_worker_processes_give_the_same_batches(make):
    dataset = make()
    blocks = list(range(-(-len(dataset) // 3)))
    alone = list(CollectData(dataset, blocks, 3).predict_dataloader())
    shared = list(CollectData(dataset, blocks, 3, workers=2).predict_dataloader())
    for (ours,), (theirs,) in zip(alone, shared, strict=True):
        draws = zip(ours.pop("drawn", []), theirs.pop("drawn", []), strict=True)
        for one, other in [(ours, theirs), *draws]:
            for name in {"image", "mask"} & one.keys():
                assert torch.equal(one.pop(name), other.pop(name))
            assert one == other


@pytest.mark.parametrize("change", on_disk.CHANGES)
@pytest.mark.parametrize("name", WRITE)
def test_the_description_tells_any_change(name, change, tmp_path):
    if name == "hf_dataset":
        pytest.importorskip("datasets")
    before = describe_dataset(build(name, WRITE[name](tmp_path / "before")))
    after = describe_dataset(build(name, WRITE[name](tmp_path / "after", change)))
    assert before != after


@pytest.mark.parametrize("name", WRITE)
def test_the_description_is_of_the_content_not_of_the_place(name, tmp_path):
    if name == "hf_dataset":
        pytest.importorskip("datasets")
    here, there = WRITE[name](tmp_path / "here"), WRITE[name](tmp_path / "there")
    assert describe_dataset(build(name, here)) == describe_dataset(build(name, there))


def test_the_description_of_examples_in_memory_tells_any_change():
    def described(change=None):
        rows = on_disk.rows(change)
        return describe_dataset(
            Examples(
                [
                    Example(str(n), torch.from_numpy(pixels).permute(2, 0, 1) / 255, label, caption)
                    for n, (pixels, label, caption) in enumerate(rows)
                ]
            )
        )

    found = {json.dumps(described(change)) for change in (None, *on_disk.CHANGES)}
    assert len(found) == 1 + len(on_disk.CHANGES)
    assert described() == described()


class Twice:
    """Two examples of one id."""

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.reads = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.reads += 1
        return Example("same", torch.zeros(1, 2, 2))


@pytest.mark.parametrize(
    "attributes", [{}, {"describe": dict}, {"describe": dict, "ids": ["same", "same"]}]
)
def test_two_examples_of_one_id_are_refused(attributes):
    dataset = Twice(**attributes)
    with pytest.raises(DminError, match="two examples have the id 'same'"):
        describe_dataset(dataset)
    assert (dataset.reads == 0) == ("ids" in attributes)


def test_an_id_that_is_no_text_is_refused():
    with pytest.raises(DminError, match="the id 3; ids are text"):
        describe_dataset(Examples([Example(3, torch.zeros(1, 2, 2))]))


def test_an_empty_dataset_is_refused():
    with pytest.raises(DminError, match="Examples is empty"):
        describe_dataset(Examples([]))


def test_describing_keeps_one_example_at_a_time():
    alive = []

    class Counted(Examples):
        def __getitem__(self, index):
            import weakref

            image = torch.zeros(1, 2, 2)
            alive[:] = [reference for reference in alive if reference() is not None]
            alive.append(weakref.ref(image))
            assert len(alive) <= 2
            return Example(str(index), image)

    describe_dataset(Counted([None] * 20))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 2), r"float32 \(2, 2\); expected float32 \[C, H, W\], or \[C, F, H, W\]"),
        (torch.zeros(1, 2, 2, dtype=torch.float64), "float64"),
        (torch.full((1, 2, 2), torch.nan), "NaN"),
        (torch.full((1, 2, 2), 2.0), "from 2 to 2"),
        (torch.zeros(3, 2, 2), r"'bad' is \(3, 2, 2\), but 'good' is \(1, 2, 2\)"),
    ],
)
def test_an_image_that_would_spoil_a_batch_is_named(image, message):
    good = Example("good", torch.zeros(1, 2, 2))
    with pytest.raises(DminError, match=message) as error:
        collate([good, Example("bad", image)])
    assert "'bad'" in str(error.value)
