"""Pretrained encoders, tiny ones, against what transformers itself makes of the images."""

import json

import numpy as np
import pytest
import torch
from made_stores import drawn, made
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from dmin.attribution import EncoderCosine, FeatureSet, score_matrix
from dmin.data import Example, Examples
from dmin.runtime.errors import DminError

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def clip():
    vision, text = {**TOWER, "image_size": 16, "patch_size": 8}, {**TOWER, "vocab_size": 50}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def dino():
    sizes = {k: v for k, v in TOWER.items() if k != "intermediate_size"}
    return Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14))


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("encoder"), torch.Generator().manual_seed(0)
    made_sides = []
    for role, count in (("q", 2), ("x", 7)):
        images = torch.rand(count, 3, 16, 16, generator=generator)
        store = made(folder / role, drawn(count))
        examples = [Example(i, x) for i, x in zip(store.ids, images, strict=True)]
        made_sides.append(FeatureSet(store, Examples(examples)))
    return tuple(made_sides)


@pytest.mark.parametrize("build", [clip, dino])
def test_scores_are_cosines_of_the_models_own_features(build, sides, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    size = 16 if build is clip else 28
    kept = {"image_mean": mean, "image_std": std, "size": {"height": size, "width": size}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    rows = []
    for side in sides:
        images = torch.stack([side.image(i) for i in side.store.ids])
        if build is clip:  # of the encoder's size already
            prepared = CLIPImageProcessorPil(
                **kept, do_center_crop=False, do_rescale=False, do_resize=False
            )([x.numpy() for x in images], return_tensors="pt", input_data_format="channels_first")[
                "pixel_values"
            ]
        else:
            large = torch.nn.functional.interpolate(images, 28, mode="bicubic", antialias=True)
            prepared = (large.clamp(0, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
                std
            ).view(3, 1, 1)
        with torch.no_grad():
            if build is clip:
                out = model.visual_projection(model.vision_model(prepared).pooler_output)
            else:
                out = model(prepared).pooler_output
        rows.append(torch.nn.functional.normalize(out, dim=1))
    found = score_matrix(*sides, EncoderCosine(str(tmp_path), batch_size=3))
    assert np.abs(found - (rows[0] @ rows[1].T).numpy()).max() < 1e-3
    assert np.allclose(found, score_matrix(*sides, EncoderCosine(str(tmp_path)), rows=2), atol=1e-5)


def test_what_is_no_image_encoder_is_refused(sides, tmp_path):
    with pytest.raises(DminError, match=r"no config\.json"):
        score_matrix(*sides, EncoderCosine(str(tmp_path)))
    BertModel(BertConfig(vocab_size=50, **TOWER)).save_pretrained(tmp_path)
    with pytest.raises(DminError, match="does not take images"):
        score_matrix(*sides, EncoderCosine(str(tmp_path)))
    with pytest.raises(DminError, match="batch_size=0"):
        EncoderCosine("x", batch_size=0)
