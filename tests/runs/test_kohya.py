"""kohya sd-scripts' runs: what is taken, approximated, refused, and that the data are its own."""

from itertools import permutations

import pytest
import torch
from omegaconf import OmegaConf
from runs.tiny import header_only, picture, pipeline_index, predicts

from dmin.cli.config.line import parse
from dmin.data.training_folder import Together
from dmin.runs.recognise import read_run
from dmin.runtime.errors import DminError

MAIN = """
pretrained_model_name_or_path = "base/sd"
dataset_config = "data.toml"
output_dir = "out"
output_name = "mug"
network_module = "networks.lora"
[loss]
min_snr_gamma = 5
noise_offset = "0.05"
caption_dropout_rate = 0.1
"""
DATA = """
[general]
caption_extension = "txt"
shuffle_caption = true
[[datasets]]
resolution = [32, 32]
enable_bucket = true
bucket_reso_steps = 8
  [[datasets.subsets]]
  image_dir = "img/mugs"
  class_tokens = "zqx mug"
  num_repeats = 3
  caption_prefix = "zqx,"
[[datasets]]
resolution = 16
  [[datasets.subsets]]
  image_dir = "img/plain"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline_index("base/sd", "StableDiffusionPipeline")
    for name in ("img/mugs/a.png", "img/mugs/b.JPG", "img/mugs/c.gif", "img/mugs/deep/d.png"):
        picture(name)
    picture("img/plain/e.png")
    (tmp_path / "img/mugs/a.txt").write_text("a mug\na second line")
    header_only("out/mug.safetensors")
    (tmp_path / "run.toml").write_text(MAIN)
    (tmp_path / "data.toml").write_text(DATA)
    return tmp_path


def built(run):
    """Return the dataset of a run, built as the commands build it."""
    from dmin.cli.workspace.built import build

    return build(run.data)


def test_a_run_is_taken_as_it_was_trained(place):
    run = read_run(place / "run.toml")
    assert run.family == "stable_diffusion" and run.collect == {"params": "lora"}
    assert run.model == {
        "path": "base/sd",
        "snr_gamma": 5.0,
        "noise_offset": 0.05,
        "prompt_dropout": 0.1,
        "adapter": "out/mug.safetensors",
        "empty_captions": "keep",
    }
    data = built(run)
    assert isinstance(data, Together)
    assert [(e.id, e.caption, e.repeats, e.image.shape[-2:]) for e in data] == [
        ("mugs/a.png", "zqx, a mug", 3.0, (32, 32)),
        ("mugs/b.JPG", "zqx, zqx mug", 3.0, (32, 32)),
        ("plain/e.png", "", 1, (16, 16)),
    ]


def test_what_is_random_is_said_and_in_the_fingerprint(place):
    run = read_run(place / "run.toml")
    assert any("shuffle_caption = True" in line for line in run.lines())
    assert "shuffle_caption" in built(run).describe()["approximated"]


def test_draws_are_as_kohya_draws(place):
    (place / "img/mugs/a.txt").write_text("mug, red, {big}\nblue")
    mugs = "flip_aug = true\nkeep_tokens = 1\nenable_wildcard = true\ncaption_dropout_rate = 0.5"
    run = of_folders(place, mugs, draws=30)
    example = built(run)[0]
    captions = {each.caption for each in example.drawn}
    moved = {"zqx, " + ", ".join(o) for o in permutations(["mug", "red", "{big}"])}
    assert len(captions & moved) > 2 and captions <= moved | {"", "zqx, blue"}
    flipped = [torch.equal(e.image, example.image.flip(-1)) for e in example.drawn]
    assert 5 < sum(flipped) < 25
    assert "is here 30 draws" in "".join(run.lines()) and run.noise["draws"] == 30
    for key in ("flip_aug", "shuffle_caption", "enable_wildcard", "caption_dropout_rate"):
        assert any(key in name for name in run.drawn)


def test_captions_may_stand_in_lines(place):
    rows = ['{"image_path": "img/mugs/a.png", "caption": "x", "tags": "y"}']
    rows += ['{"image_path": "b", "tags": "z"}']
    (place / "meta.jsonl").write_text("\n".join(rows))
    run = of_folders(place, 'metadata_file = "meta.jsonl"')
    assert [e.caption for e in built(run)][:2] == ["zqx, x, y", "zqx, z"]


def test_numbered_folders_are_repeats_and_class_tokens(place):
    (place / "img/mugs").rename(place / "img/3_zqx mug")
    (place / "run.toml").write_text(
        MAIN.replace('dataset_config = "data.toml"', 'train_data_dir = "img"\nresolution = "32,32"')
    )
    run = read_run(place / "run.toml")
    assert [(e.id, e.caption, e.repeats) for e in built(run)] == [
        ("3_zqx mug/a.png", "zqx mug", 3.0),
        ("3_zqx mug/b.JPG", "zqx mug", 3.0),
    ]  # .caption is kohya's extension where none is said
    assert any("plain" in each for each in run.unknown)


def test_masks_of_the_loss_are_taken_where_every_image_has_one(place):
    (place / "run.toml").write_text(f"{MAIN}masked_loss = true\n")
    with_masks = DATA.replace("num_repeats = 3", "conditioning_data_dir = 'img/masks'")
    (place / "data.toml").write_text(with_masks)
    picture("img/masks/a.png")
    run = read_run(place / "run.toml")
    with pytest.raises(Exception, match=r"1 of the 2 images .* have no mask") as error:
        built(run)
    assert isinstance(error.value.__cause__, DminError)
    picture("img/masks/b.png")
    assert [e.mask is not None for e in built(run)] == [True, True, False]


@pytest.mark.parametrize(
    "line, named",
    [
        ("reg_data_dir = 'img/plain'", "prior preservation"),
        ("multires_noise_iterations = 6", "several resolutions"),
        ("clip_skip = 2", "earlier layer"),
        ("loss_type = 'l1'", "l2, huber"),
        ("vae = 'other'", "another VAE"),
        ("max_token_length = 225", "several pieces"),
        ("apply_t5_attn_mask = true", "padding"),
    ],
)
def test_another_loss_is_refused_unless_it_is_ignored(place, line, named):
    file = place / "run.toml"
    file.write_text(f"{MAIN}{line}\n")
    key = line.partition(" ")[0]
    with pytest.raises(DminError, match=rf"{named}.*run\.ignore=\[{key}\]"):
        read_run(file)
    assert any(key in text for text in read_run(file, ignore=[key]).lines())
    with pytest.raises(DminError, match="does not set this key"):
        read_run(file, ignore=[key, "other"])


def test_a_base_in_float8_is_rounded_alike(place):
    (place / "run.toml").write_text(f"{MAIN}fp8_base = true\n")
    run = read_run(place / "run.toml")
    assert run.model["base_dtype"] == "float8_e4m3fn"
    told = {entry.meaning for entry in run.random if entry.key == "fp8_base"}
    assert any("text encoders were quantised" in meaning for meaning in told) and len(told) == 2


@pytest.mark.parametrize("trained", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("told", ["epsilon", "v_prediction"])
def test_what_the_network_predicts_is_held_to_the_scheduler(place, trained, told):
    predicts("base/sd", told)
    (place / "run.toml").write_text(
        f"{MAIN}v_parameterization = {str(trained[0] == 'v').lower()}\n"
    )
    if trained != told:
        with pytest.raises(DminError, match=rf"has {told}: set prediction_type to {trained} there"):
            read_run(place / "run.toml")
    else:
        read_run(place / "run.toml")


@pytest.mark.parametrize(
    "family, pipeline, lines, settings",
    [
        ("networks.lora_flux", "Flux", "model_prediction_type = 'raw'", {"embedded_guidance": 3.5}),
        ("networks.lora_flux", "Flux", "", "compared with the velocity"),
        ("networks.lora_sd3", "StableDiffusion3", "", {"weighting": "x0"}),
        ("networks.lora_sd3", "StableDiffusion3", "weighting_scheme = 'sigma_sqrt'", {}),
        ("networks.lora_sd3", "StableDiffusion3", "weighting_scheme = 'cosmap'", "error of x0"),
    ],
)
def test_losses_of_flows_are_taken_or_refused(place, family, pipeline, lines, settings):
    pipeline_index("base/sd", f"{pipeline}Pipeline")
    text = MAIN.replace("networks.lora", family).replace("min_snr_gamma = 5", lines)
    (place / "run.toml").write_text(text)
    if isinstance(settings, str):
        with pytest.raises(DminError, match=settings):
            read_run(place / "run.toml")
        return
    model = read_run(place / "run.toml").model
    assert {k: model.get(k) for k in ("weighting", "embedded_guidance")} == {
        "weighting": None,
        "embedded_guidance": None,
        **settings,
    }


def of_folders(place, mugs="", plain="", draws=1, **changes):
    """Return the run whose folders have these lines of their own."""
    text = DATA.replace('prefix = "zqx,"', f'prefix = "zqx,"\n{mugs}') + plain
    for old, new in changes.items():
        text = text.replace(old, new)
    (place / "data.toml").write_text(text)
    return read_run(place / "run.toml", draws=draws)


@pytest.mark.parametrize(
    "mugs, plain, share",
    [(None, None, 0.1), (0.1, 0.1, 0.1), (0.3, 0.3, 0.3), (0, 0, None), (0, 0.1, "random")],
)
def test_captions_that_each_folder_drops_are_those_of_the_model(place, mugs, plain, share):
    of = ["" if each is None else f"caption_dropout_rate = {each}" for each in (mugs, plain)]
    run = of_folders(place, *of)
    assert run.model.get("prompt_dropout") == (share if share != "random" else None)
    random = any("caption_dropout_rate" in entry.key for entry in run.random)
    assert random == (share == "random") == ("caption_dropout_rate" in run.data["approximated"])
    built(run)


def test_marks_between_tags_are_read_as_the_trainer_does(place):
    (place / "img/mugs/a.txt").write_text("a mug ||| red;;big")
    marks = "secondary_separator = ';;'\nkeep_tokens_separator = '|||'"
    captions = [built(of_folders(place, marks))[0].caption]
    captions.append(built(of_folders(place, f"{marks}\nshuffle_caption = false"))[0].caption)
    assert captions == ["zqx, a mug , red,big", "zqx, a mug ||| red,big"]


@pytest.mark.parametrize("side, step, least, most", [(512, 64, 256, 1024), (1000, 64, 300, 1500)])
def test_buckets_are_kohyas(place, side, step, least, most):
    lines = f"min_bucket_reso = {least}\nmax_bucket_reso = {most}"
    of_step = {"bucket_reso_steps = 8": f"bucket_reso_steps = {step}\n{lines}"}
    run = of_folders(place, **of_step, **{"[32, 32]": str(side)})
    shapes = {tuple(shape) for shape in run.data["datasets"]["mugs"]["bucket_shapes"]}
    least, most = least // step * step, -(-most // step) * step
    want = {(side // step * step,) * 2}
    for width in range(least, most + 1, step):  # of each width the largest that has the area
        heights = [h for h in range(least, most + 1, step) if width * h <= side * side]
        want |= {shape for h in heights[-1:] for shape in ((width, h), (h, width))}
    assert shapes == want and built(run)[0].image.shape[1:] in want
    assert (
        run.data["datasets"]["mugs"]["bucket_ratio"] == "width/height" == run.data["bucket_ratio"]
    )


def test_width_and_height_without_buckets_are_the_shape(place):
    changes = {"enable_bucket = true": "enable_bucket = false", "[32, 32]": "[48, 32]"}
    assert built(of_folders(place, **changes))[0].image.shape[1:] == (32, 48)


def test_a_folder_may_be_named_by_its_repeats_alone(place):
    (place / "img/mugs").rename(place / "img/5")
    text = MAIN.replace('dataset_config = "data.toml"', 'train_data_dir = "img"\nresolution = 32')
    (place / "run.toml").write_text(text)
    example = built(read_run(place / "run.toml"))[0]
    assert (example.id, example.caption, example.repeats) == ("5/a.png", "", 5.0)


@pytest.mark.parametrize("off", ["false", "0", "''", "[]", "'None'"])
def test_what_is_off_is_no_other_loss(place, off):
    text = f"{MAIN}multires_noise_iterations = {off}\nclip_skip = 1\n"
    (place / "run.toml").write_text(text)
    read_run(place / "run.toml")


@pytest.mark.parametrize(
    "change, named",
    [
        (("'networks.lora'", "'networks.oft'"), "no family of dmin opens"),
        (("min_snr_gamma = 5", "min_snr_gamma = 'five'"), "not a number"),
        (("img/mugs", "img/cups"), "run.root"),
        (("base/sd", "base/sd.ckpt"), "is a pickle"),
        (("'mug'", "'cup'"), "model.adapter=FILE"),
        (("[[datasets.subsets]]", "[[datasets.other]]"), "must be a list of one or more tables"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(place, change, named):
    for name in ("run.toml", "data.toml"):
        text = (place / name).read_text().replace('"', "'").replace(*change)
        (place / name).write_text(text)
    with pytest.raises(DminError, match=named):
        read_run(place / "run.toml")


def test_a_base_model_elsewhere_needs_its_family(place):
    text = MAIN.replace("base/sd", "someone/their-model")
    (place / "run.toml").write_text(text)
    with pytest.raises(DminError, match="model=FAMILY"):
        read_run(place / "run.toml")
    run = read_run(place / "run.toml", said={"family": "stable_diffusion_xl"})
    assert (run.family, run.model["path"]) == ("stable_diffusion_xl", "someone/their-model")


def test_a_base_model_of_one_file_needs_the_folder_of_its_configs(place):
    header_only("base/mine.safetensors", ["cond_stage_model.some"])
    (place / "run.toml").write_text(MAIN.replace("base/sd", "base/mine.safetensors"))
    with pytest.raises(DminError, match=r"a single file without configs.*model\.path=FOLDER"):
        read_run(place / "run.toml")
    run = read_run(place / "run.toml", said={"path": "base/sd"})
    told = {"single_file": "base/mine.safetensors", "path": "base/sd"}
    assert told.items() <= run.model.items()


def test_what_the_line_says_of_the_model_wins(place):
    (place / "run.toml").write_text(MAIN.replace("base/sd", "gone/sd").replace("mug", "gone"))
    pipeline_index("here", "StableDiffusionXLPipeline")
    line = [f"run={place / 'run.toml'}", "model.adapter=mine.safetensors"]
    for path in (["--model", "here"], ["model.path=here"]):
        root = parse("collect", [*line, *path]).root
        assert (root["model"]["path"], root["model"]["adapter"]) == ("here", "mine.safetensors")
        assert {"override model": "stable_diffusion_xl"} in root["defaults"]


def test_text_encoders_that_were_trained_are_told_from_the_header(place):
    header_only("out/mug.safetensors", ["lora_te_text_model.lora_down.weight"])
    told = [entry for entry in read_run(place / "run.toml").taken if "encoders" in entry.key]
    assert [entry.value for entry in told] == [1] and "inside each pass" in told[0].meaning


def test_images_of_several_shapes_share_the_noise_where_they_can(place):
    assert read_run(place / "run.toml").noise == {"shapes": "field"}
    text = DATA.replace("enable_bucket = true", "").replace("[32, 32]", "16")
    (place / "data.toml").write_text(text)
    assert read_run(place / "run.toml").noise == {}


def test_a_picture_may_be_asked_about_with_a_run(place):
    root = parse("retrieve", [f"run={place / 'run.toml'}", "img/plain/e.png"]).root
    assert root["queries"]["root"] == "img/plain/e.png"


def test_keys_that_nobody_knows_are_told(place):
    (place / "run.toml").write_text(f"{MAIN}strange_key = 3\n")
    assert read_run(place / "run.toml").unknown == ["strange_key"]


def test_nothing_that_a_run_says_is_resolved(place):
    text = DATA.replace("zqx mug", "${oc.env:HOME}")
    (place / "data.toml").write_text(text)
    root = parse("collect", [f"run={place / 'run.toml'}"]).root
    captions = OmegaConf.create(root).data.datasets.mugs.captions
    assert captions.text == "${oc.env:HOME}"


def test_a_run_from_another_machine_is_found_below_a_root(place):
    moved = place / "moved"
    for name in ("img", "base", "out", "data.toml"):
        moved.mkdir(exist_ok=True)
        (place / name).rename(moved / name)
    text = (place / "run.toml").read_text().replace('"out"', "'C:\\Users\\me\\out'")
    (place / "run.toml").write_text(text)
    with pytest.raises(DminError, match=r"run\.root"):
        read_run(place / "run.toml")
    run = read_run(place / "run.toml", root=moved)
    assert run.model["adapter"] == "moved/out/mug.safetensors"
