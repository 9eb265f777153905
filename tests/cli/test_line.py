"""The words of a command line: a store that keeps its settings, pictures, options."""

import errno
import json

import pytest
import yaml
from cli.test_trust import BUILT, MKDIR
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from dmin.cli.config import store_settings
from dmin.cli.config.groups import config_directory
from dmin.cli.config.line import parse, register
from dmin.cli.workspace.built import build
from dmin.runtime.errors import DminError, DminWarning

LINE = ["model=ddpm", "data=image_folder", "sketch.dim=512", "collect.block_size=7", "name=cats"]


def composed(line):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose(register(line), overrides=line.settings)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a model, photos, a picture, and a store that keeps what it was made with."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/ddpm", "photos", "stores/cats"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "stores/cats/manifest.json").write_text("{}")
    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    line = parse("collect", [*LINE, "model.path=models/ddpm", "data.root=photos"])
    store_settings.keep(composed(line), tmp_path / "stores/cats")
    return tmp_path


def groups(cfg):
    return {name: OmegaConf.to_container(cfg[name]) for name in store_settings.GROUPS}


def test_a_store_alone_composes_what_it_was_collected_with(there):
    cfg = composed(parse("retrieve", ["stores/cats", "cat.png", "--prompt", "a ${red} fox"]))
    plain = composed(parse("retrieve", [*LINE, "model.path=models/ddpm", "data.root=photos"]))
    assert groups(cfg) == groups(plain)
    assert cfg.collect.block_size == 7 and cfg.name == "cats"
    assert cfg.collect.path == "stores/cats" and cfg.method == plain.method
    assert cfg.queries.root == "cat.png" and cfg.queries.prompt == "a ${red} fox"


def test_what_is_said_on_the_line_wins(there):
    said = ["sketch=oporp", "sketch.seed=3", "model.ema=ema", "method=blend", "retrieve.k=3"]
    cfg = composed(parse("retrieve", [*said, "stores/cats", "cat.png"]))
    plain = composed(
        parse("retrieve", [*LINE[:2], "model.path=models/ddpm", "data.root=photos", *said])
    )
    assert groups(cfg) == groups(plain) and cfg.method == plain.method and cfg.retrieve.k == 3


def test_a_store_is_used_from_any_folder_and_after_it_moved_with_its_tree(there, monkeypatch):
    away = there / "away"
    away.mkdir()
    for name in ("models", "photos", "stores"):
        (there / name).rename(away / name)
    monkeypatch.chdir(away / "photos")
    cfg = composed(parse("doctor", ["../stores/cats"]))
    assert cfg.model.path == "../models/ddpm" and cfg.data.root == "."
    (away / "models").rename(there / "models")
    with pytest.raises(DminError, match="--model PATH"):
        parse("doctor", ["../stores/cats"])
    cfg = composed(parse("doctor", ["../stores/cats", "--model=../../models/ddpm"]))
    assert cfg.model.path == "../../models/ddpm" and cfg.model._target_.startswith("dmin.")


def test_a_store_of_before_there_were_layouts_is_of_the_images_it_was(there):
    for name in ("a/1.png", "a/masks/1.png"):
        (there / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(there / "photos" / name)
    (there / "photos/a/1.txt").write_text("a caption that nobody read")
    (there / "photos/2.tga").write_bytes((there / "photos/a/1.png").read_bytes())
    file = there / "stores/cats/settings.yaml"
    today = build(composed(parse("doctor", ["stores/cats"])).data)
    assert [today.facts(i).caption for i in range(len(today))] == [
        None,
        "a caption that nobody read",
    ]
    file.write_text(file.read_text().replace("  layout: auto\n", ""))
    then = build(composed(parse("doctor", ["stores/cats"])).data)
    assert then.ids == ["a/1.png", "a/masks/1.png"]
    assert [then.facts(i)[:2] for i in (0, 1)] == [("a", None), ("a/masks", None)]


def test_stores_made_of_another_keep_its_settings(there):
    (there / "deep/inside").mkdir(parents=True)
    (there / "deep/inside/manifest.json").write_text("{}")
    store_settings.follow(there / "stores/cats", there / "deep/inside", {"sketch.dim": 256})
    cfg = composed(parse("outliers", ["deep/inside"]))
    assert cfg.model.path == "models/ddpm" and cfg.data.root == "photos" and cfg.sketch.dim == 256


def test_a_part_is_asked_for_by_a_limit(there):
    assert composed(parse("collect", ["--limit", "5", *LINE])).collect.limit == 5
    cfg = composed(parse("retrieve", ["stores/cats", "--limit=5"]))
    assert cfg.collect.limit == 5 and cfg.collect.block_size == 7
    for command, word in (("collect", "few"), ("train", "5"), ("demo", "5")):
        with pytest.raises(DminError, match="limit"):
            parse(command, ["--limit", word, *LINE])


def test_a_store_that_nobody_may_write_to_keeps_what_it_has(there, monkeypatch):
    def full(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store_settings, "commit", full)
    cfg = composed(parse("collect", LINE))
    store_settings.keep(cfg, there / "stores/cats")  # what it has already is not written again
    (there / "stores/cats/settings.yaml").unlink()
    with pytest.warns(DminWarning, match="Read-only file system"):
        store_settings.keep(cfg, there / "stores/cats")


def test_prompts_alone_are_generated(there):
    for command in ("sample", "retrieve"):
        cfg = composed(parse(command, ["stores/cats", "--prompt", "a fox", "--prompt=3"]))
        assert cfg.queries._target_ == "dmin.queries.Generated"
        assert cfg.queries.prompts == ["a fox", 3]


def test_a_concept_is_asked_about_by_two_prompts(there):
    words = ["stores/cats", "--concept=a red fox"]
    cfg = composed(parse("retrieve", [*words, "--without=a fox"]))
    assert cfg.queries.prompts == ["a red fox"] and cfg.model.query_without == "a fox"
    for wrong in ([], ["--without=a red fox"], ["--without=a fox", "--prompt=a cat"]):
        with pytest.raises(DminError, match="two different prompts"):
            parse("retrieve", [*words, *wrong])


def test_a_part_of_a_picture_is_asked_about(there):
    asked = composed(parse("retrieve", ["stores/cats", "cat.png", "--region", "0,0.5,1,.5"]))
    assert asked.queries.region == [0, 0.5, 1, 0.5]
    asked = composed(parse("retrieve", ["stores/cats", "cat.png", "--mask=${x}.png"]))
    assert asked.queries.mask == "${x}.png"
    asked = composed(parse("retrieve", ["stores/cats", "cat.png", "--against=those"]))
    assert asked.queries.against == "those" and asked.queries.region is None
    asked = composed(parse("retrieve", ["stores/cats", "cat.png", "--timesteps=300,99.5"]))
    assert asked.retrieve.timesteps == [300, 99.5]
    for words, told in (
        (["stores/cats", "cat.png", "--timesteps=300,early"], "some of the store's"),
        (["stores/cats", "--region=0,0,4,4"], "need a picture"),
        (["stores/cats", "--against=those"], "need a picture"),
        (["stores/cats", "cat.png", "--region=left"], "four numbers"),
    ):
        with pytest.raises(DminError, match=told):
            parse("retrieve", words)
    with pytest.raises(DminError, match="an option of `dmin retrieve`"):
        parse("collect", ["--mask=cat.png", *LINE])


def test_several_pictures_have_one_prompt_or_one_each(there):
    words = ["stores/cats", "cat.png", "dog.png"]
    cfg = composed(parse("retrieve", [*words, "--prompt=a cat", "--prompt=a dog"]))
    assert cfg.queries.root == ["cat.png", "dog.png"] and cfg.queries.prompt == ["a cat", "a dog"]
    with pytest.raises(DminError, match="3 times for 2 pictures"):
        parse("retrieve", [*words, "--prompt=a", "--prompt=b", "--prompt=c"])


def test_another_process_of_the_job_composes_the_same(there):
    words = ["--model=models/ddpm", "stores/cats", "./cat.png", "--prompt=a = b", "-m", "seed=1,2"]
    line = parse("retrieve", words)
    assert line.settings == ["-m", "seed=1,2"]
    assert parse("retrieve", [*line.words, *line.settings]) == line


def test_plain_settings_are_left_to_hydra(there):
    words = [
        "model=ddpm",
        "~queries",
        "+a.b=1",
        "++c=2",
        "-m",
        "--config-dir",
        "mine",
        "hydra/launcher=slurm",
    ]
    assert parse("collect", words)[:3] == ([], words, None)


@pytest.mark.parametrize(
    "command, words, named",
    [
        ("retrieve", ["cat.png"], "dmin retrieve STORE cat.png"),
        ("retrieve", ["stores/cats", "cut.png"], "cut.png: there is no such file"),
        ("retrieve", ["stores/cats", "stores/cats/"], "Give one of them"),
        ("collect", ["photos", "cat.png"], "photos: it is not a store"),
        ("doctor", ["photos"], "it is not a store"),
        ("train", ["stores/cats"], "takes settings"),
        ("evaluate", ["stores/cats", "--prompt=a"], "--prompt"),
        ("retrieve", ["stores/cats", "experiment=digits"], "experiment=digits"),
        ("retrieve", ["stores/cats", "--config-name", "mine"], "--config-name"),
        ("retrieve", ["stores/cats", "--prompt"], "prompt: expected one argument"),
    ],
)
def test_other_words_are_refused_in_a_sentence(there, command, words, named):
    with pytest.raises(DminError, match=named) as error:
        parse(command, words)
    assert "\n" not in str(error.value)


def test_a_new_store_is_named_by_collect(there):
    assert composed(parse("collect", ["stores/new", *LINE])).collect.path == "stores/new"


def test_a_store_of_an_earlier_release_says_what_to_do(there):
    (there / "stores/cats/settings.yaml").unlink()
    with pytest.raises(DminError, match=r"keeps no settings.*dmin collect"):
        parse("retrieve", ["stores/cats", "cat.png"])
    cfg = composed(parse("retrieve", ["stores/cats", "cat.png", *LINE]))
    assert cfg.collect.path == "stores/cats"


def change(store, **changes):
    file = store / "settings.yaml"
    file.write_text(json.dumps(yaml.safe_load(file.read_text()) | changes))


FOREIGN = {name: value for name, (place, value) in BUILT.items() if isinstance(value, dict)}


@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN)
def test_a_store_from_elsewhere_builds_only_what_is_listed(there, value):
    change(there / "stores/cats", data=value, paths=["model.path"])
    with pytest.raises(DminError, match="--trust"):
        parse("retrieve", ["stores/cats", "cat.png"])
    composed(parse("retrieve", ["stores/cats", "cat.png", "data=digits"]))  # a choice of one's own


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"paths": ["model"]},
        {"paths": ["collect.nothing"]},
        {"model": None},
        {"hydra": {"run": {"dir": "/"}}},
        {"trainer": MKDIR},
        {"collect": {"path": "/etc"}},
    ],
)
def test_settings_that_no_store_keeps_are_refused(there, changes):
    change(there / "stores/cats", **changes)
    with pytest.raises(DminError):
        parse("retrieve", ["stores/cats", "cat.png", "--trust"])


def test_trust_takes_code_of_ones_own(there):
    change(there / "stores/cats", data=MKDIR, paths=[])
    assert composed(parse("retrieve", ["stores/cats", "cat.png", "--trust"])).data == MKDIR


def test_what_is_asked_about_clips_are_clips(there):
    (there / "a.mp4").write_bytes(b"")
    some = ["model=ddpm", "model.path=models/ddpm", "data=video_folder", "data.root=photos"]
    cfg = composed(parse("retrieve", ["a.mp4", *some]))
    assert cfg.queries._target_ == "dmin.data.video.Clips" and cfg.queries.root == "a.mp4"
