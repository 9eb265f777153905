"""Runs of every trainer: what is taken, approximated and refused, before anything is loaded."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from runs import documented
from runs.tiny import header_only, images, picture, pipeline_index, predicts

from dmin.cli.workspace.built import build
from dmin.runs import wording as say
from dmin.runs.recognise import read_run
from dmin.runtime.errors import DminError

ONETRAINER = {
    "__version": 11, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "base/sd", "workspace_dir": "ws", "concept_file_name": "concepts.json",
    "output_model_destination": "out/mug.safetensors", "output_model_format": "KOHYA_LORA",
    "peft_type": "LORA", "lora_rank": 4, "lora_alpha": 2.0, "resolution": "128,256",
    "masked_training": True, "unmasked_weight": 0.1, "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0, "text_encoder": {"__version": 0, "train": False},
    "concepts": [
        {"__version": 2, "name": "mugs", "path": "img/mugs", "type": "STANDARD",
         "include_subdirectories": True, "balancing": 2.5, "balancing_strategy": "REPEATS",
         "image": {"enable_crop_jitter": False, "enable_random_flip": True},
         "text": {"prompt_source": "sample", "enable_tag_shuffling": True}},
        {"__version": 2, "path": "img/plain", "balancing": 3, "balancing_strategy": "SAMPLES",
         "text": {"prompt_source": "filename"},
         "image": {"enable_resolution_override": True, "resolution_override": "128x192"}},
        {"path": "img/val", "type": "VALIDATION"},
        {"path": "img/plain", "type": "PRIOR_PREDICTION", "enabled": False},
    ],
}  # fmt: skip

AI_TOOLKIT = {
    "job": "extension",
    "config": {"name": "mug", "process": [{
        "type": "sd_trainer", "training_folder": "out", "trigger_word": "zqx",
        "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
        "save": {"dtype": "float16", "save_every": 50},
        "datasets": [
            {"folder_path": "img/mugs", "caption_ext": "txt", "default_caption": "[trigger] mug",
             "resolution": [64, 96], "num_repeats": 2, "mask_path": "img/mugs_mask",
             "mask_min_value": 0.1, "caption_dropout_rate": 0.05},
            {"folder_path": "img/plain", "is_reg": False, "resolution": 32, "square_crop": True,
             "caption_dropout_rate": 0.05, "flip_x": True},
        ],
        "train": {"steps": 100, "batch_size": 1, "noise_scheduler": "flowmatch", "lr": "1e-4",
                  "timestep_type": "sigmoid", "optimizer": "adamw8bit", "dtype": "bf16"},
        "model": {"name_or_path": "base/flux", "arch": "flux:dev"},
    }]},
}  # fmt: skip

UINT3 = {
    **AI_TOOLKIT["config"]["process"][0]["model"],
    **{"quantize": True, "qtype": "uint3|other/adapter"},
}

SIMPLE_TUNER = {
    "--model_family": "flux", "--model_type": "lora", "--lora_type": "standard", "--lora_rank": 4,
    "--pretrained_model_name_or_path": "base/flux", "--data_backend_config": "backends.json",
    "--output_dir": "out", "--resolution": 64, "--resolution_type": "pixel", "--lora_alpha": "8",
    "--flow_schedule_shift": 3, "--caption_dropout_probability": "0.1", "--seed": 7,
}  # fmt: skip
BACKENDS = [
    {"id": "mugs", "type": "local", "instance_data_dir": "img/mugs", "caption_strategy": "textfile",
     "crop": True, "crop_style": "center", "crop_aspect": "square", "repeats": 2,
     "cache_dir_vae": "cache/vae", "conditioning_data": "masks", "aspect_bucket_alignment": 32},
    {"id": "masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
     "source_dataset_id": "mugs", "instance_data_dir": "img/mugs_mask"},
    {"id": "named", "type": "local", "instance_data_dir": "img/plain", "probability": 0.5,
     "caption_strategy": "instanceprompt", "instance_prompt": ["zqx mug", "mug"]},
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True},
]  # fmt: skip

PIPE = {
    "output_dir": "runs", "dataset": "dp_data.toml", "epochs": 3, "save_every_n_epochs": 1,
    "micro_batch_size_per_gpu": 1, "adapter": {"type": "lora", "rank": 4},
    "model": {"type": "sdxl", "checkpoint_path": "base/sdxl", "dtype": "float32",
              "min_snr_gamma": 5, "v_pred": False, "min_t": 0.0},
    "optimizer": {"type": "adamw_optimi", "lr": 2e-5},
}  # fmt: skip
PIPE_DATA = {
    "resolutions": [64, [128, 72]], "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0,
    "num_ar_buckets": 3, "caption_prefix": "zqx, ", "frame_buckets": [1],
    "directory": [
        {"path": "img/mugs", "mask_path": "img/mugs_mask", "num_repeats": 2.5},
        {"path": "img/plain", "skip_empty_caption": False, "size_buckets": [[96, 32, 1]]},
    ],
}  # fmt: skip

SCRIPT = {
    "pretrained_model_name_or_path": "base/flux", "instance_data_dir": "img/plain", "rank": 4,
    "instance_prompt": "zqx mug", "output_dir": "out", "resolution": "32", "center_crop": False,
    "random_flip": True, "guidance_scale": 1.0, "weighting_scheme": "sigma_sqrt", "seed": 0,
    "caption_column": None, "with_prior_preservation": False, "repeats": 2, "learning_rate": "1e-4",
}  # fmt: skip

# Trainer → its config, the model's settings, randomness, and (id, caption, repeats, height, width).
RUNS = {
    "onetrainer": (
        {"run.json": ONETRAINER},
        {"path": "base/sd", "snr_gamma": 5.0},
        {"enable_random_flip", "enable_tag_shuffling", "resolution", "enable_crop_jitter"}
        | {"prompt_source"},
        [
            *(
                (f"mugs@{size}/{name}", caption, 1.25, *shape)
                for size, tall in ((128, (192, 128)), (256, (384, 192)))
                for name, caption, shape in (
                    ("_controls/a.png", "", (size, size)),
                    ("a.png", "a mug, red", tall),
                    ("b.JPG", "", (size, size)),
                    ("c.png", "", (size, size)),
                    ("deep/d.png", "d", (size, size)),
                )
            ),
            ("plain/e.png", "e", 3.0, 192, 128),
        ],
    ),
    "ai_toolkit": (
        {"run.json": AI_TOOLKIT},
        {"path": "base/flux", "embedded_guidance": 1.0, "prompt_dropout": 0.05},
        {"mask_path", "timestep_type", "flip_x"},
        [
            *(
                (f"mugs@{size}/{name}", caption, 2, *shape)
                for size in (64, 96)
                for name, caption, shape in (
                    ("a-masklabel.png", "zqx mug", (64, 32)),
                    ("a.png", "zqx a mug,  red\na second line", (64, 32)),
                    ("b.JPG", "zqx mug", (32, 32)),
                    ("c.png", "zqx mug", (32, 32)),
                    ("deep/d.png", "zqx d", (32, 32)),
                )
            ),
            ("plain/e.png", "zqx ", 1.0, 32, 32),
        ],
    ),
}


RUNS["simple_tuner"] = (
    {"run.json": SIMPLE_TUNER, "backends.json": BACKENDS},
    {"path": "base/flux", "embedded_guidance": 1.0, "prompt_dropout": 0.1, "shift": 3.0},
    {"instance_prompt", "caption_strategy"},
    [
        *(
            (f"mugs/{name}", caption, 3.0, 64, 64)
            for name, caption in (
                ("_controls/a.png", "_controls/a"),
                ("a-masklabel.png", "a-masklabel"),
                ("a.png", "a mug, red"),
                ("b.JPG", "b"),
                ("c.png", ""),
                ("deep/d.png", "d"),
            )
        ),
        ("named/e.png", "zqx mug", 0.5, 64, 64),
    ],
)
RUNS["diffusion_pipe"] = (
    {"run.toml": PIPE, "dp_data.toml": PIPE_DATA},
    {"path": "base/sdxl", "snr_gamma": 5.0, "sizes_from": "cut"},
    {"type"},
    [  # images without a caption are left out
        ("mugs@64/a.png", "zqx, a mug, red\na second line", 2.5, 96, 48),
        ("mugs@64/c.png", "zqx, ", 2.5, 64, 64),
        ("mugs@96/a.png", "zqx, a mug, red\na second line", 2.5, 128, 64),
        ("mugs@96/c.png", "zqx, ", 2.5, 96, 96),
        ("plain/e.png", "zqx, ", 1.0, 32, 96),
    ],
)
RUNS["diffusers_scripts"] = (
    {"hparams.yml": SCRIPT},
    {"path": "base/flux", "embedded_guidance": 1.0, "weighting": "sigma_sqrt"},
    {"center_crop", "random_flip"},
    [("plain/e.png", "zqx mug", 2, 32, 32)],
)
MUSUBI = {"dit": "base/flux", "dataset_config": "sets.toml", "output_dir": "out",
          "output_name": "mug", "network_module": "networks.lora_flux_2"}  # fmt: skip
SETS = {
    "general": {"resolution": [32, 32], "caption_extension": ".txt", "enable_bucket": True},
    "datasets": [{"image_directory": "img/mugs", "num_repeats": 2, "batch_size": 1}],
}
RUNS["musubi"] = (
    {"run.toml": MUSUBI, "sets.toml": SETS},
    {"path": "base/flux", "shift": 1.0},
    set(),
    [
        ("mugs/a.png", "a mug, red\na second line", 2, 64, 16),
        ("mugs/c.png", "", 2, 32, 32),
    ],
)
SAID = {"musubi": {"family": "flux"}}  # none of its models is a family of dmin's own
WITHOUT_MASKS = ("diffusers_scripts", "musubi")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images()
    return tmp_path


def written(files):
    """Write a trainer's files; return the first."""
    for name, content in files.items():
        text = json.dumps(content)
        Path(name).write_text(as_toml(content) if name.endswith(".toml") else text)
    return Path(next(iter(files)))


def as_toml(value, top=True):
    if isinstance(value, dict):
        pairs = [f"{k} = {as_toml(v, False)}" for k, v in value.items() if v is not None]
        return "\n".join(pairs) if top else f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(as_toml(each, False) for each in value if each is not None)}]"
    return json.dumps(value).replace("Infinity", "inf")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_taken_as_it_was_trained(place, name):
    files, model, random, examples = RUNS[name]
    if name == "simple_tuner":  # which needs captions
        for image in ("a-masklabel", "b", "_controls/a"):
            Path(f"img/mugs/{image}.txt").write_text(image)
    run = read_run(written(files), said=SAID.get(name))
    assert model.items() <= run.model.items()
    assert {entry.key.rpartition(".")[2] for entry in run.random} == random
    assert run.model["adapter"].startswith(("out/", "runs/")) and run.unknown == []
    data = build(run.data)
    assert any(example.mask is not None for example in data) or name in WITHOUT_MASKS
    got = [(e.id, e.caption, e.repeats, *e.image.shape[1:]) for e in data]
    assert got == examples


# What of it draws are made of, and captions of one image in twenty draws.
DRAWN = {
    "onetrainer": (
        {"enable_random_flip", "enable_tag_shuffling", "enable_crop_jitter", "prompt_source"},
        ("mugs@128/a.png", {"a mug, red", "a second line"}),
    ),
    "ai_toolkit": ({"flip_x"}, ("plain/e.png", {"zqx "})),
    "simple_tuner": ({"instance_prompt", "caption_strategy"}, ("named/e.png", {"zqx mug", "mug"})),
    "diffusers_scripts": ({"center_crop", "random_flip"}, ("plain/e.png", {"zqx mug"})),
}


@pytest.mark.parametrize("name", RUNS)
def test_draws_are_of_what_the_trainer_drew(place, name):
    for image in ("a-masklabel", "b", "_controls/a") if name == "simple_tuner" else ():
        Path(f"img/mugs/{image}.txt").write_text(image)
    file, keys = written(RUNS[name][0]), DRAWN.get(name, (set(),))[0]
    run = read_run(file, draws=20, said=SAID.get(name))
    lines = run.lines()
    title = "  approximated: what was random in training is here 20 draws"
    assert (title in lines) == bool(keys)
    drawn = [entry.key for entry in run.random if entry.key in run.drawn]
    assert {key.rpartition(".")[2] for key in drawn} == keys
    assert run.noise.get("draws", 1) == (20 if keys else 1)
    data, one = build(run.data), build(read_run(file, said=SAID.get(name)).data)
    assert not any(example.drawn for example in one)
    if keys:
        id, captions = DRAWN[name][1]
        example = data[data.ids.index(id)]
        assert {each.caption for each in example.drawn} == captions
        assert data.describe() != one.describe()


def parquet(file, rows):
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").Table.from_pylist(rows), file
    )


def lines(file, rows):
    Path(file).write_text("\n".join(map(json.dumps, rows)))


def captions(name, files, **more):
    """Return the captions of a run's first folder, and the run."""
    run = read_run(written(files), said=SAID.get(name), **more)
    found = build(run.data)
    return {e.id: e.caption for e in found if e.id.startswith("mugs")}, run


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_captions_stand_in_simple_tuners_tables(place, kind):
    files = copy.deepcopy(RUNS["simple_tuner"][0])
    Path("img/mugs/deep/d.png").unlink()
    names = ("_controls/a", "a-masklabel", "b", "c")
    rows = [{"id": name, "long": [f"{name} 1", f"{name} 2"], "short": ""} for name in names]
    rows.append({"id": "a", "long": None, "short": "short"})
    (parquet if kind == "parquet" else lines)(f"t.{kind}", rows)
    told = {"path": f"t.{kind}", "caption_column": "long", "fallback_caption_column": "short"}
    files["backends.json"][0] |= {"caption_strategy": "parquet", "parquet": told}
    found, run = captions("simple_tuner", files)
    assert found["mugs/a.png"] == "short" and found["mugs/b.JPG"] == "b 1" and not run.unknown
    assert found["mugs/_controls/a.png"] == "_controls/a 1"
    drawn = build(read_run(Path("run.json"), draws=9).data)
    assert {e.caption for e in drawn[3].drawn} == {"b 1", "b 2"}
    (parquet if kind == "parquet" else lines)(f"t.{kind}", rows[:2] + rows[3:])
    with pytest.raises(
        InstantiationException, match=r"1 of the 5 images of img/mugs have no caption .in t"
    ):
        captions("simple_tuner", files)
    for wrong, told in ((rows + rows[:1], "is named twice"), ([{"name": "b"}], "no id")):
        (parquet if kind == "parquet" else lines)(f"t.{kind}", wrong)
        with pytest.raises(InstantiationException, match=told):
            captions("simple_tuner", files)


def test_captions_stand_in_ai_toolkits_json(place):
    files = copy.deepcopy(RUNS["ai_toolkit"][0])
    table = {"img/mugs/a.png": {"caption": "one, two"}, "img/mugs/deep/d.png": {"caption": "zqx"}}
    Path("t.json").write_text(json.dumps(table))
    part = files["run.json"]["config"]["process"][0]["datasets"][0]
    part |= {"folder_path": None, "dataset_path": "t.json", "resolution": 64}
    assert captions("ai_toolkit", files)[0] == {
        "mugs/a.png": "zqx one,  two",
        "mugs/deep/d.png": "zqx",
    }
    for moved, told in (
        ({"img/mugs/../mugs/a.png": {"caption": "a"}}, "use those in a copy"),
        ({"img/nowhere.png": {"caption": "a"}}, "does not exist"),
        ({"img/mugs/a.png": {}}, "default_caption does not apply"),
        (["img/mugs/a.png"], "is not a table of captions"),
    ):
        Path("t.json").write_text(json.dumps(moved))
        with pytest.raises(DminError, match=told):
            captions("ai_toolkit", files)
    part |= {
        "folder_path": "img/mugs",
        "dataset_path": None,
        "caption_ext": "json",
        "mask_path": None,
    }
    for image in Path("img/mugs").rglob("*.[pJ]*"):
        image.with_suffix(".json").write_text(json.dumps({"caption": image.stem}))
    assert captions("ai_toolkit", files)[0]["mugs/c.png"] == "zqx c"


def test_images_and_captions_stand_in_musubis_lines(place):
    files = copy.deepcopy(RUNS["musubi"][0])
    rows = [{"image_path": f"img/mugs/{n}", "caption": n} for n in ("a.png", "deep/d.png")]
    lines("t.jsonl", rows)
    files["sets.toml"]["datasets"] = [{"image_jsonl_file": "t.jsonl"}]
    found, run = captions("musubi", files)
    assert found == {"mugs/a.png": "a.png", "mugs/deep/d.png": "deep/d.png"} and not run.unknown
    lines("t.jsonl", [{"path": "a.png"}])
    with pytest.raises(DminError, match="no image_path"):
        captions("musubi", files)


# Where a run's config names what its network was given with each image, and the base model.
PAIRED = {
    "ai_toolkit": (("config", "process", 0, "datasets", 0, "control_path"), "Flux",
                   {("config", "process", 0, "model", "arch"): "flux_kontext"}),
    "diffusion_pipe": (("directory", 0, "control_path"), "StableDiffusionXL",
                       {("model", "type"): "flux", ("model", "min_snr_gamma"): None,
                        ("model", "v_pred"): None}),
    "musubi": (("datasets", 0, "control_directory"), "Flux", {}),
    "simple_tuner": ((1, "instance_data_dir"), "Flux",
                     {("--model_family",): "kontext"}),
}  # fmt: skip


def set_at(files, at, value):
    """Set a value in whichever of a run's files has the place."""
    for inside in files.values():
        try:
            for key in at[:-1]:
                inside = inside[key]
            inside[at[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
        return


@pytest.mark.parametrize("name", PAIRED)
def test_images_in_pairs_are_given_to_a_family_that_is_given_some(place, name):
    at, plain, changes = PAIRED[name]
    for image in ("a-masklabel", "b", "_controls/a") if name == "simple_tuner" else ():
        Path(f"img/mugs/{image}.txt").write_text(image)
    shutil.copytree("img/mugs", "img/control")
    files = copy.deepcopy(RUNS[name][0])
    set_at(files, at, "img/control")
    if name == "simple_tuner":
        set_at(files, (1, "conditioning_type"), "reference_strict")
    with pytest.raises(DminError, match=f"{say.CONTROL}|images are given"):
        read_run(written(files), said=SAID.get(name))
    base = {"Flux": "flux", "StableDiffusionXL": "sdxl"}[plain]
    pipeline_index(f"base/{base}", "FluxKontextPipeline")
    for where, value in changes.items():
        set_at(files, where, value)
    said = {"family": "flux_kontext"} if name == "musubi" else None
    run = read_run(written(files), said=said)
    assert run.family == "flux_kontext" and run.unknown == []
    found = [example for example in build(run.data) if example.id.startswith("mugs")]
    assert found and all(torch.equal(e.image, e.condition_image) for e in found)
    drawn = read_run(written(files), said=said, draws=2)
    assert all(
        torch.equal(e.image, e.condition_image)
        for x in build(drawn.data)
        for e in x.drawn
        if x.id.startswith("mugs")
    )


def test_onetrainers_masks_are_given_to_an_inpainting_network(place):
    files = copy.deepcopy(RUNS["onetrainer"][0])
    pipeline_index("base/sd", "StableDiffusionInpaintPipeline")
    files["run.json"]["model_type"] = "STABLE_DIFFUSION_15_INPAINTING"
    concept = files["run.json"]["concepts"][0] | {"path": "img/pairs"}
    files["run.json"] |= {"concepts": [concept], "resolution": "64"}
    for image in ("a", "a-masklabel"):
        picture(f"img/pairs/{image}.png", (64, 64))
    run = read_run(written(files))
    (example,) = build(run.data)
    assert run.family == "stable_diffusion_inpaint" and example.mask is None
    mask = np.asarray(Image.open("img/pairs/a-masklabel.png")).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(example.condition_image.numpy(), mask)
    assert "unmasked_probability" in run.data["approximated"] and run.unknown == []


def test_a_script_for_pairs_names_a_column(place):
    pipeline_index("base/flux", "FluxControlPipeline")
    row = {"file_name": "e.png", "text": "a mug", "drawing": "../mugs/a.png"}
    Path("img/plain/metadata.jsonl").write_text(json.dumps(row))
    picture("img/mugs/a.png")
    more = {"instance_data_dir": None, "train_data_dir": "img/plain", "center_crop": True}
    script = SCRIPT | more | {"conditioning_image_column": "drawing", "random_flip": False}
    (example,) = build(read_run(written({"hparams.yml": script})).data)
    assert example.condition_image.shape == example.image.shape
    pipeline_index("base/flux", "FluxPipeline")
    with pytest.raises(DminError, match=r"conditioning_image_column = drawing"):
        read_run(written({"hparams.yml": script}))


@pytest.mark.parametrize("name", RUNS)
def test_data_that_the_line_names_are_not_looked_for(place, name):
    files = written(RUNS[name][0])
    Path("img").rename("elsewhere")
    run = read_run(files, said={**SAID.get(name, {}), "data": "training_folder"})
    assert run.data == {} and run.unknown == []


def leaves(config, path=()):
    """Yield the place of every value of a config."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("odd", [[], {}, "odd", -1, 1e400, True, None, [[1]], [{"a": 1}]], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_odd_values_are_refused_in_a_sentence_or_read(place, name, odd):
    for at in leaves(RUNS[name][0]):
        files = inside = copy.deepcopy(RUNS[name][0])
        for key in at[:-1]:
            inside = inside[key]
        inside[at[-1]] = odd
        try:
            read_run(written(files), said=SAID.get(name))
        except DminError as error:
            assert len(str(error)) < 900, at


@pytest.mark.parametrize("name", ["diffusion_pipe", "musubi"])
def test_a_file_of_data_sets_may_be_of_another_kind(place, name):
    Path("list.json").write_text("[1]")
    told = {"dataset": "list.json", "dataset_config": "list.json"}
    with pytest.raises(DminError, match="not a table"):
        read_run(written({"run.toml": {**RUNS[name][0]["run.toml"], **told}}), said=SAID.get(name))


def test_numbers_stand_for_true_and_false(place):
    pipeline_index("base/sd3", "StableDiffusion3Pipeline")
    told = {"pretrained_model_name_or_path": "base/sd3", "precondition_outputs": 1}
    run = read_run(written({"hparams.yml": {**SCRIPT, **told, "weighting_scheme": "logit_normal"}}))
    assert run.model["weighting"] == "x0"


def test_the_bound_of_a_learned_variance_is_a_term_of_the_loss(place):
    pipeline_index("base/pixart", "PixArtAlphaPipeline")
    told = {**ONETRAINER, "model_type": "PIXART_ALPHA", "base_model_name": "base/pixart"}
    with pytest.raises(DminError, match=r"vb_loss_strength = 1\.0: an additional term"):
        read_run(written({"run.json": told}))
    read_run(written({"run.json": {**told, "vb_loss_strength": 0.0}}))


def test_a_lora_with_its_config_in_its_header_is_a_run(place):
    header_only("alone/mug.safetensors", ot_config=json.dumps(ONETRAINER))
    for run in (read_run(Path("alone/mug.safetensors")), read_run(Path("alone"))):
        assert run.model["adapter"] == "alone/mug.safetensors" and len(build(run.data)) == 11
    for odd in ("{", "[1]", "3"):
        header_only("alone/mug.safetensors", ot_config=odd)
        with pytest.raises(DminError, match="no config of a known trainer"):
            read_run(Path("alone/mug.safetensors"))


def test_archives_of_images_are_refused_by_name(place):
    Path("img/mugs/images.tar").touch()
    with pytest.raises(DminError, match=r"images\.tar is an archive.*Unpack it"):
        read_run(written(RUNS["diffusion_pipe"][0]))


@pytest.mark.parametrize("name", ["ai_toolkit", "kohya"])
def test_alpha_is_the_mask_and_pixels_below_it_keep_their_colour(place, name):
    pixels = np.full((32, 32, 4), 200, np.uint8)
    pixels[:16] = (10, 60, 110, 0)
    Image.fromarray(pixels).save("img/plain/e.png")
    files = copy.deepcopy(RUNS["ai_toolkit"][0])
    (least, mean) = (0.1, 0.1 + 0.9 * 100 / 255) if name == "ai_toolkit" else (0, 1)
    if name == "kohya":
        pipeline_index("base/sd", "StableDiffusionPipeline")
        told = {"dataset_config": "data.toml", "output_dir": "out", "output_name": "mug"}
        told |= {"pretrained_model_name_or_path": "base/sd", "network_module": "networks.lora"}
        sets = {"datasets": [{"resolution": 32, "subsets": [{"image_dir": "img/plain"}]}]}
        files = {"run.toml": {**told, "alpha_mask": True}, "data.toml": sets}
    else:
        last = files["run.json"]["config"]["process"][0]["datasets"][1]
        last |= {"alpha_mask": True, "mask_min_value": least}
    example = list(build(read_run(written(files)).data))[-1]
    assert example.image[:, 0, 0].tolist() == pytest.approx([10 / 255, 60 / 255, 110 / 255])
    top, below = example.mask[0, 0, 0], example.mask[0, -1, -1]
    full = least + (1 - least) * 200 / 255
    assert [float(top), float(below)] == pytest.approx([least / mean, full / mean])


def test_a_script_reads_captions_of_a_folders_metadata(place):
    Path("img/plain/metadata.jsonl").write_text('{"file_name": "e.png", "caption": "a mug"}')
    told = {"instance_data_dir": None, "train_data_dir": "img/plain", "caption_column": "caption"}
    (example,) = build(read_run(written({"hparams.yml": {**SCRIPT, **told}})).data)
    assert (example.id, example.caption, *example.image.shape[1:]) == (
        "plain/e.png",
        "a mug",
        32,
        32,
    )


def test_words_that_were_learned_stand_in_the_adapter_or_are_asked_for(place):
    files = copy.deepcopy(RUNS["onetrainer"][0])
    files["run.json"]["additional_embeddings"] = [{"placeholder": "<mug>"}]
    with pytest.raises(DminError, match=r"embeddings = 1: learned words: .*model\.embeddings="):
        read_run(written(files))
    header_only("out/mug.safetensors", ["bundle_emb.<mug>.clip_l"])
    assert "additional_embeddings = 1: learned words, in the" in str(
        read_run(written(files)).lines()
    )


@pytest.mark.parametrize(
    "name, file, told, rounded, approximated",
    [
        ("ai_toolkit", 0, {"quantize": "true"}, "qfloat8", {"qtype", "quantize_te"}),
        ("simple_tuner", 0, {"--base_model_precision": "nf4-bnb"}, "nf4", {"base_model_precision"}),
        ("simple_tuner", 0, {"base_model_precision": "no_change"}, None, set()),
        (
            "diffusion_pipe",
            0,
            {"transformer_dtype": "float8"},
            "float8_e4m3fn",
            {"transformer_dtype"},
        ),
        ("onetrainer", 0, {"unet": {"weight_dtype": "FLOAT_8"}}, "float8", {"weight_dtype"}),
        ("onetrainer", 0, {"text_encoder": {"weight_dtype": "INT_8"}}, None, {"weight_dtype"}),
    ],
)
def test_a_base_that_was_quantised_is_rounded_alike_and_that_is_said(
    place, name, file, told, rounded, approximated
):
    files = copy.deepcopy(RUNS[name][0])
    inside = list(files.values())[file]
    inside = inside["config"]["process"][0]["model"] if name == "ai_toolkit" else inside
    inside = inside["model"] if name == "diffusion_pipe" else inside
    inside |= told
    run = read_run(written(files), said=SAID.get(name))
    assert run.model.get("base_dtype") == rounded
    names = {entry.key.rpartition(".")[2] for entry in run.random}
    assert approximated <= names


def test_the_page_of_trainers_is_that_of_the_readers():
    assert documented.PAGE.read_text() == documented.page()


@pytest.mark.parametrize(
    "name, file, at, value, named",
    [
        ("onetrainer", 0, ("training_method",), "FINE_TUNE", "trains the whole network"),
        ("onetrainer", 0, ("__version",), 3, "older OneTrainer"),
        ("onetrainer", 0, ("model_type",), "STABLE_CASCADE_1", "no family of dmin opens"),
        ("onetrainer", 0, ("mae_strength",), 0.5, r"squared.*run\.ignore=\[mae_strength\]"),
        ("onetrainer", 0, ("concepts", 0, "type"), "PRIOR_PREDICTION", "prior preservation"),
        ("ai_toolkit", 0, ("config", "process", 0, "network"), {}, "trains the whole network"),
        ("ai_toolkit", 0, ("config", "process", 0, "model"), UINT3, r"qtype = uint3\|.*quantised"),
        (
            "simple_tuner",
            0,
            ("--base_model_precision",),
            "int2-quanto",
            "model.base_dtype does not",
        ),
        ("onetrainer", 0, ("unet",), {"weight_dtype": "INT_8"}, "INT_8: the base model was quan"),
        (
            "ai_toolkit",
            0,
            ("config", "process", 0, "train", "timestep_type"),
            "weighted",
            "weighting of timesteps",
        ),
        ("ai_toolkit", 0, ("config", "process", 0, "datasets", 1, "is_reg"), True, "prior"),
        ("simple_tuner", 0, ("--model_type",), "full", "trains the whole network"),
        ("simple_tuner", 0, ("--twinflow_enabled",), "true", "additional term"),
        ("simple_tuner", 1, (0, "caption_strategy"), "csv", "which is not supported"),
        ("simple_tuner", 1, (0, "type"), "aws", "local images are needed"),
        ("diffusion_pipe", 0, ("adapter",), {}, "trains the whole network"),
        ("diffusion_pipe", 0, ("huber_delta",), 1.0, "squared"),
        ("diffusion_pipe", 1, ("max_ar",), "wide", "not a number"),
        ("diffusers_scripts", 0, ("rank",), None, "trains the whole network"),
        ("diffusers_scripts", 0, ("with_prior_preservation",), True, "prior"),
        ("musubi", 0, ("network_module",), "networks.lora_framepack", "no family of dmin opens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(place, name, file, at, value, named):
    files = copy.deepcopy(RUNS[name][0])
    inside = list(files.values())[file]
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    with pytest.raises(DminError, match=named):
        read_run(written(files), said={} if "network_module" in at else SAID.get(name))


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("onetrainer", "force_v_prediction", True),
        ("ai_toolkit", "is_v_pred", True),
        ("simple_tuner", "prediction_type", "v_prediction"),
        ("diffusion_pipe", "v_pred", True),
        ("diffusers_scripts", "prediction_type", "v_prediction"),
    ],
)
def test_what_the_network_predicts_is_held_to_the_scheduler(place, name, key, value):
    files = copy.deepcopy(RUNS[name][0])
    config = next(iter(files.values()))
    inside = config["config"]["process"][0]["model"] if name == "ai_toolkit" else config
    inside = config["model"] if name == "diffusion_pipe" else inside
    inside[key] = value
    for text in ("a-masklabel", "b", "_controls/a"):
        Path(f"img/mugs/{text}.txt").write_text(text)
    if name == "ai_toolkit":
        inside |= {"name_or_path": "base/sd", "arch": "sd1"}
        config["config"]["process"][0]["train"]["noise_scheduler"] = "ddpm"
    if name == "simple_tuner":
        config |= {"--model_family": "sd1x", "--pretrained_model_name_or_path": "base/sd"}
    if name == "diffusers_scripts":
        config["pretrained_model_name_or_path"] = "base/sd"
    for kind in ("epsilon", "v_prediction"):
        for base in ("base/sd", "base/sdxl"):
            predicts(base, kind)
        if kind == "v_prediction":
            assert any(entry.value == kind for entry in read_run(written(files)).taken)
        else:
            with pytest.raises(DminError, match="has epsilon: set prediction_type to v_prediction"):
                read_run(written(files))


def test_keys_that_nobody_knows_are_told(place):
    assert read_run(written({"run.json": {**ONETRAINER, "strange": 1}})).unknown == ["strange"]
