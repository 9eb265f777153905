"""Captions that a model needs are looked for before it is loaded."""

import json

import pytest
from command_line import dmin
from PIL import Image

from dmin.data.checked import require_captions
from dmin.data.image_folder import ImageFolder
from dmin.data.subset import Subset
from dmin.models import DDPM, DiT, Flux, StableDiffusion
from dmin.runtime.errors import DminError


def folder(place, captions):
    place.mkdir()
    lines = []
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(place / f"{number}.png")
        said = {} if caption is None else {"text": caption}
        lines.append(json.dumps({"file_name": f"{number}.png", **said}) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    return ImageFolder(place)


def test_half_a_folder_is_refused_with_counts_names_and_remedy(tmp_path):
    data = folder(tmp_path / "d", ["a", None] * 4)
    message = (
        r"4 of the 8 images of data have no caption \(1\.png, 3\.png, 5\.png, …\), and Flux is "
        r"conditioned on captions\. Add a caption for each to the column text of "
        r"metadata\.jsonl .*, or remove"
    )
    with pytest.raises(DminError, match=message):
        require_captions(data, "Flux")
    (tmp_path / "d" / "1.txt").write_text("b")
    with pytest.raises(DminError, match=r"files such as 1\.txt, which data=training_folder"):
        require_captions(data, "Flux")
    with pytest.raises(DminError, match=r"of queries .*Give them: --prompt"):
        require_captions(data, "Flux", "queries")
    require_captions(Subset(data, ids=["0.png", "4.png"]), "Flux")


def test_captions_of_no_words_are_a_setting(tmp_path):
    data = folder(tmp_path / "d", ["a", " "])
    with pytest.raises(DminError, match=r"1 of the 2 .*\(1\.png\).* model\.empty_captions=keep"):
        require_captions(data, "Flux")
    require_captions(data, "Flux", empty=True)


def test_models_say_whether_they_read_captions():
    assert StableDiffusion.reads_captions({}) and Flux.reads_captions({"prompt_dropout": 0.1})
    assert not StableDiffusion.reads_captions({"prompt_dropout": 1})
    assert not DDPM.reads_captions({}) and not DiT.reads_captions({})


@pytest.mark.parametrize("command", ["collect", "doctor"])
def test_no_model_is_loaded_for_it(command, tmp_path):
    folder(tmp_path / "d", ["a", None])
    words = [command, "model=flux", "model.path=nowhere", "data=image_folder", "data.root=d"]
    said = " ".join(dmin(*words, cwd=tmp_path, ok=False).stderr.split())
    assert "1 of the 2 images of data have no caption (1.png), and Flux is" in said


def test_images_of_a_hundred_megapixels_are_refused_or_left_out_by_name(tmp_path):
    folder(tmp_path / "d", ["a", "b", "c"])
    Image.new("1", (12_000, 9_000)).save(tmp_path / "d" / "1.png")
    (tmp_path / "d" / "2.png").write_text("no picture")
    told = (
        r"2 of the 3 image\(s\) .*1\.png \(12000 × 9000 pixels are more than max_pixels=89478485\)"
        r", 2\.png \(its content is in none of the supported image formats"
    )
    with pytest.raises(DminError, match=rf"{told}.*data\.on_error=skip"):
        ImageFolder(tmp_path / "d")
    with pytest.warns(UserWarning, match=told):
        assert ImageFolder(tmp_path / "d", on_error="skip").ids == ["0.png"]
