"""What a checkpoint is, from its small files: an index, a file's names, a network alone."""

import shutil

import diffusers
import pytest
from hydra import compose, initialize_config_dir
from models import documented
from models.families import EVERY as TESTED, PAIRS, checkpoint
from omegaconf import open_dict
from runs.tiny import header_only, pipeline_index

from dmin.cli import main
from dmin.cli.config.auto import opened, resolve
from dmin.cli.config.groups import config_directory, groups
from dmin.cli.config.validate import validate
from dmin.models import recognition
from dmin.models.recognition import auto, of_tensors, recognise
from dmin.models.relatives import all_families
from dmin.runtime.errors import DminError

FAMILIES = {name: of.claims for name, of in all_families().items()}
# Names that stand in the files of their publishers.
FILES = {
    "stable_diffusion": ["model.diffusion_model.x", "cond_stage_model.transformer.x"],
    "stable_diffusion_xl": ["model.diffusion_model.x", "conditioner.embedders.1.model.x"],
    "stable_diffusion_3": ["model.diffusion_model.joint_blocks.0.context_block.x"],
    "flux": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "chroma": ["double_blocks.0.img_mod.x", "distilled_guidance_layer.in_proj.bias"],
    "flux_2": ["double_blocks.0.img_attn.x", "single_stream_modulation.lin.weight"],
    "lumina_2": ["cap_embedder.0.weight", "noise_refiner.0.attention.x"],
    "z_image": ["layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight", "x_pad_token"],
    "wan": ["head.modulation", "patch_embedding.weight"],
}


def test_no_two_families_claim_the_same():
    claimed = [p for of in FAMILIES.values() for p in (*of.pipelines, *of.own)]
    assert len(claimed) == len(set(claimed))
    keys = [of.keys for name, of in FAMILIES.items() if of.keys and name not in PAIRS]
    assert len(keys) == len(set(keys))
    assert all(hasattr(diffusers, name.split()[0]) for name in claimed)
    assert {*FAMILIES, "auto", "mlp"} == set(groups()["model"])


@pytest.mark.parametrize("name", TESTED)
def test_a_checkpoint_is_opened_as_its_family(name):
    found = recognise(checkpoint(name))
    assert found.family == TESTED[name].model.family and found.evidence.endswith(
        "by its model_index.json"
    )


def test_it_is_loaded_with_the_settings_of_its_family():
    settings = TESTED["sana"].settings
    plain = TESTED["sana"].model.from_pretrained(checkpoint("sana"), **settings)
    found = auto(checkpoint("sana"), **settings)
    assert type(found) is type(plain) and found.describe() == plain.describe()


@pytest.mark.parametrize("name", FILES)
def test_a_single_file_is_known_by_its_tensors(name, tmp_path):
    assert of_tensors(FILES[name]) == name and of_tensors(["some.weight"]) is None
    header_only(tmp_path / "x.safetensors", FILES[name])
    pipeline_index(tmp_path / "own", FAMILIES[name].pipelines[0])
    other = "flux" if name != "flux" else "stable_diffusion"
    pipeline_index(tmp_path / "other", FAMILIES[other].pipelines[0])
    file = tmp_path / "x.safetensors"
    assert recognise(tmp_path / "own", single_file=file).family == name
    with pytest.raises(DminError, match=f"of the family {name} by .* model.path=.* of {other}"):
        recognise(tmp_path / "other", single_file=file)
    with pytest.raises(DminError, match=rf"of the family {name}\. Set model\.single_file="):
        recognise(file)


def test_what_is_no_pipeline_is_told_with_its_remedy(tmp_path):
    with pytest.raises(DminError, match=r"a pickle.*convert it to \.safetensors"):
        recognise(tmp_path / "model.ckpt")
    with pytest.raises(DminError, match=r"a pickle.*convert it to \.safetensors"):
        recognise(tmp_path, single_file="model.ckpt")
    with pytest.raises(DminError, match=r"this folder does not exist.*model_index\.json"):
        recognise(tmp_path / "nowhere")
    with pytest.raises(DminError, match=r"is not a diffusers pipeline.*model_index\.json"):
        recognise(tmp_path)
    whole = checkpoint("flux")
    with pytest.raises(
        DminError, match=rf"only a FluxTransformer2DModel \(as in .*flux.* model\.path={whole}"
    ):
        recognise(whole / "transformer")
    shutil.copytree(whole / "transformer", tmp_path / "step-500")
    with pytest.raises(DminError, match=r"model\.path=PIPELINE.*model\.ema=.*step-500"):
        recognise(tmp_path / "step-500")


def test_a_class_of_no_family_is_refused_with_what_opens_and_a_skeleton(tmp_path):
    pipeline_index(tmp_path, "AuraFlowPipeline")
    with pytest.raises(DminError) as told:
        recognise(tmp_path)
    for each in FAMILIES:
        assert f"{each} ({FAMILIES[each].pipelines[0]}" in str(told.value)
    code = str(told.value).partition("\n\n")[2]
    assert 'Claims("AuraFlowTransformer2DModel", ("AuraFlowPipeline",))' in code
    names: dict = {}
    exec(code, names)  # it is Python, and then a family
    try:
        assert recognise(tmp_path).family == "my_family"
        names["AuraFlow"].family = "another"
        names["AuraFlow"].__init_subclass__()
        all_families()["another"] = names["AuraFlow"]
        with pytest.raises(DminError, match="several families open: my_family, another"):
            recognise(tmp_path)
    finally:
        for each in ("my_family", "another"):
            all_families().pop(each, None)
    pipeline_index(tmp_path, "ZImageInpaintPipeline")
    with pytest.raises(DminError, match="also takes a mask"):
        recognise(tmp_path)
    assert "TheNetwork" in recognition.skeleton("NobodysPipeline")


def test_a_variant_on_disk_only_is_told(tmp_path):
    shutil.copytree(checkpoint("dit"), tmp_path / "dit")
    for file in (tmp_path / "dit").glob("*/diffusion_pytorch_model.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(DminError, match=r"only as variant fp16\. Set model\.variant=fp16"):
        auto(tmp_path / "dit")
    with pytest.raises(DminError, match=r"model\.variant=ema: .* Set model\.variant=fp16"):
        auto(tmp_path / "dit", variant="ema")
    auto(tmp_path / "dit", variant="fp16")
    with pytest.raises(DminError, match=r"exist only without a variant\. Set model\.variant=null"):
        auto(checkpoint("dit"), variant="fp16")


def composed(*words):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        words = ["data=digits", "queries=heldout_digits", *opened(words)]
        cfg = compose("dmin", words, return_hydra_config=True)
        with open_dict(cfg):
            cfg.name = "test"
            del cfg.hydra
        return cfg, resolve(cfg)


def test_a_command_runs_and_keeps_the_family_that_it_found():
    cfg, told = composed(f"model.path={checkpoint('sana')}", "model.instruction=none")
    assert told == "model: a SanaPipeline by its model_index.json → model=sana"
    same, said = composed(
        "model=sana", f"model.path={checkpoint('sana')}", "model.instruction=none"
    )
    assert cfg.model == same.model and said is None
    validate(cfg, ["model"])
    cfg, _ = composed("model=auto", f"model.path={checkpoint('sana')}", "model.snr_gama=5")
    with pytest.raises(DminError, match=r"model\.snr_gama is not a setting of .*mean snr_gamma"):
        validate(cfg, ["model"])
    cfg, told = composed()
    assert told is None
    with pytest.raises(DminError, match=r"No value for model\.path"):
        validate(cfg, ["model"])


def test_the_settings_of_a_family_made_of_another_are_composed_without_a_word(recwarn):
    cfg, _ = composed(f"model.path={checkpoint('flux_fill')}")
    assert cfg.model.embedded_guidance == 30
    assert not [told for told in recwarn if "_self_" in str(told.message)]


def test_the_page_of_models_has_the_tables_of_the_code():
    assert documented.PAGE.read_text() == documented.page()


def test_the_families_are_listed_and_a_path_is_told(capsys):
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FAMILIES) and "FluxFill" in listed
    assert main(["models", str(checkpoint("flux"))]) == 0
    assert "a FluxPipeline by its model_index.json → model=flux" in capsys.readouterr().out
    assert main(["models", "./nowhere"]) == 1
    assert "this folder does not exist" in capsys.readouterr().err
