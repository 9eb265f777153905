"""Every YAML composes, validates against what it names, and builds."""

import functools
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import examples_on_disk as on_disk
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from models import tiny_flows, tiny_pairs  # noqa: F401  (add their builders)
from models.tiny import BUILDERS, save
from omegaconf import OmegaConf

from dmin.attribution import Method
from dmin.attribution.curvature.curvature import MEMORY, PASSES
from dmin.attribution.search.index import Index
from dmin.cli.config.groups import config_directory, groups
from dmin.cli.config.validate import validate
from dmin.cli.workspace.built import build_queries
from dmin.collect import CollectOptions, GradientCollector
from dmin.data import Example
from dmin.diffusion.noise import Noise
from dmin.diffusion.timesteps import Schedule
from dmin.gradients.parameters import Parameter, Parameters
from dmin.models import DiffusionModel
from dmin.models.toy.mlp import MLP
from dmin.queries import Generated, Planted
from dmin.runtime.errors import DminError

CONF = config_directory()
CHOICES = [(group, name) for group, names in groups().items() for name in names]
OF_SHAPES = [
    *(("benchmark", name) for name in ("shapes", "shapes_retrained", "captioned", "lora")),
    *(("train", name) for name in ("shapes_unet", "shapes_mmdit")),
]
# What a choice cannot know by itself.
VALUES = {
    ("model", "ddpm"): ["model.path={ddpm_path}"],
    ("model", "mlp"): ["model.path={mlp_path}"],
    ("model", "auto"): ["model.path={stable_diffusion}"],
    **{("model", family): [f"model.path={{{family}}}"] for family in BUILDERS},
    ("data", "image_folder"): ["data.root={images}"],
    ("data", "video_folder"): ["data.root={clips}"],
    ("queries", "clips"): ["queries.root={clips}"],
    ("data", "training_folder"): ["data.root={images}", "data.captions.missing=empty"],
    ("data", "masked_folder"): [
        "data.root={images}",
        "data.captions.missing=empty",
        "data.masks.suffix=.png",
    ],
    ("data", "drawn_folder"): ["data.root={images}", "data.captions.missing=empty"],
    ("data", "training_run"): ["+data@data.datasets.some=digits"],
    ("data", "hf_dataset"): ["data.path={table}"],
    ("data", "webdataset"): ["data.shards='{shards}'"],
    ("data", "subset"): ["data@data.dataset=digits", "data.count=2"],
    ("queries", "images"): ["queries.root={images}"],
    ("benchmark", "dmin_paper"): ["queries.root={images}"],
    ("queries", "generated"): ["queries.prompts=[0,1]"],
    ("method", "encoder"): ["method.path=clip"],
    ("timesteps", "explicit"): ["timesteps.values=[500]"],
    ("shard", "slurm_array"): ["shard.id=3", "shard.num=4"],
    ("shard", "slurm_task"): ["shard.id=3", "shard.num=4"],
}


@pytest.fixture(scope="module")
def places(ddpm_path, tmp_path_factory):
    from dmin.data.image_folder import save_images

    images = tmp_path_factory.mktemp("images")
    mlp_path = tmp_path_factory.mktemp("mlp") / "model"
    MLP.small(width=8, depth=1, embedding=4).save_pretrained(mlp_path)
    save_images(images, torch.rand(2, 1, 8, 8), ["a.png", "b.png"], [{"label": 0}, {"label": 1}])
    tiny = {name: save(name, tmp_path_factory.mktemp(name) / "model") for name in BUILDERS}
    shards = on_disk.write_shards(tmp_path_factory.mktemp("shards"))
    table = tmp_path_factory.mktemp("table")
    if find_spec("datasets"):
        on_disk.write_table(table)
    return {
        "ddpm_path": ddpm_path,
        "mlp_path": mlp_path,
        "images": images,
        "clips": on_disk.write_clips(tmp_path_factory.mktemp("clips")),
        "shards": shards,
        "table": table,
        **tiny,
    }


def composed(group, name, places):
    shapes = {"data": "shapes"} if (group, name) in OF_SHAPES else {}
    captions = {"model": "stable_diffusion_3"} if name in ("captioned", "lora") else {}
    needed = {"model": "ddpm", "data": "digits", **shapes, **captions}
    values = [v.format(**places) for v in VALUES.get((group, name), [])]
    if group == "experiment":
        overrides = [f"experiment={name}"]
    elif group == "debug":
        overrides = ["experiment=digits", f"debug={name}"]
    else:
        overrides = [f"{g}={n}" for g, n in {**needed, group: name}.items()]
    if group == "hydra/launcher":
        pytest.importorskip({"parallel": "joblib"}.get(name, "submitit"))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("dmin", [*overrides, *values], return_hydra_config=True)


def plain(cfg):
    from omegaconf import open_dict

    with open_dict(cfg):
        cfg.name, cfg.paths.outputs = "test", "outputs"
        del cfg.hydra
    return cfg


def on_its_own(node):
    """What points to other groups is resolved; a missing argument is refused all the same."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


@pytest.mark.parametrize(("group", "name"), CHOICES, ids="/".join)
def test_it_composes_and_fits_the_signature_of_its_target(group, name, places):
    cfg = plain(composed(group, name, places))
    if group in ("experiment", "debug"):
        validate(cfg)
        return
    if group.startswith("hydra/"):
        return  # Hydra holds it to its own schema
    assert cfg[group] is not None
    validate(OmegaConf.create({group: on_its_own(cfg[group])}))


def check_model(model):
    assert isinstance(model, DiffusionModel)


def check_data(dataset):
    assert len(dataset) > 0 and isinstance(dataset[0], Example)


def check_queries(queries):
    if not isinstance(queries, Generated | Planted):
        check_data(queries)


def check_sketch(sketch):
    bound = sketch.bind(Parameters((Parameter("w", (64, 128)),)))
    assert bound.of({"w": torch.randn(3, 64, 128)}).shape == (3, 1, bound.dim)


def check_timesteps(schedule):
    assert isinstance(schedule, Schedule)
    bound = schedule.bind(lambda timesteps: [5 - t / 100 for t in timesteps])
    chosen = bound(range(999, -1, -1))
    assert list(chosen) == sorted(chosen, reverse=True)


def check_noise(noise):
    assert isinstance(noise, Noise) and noise((1, 2, 2), 10).shape == (1, 2, 2)


def check_method(method):
    assert isinstance(method, Method) and method.name


def check_index(index):
    assert isinstance(index, Index)


def check_trainer(trainer):
    assert trainer.predict_loop.inference_mode is False


def check_shard(shard):
    assert 0 <= shard["id"] < shard["num"]


def check_logger(logger):
    assert isinstance(logger, functools.partial)


def check_train(function):
    assert isinstance(function, functools.partial)
    assert isinstance(function.keywords["model"](), DiffusionModel)


def check_benchmark(benchmark):
    assert benchmark.tasks and (benchmark.methods == "all" or "random" in benchmark.methods)


@pytest.mark.parametrize(
    ("group", "name"),
    [c for c in CHOICES if c[0] not in ("experiment", "debug")],
    ids="/".join,
)
def test_it_builds_what_its_group_promises(group, name, places):
    if (group, name) == ("trainer", "gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if (group, name) == ("data", "hf_dataset"):
        pytest.importorskip("datasets")
    cfg = composed(group, name, places)
    node = cfg.hydra.launcher if group == "hydra/launcher" else plain(cfg)[group]
    check = globals()[f"check_{group.replace('/', '_')}"]
    check(instantiate(node, _convert_="all"))


def check_hydra_launcher(launcher):
    from hydra.plugins.launcher import Launcher

    assert isinstance(launcher, Launcher)


def test_every_group_has_a_check():
    assert {group.replace("/", "_") for group in groups()} - {"experiment", "debug"} == {
        name.removeprefix("check_") for name in globals() if name.startswith("check_")
    }


def test_a_default_of_the_command_line_is_that_of_the_library():
    code = {**signature(CollectOptions).parameters, **signature(GradientCollector).parameters}
    said = {**yaml.safe_load((CONF / "dmin.yaml").read_text())["collect"], "readouts": ("loss",)}
    both = code.keys() & said.keys()
    assert len(both) > 12 and {n: code[n].default for n in both} == {n: said[n] for n in both}
    for file in CONF.glob("method/*.yaml"):
        method = yaml.safe_load(file.read_text())
        assert method.get("memory", MEMORY) == MEMORY and method.get("passes", PASSES) == PASSES


def test_every_yaml_says_what_it_is():
    for path in Path(CONF).rglob("*.yaml"):
        assert path.read_text().startswith("#"), path


def test_query_images_are_read_as_the_training_images(places):
    data = ["data=image_folder", f"data.root={places['images']}", "data.size=4", "data.mode=L"]
    asked = ["model=ddpm", *data, "queries=images"]
    folder = f"queries.root={places['images']}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        same, own, nowhere = (
            compose("dmin", [*asked, *more]).queries
            for more in ([folder], [folder, "queries.size=6"], ["queries.root=away"])
        )
    assert build_queries(same)[0].image.shape == (1, 4, 4)
    assert build_queries(own)[0].image.shape == (1, 6, 6)
    with pytest.raises(DminError, match=r"^queries\.root=away: this file does not exist"):
        build_queries(nowhere)
