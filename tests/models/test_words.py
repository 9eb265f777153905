"""Learned words: prompts with them encode as trained, and their gradients are autograd's."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from models.families import EVERY, checkpoint
from oracle import Keep, backward
from safetensors.torch import load_file, save_file

from dmin.data import Example, collate
from dmin.gradients.groups import grouped
from dmin.gradients.parameters import choose_parameters
from dmin.models.base import per_example_loss
from dmin.runtime.errors import DminError

SD = "stable_diffusion"
PROMPTS = ["a <mug> cat", "dog", "<mug> on <mug>"]
ENCODERS = {
    SD: ["text_encoder"],
    "stable_diffusion_xl": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder", "text_encoder_2"],
}
TRAINERS = {
    "diffusers": lambda v: {"<mug>": v[0]},
    "A1111": lambda v: {"emb_params": v[0], "string_to_param.*": v[1]},
    "pair": lambda v: {"clip_l": v[0], "clip_g": v[1]},
    "T5": lambda v: {"clip_l": v[0], "t5": v[1]},
}
CASES = [
    (SD, "diffusers", 1),
    (SD, "diffusers", 3),
    ("stable_diffusion_xl", "pair", 2),
    ("stable_diffusion_xl", "A1111", 2),  # of two equally wide encoders, one after the other
    ("flux", "T5", 2),
]


def model_of(name, **settings):
    family = EVERY[name]
    return family.model.from_pretrained(checkpoint(name), **{**family.settings, **settings})


def vectors(name, count):
    torch.manual_seed(7)
    pipeline = model_of(name).pipeline
    widths = [getattr(pipeline, e).get_input_embeddings().embedding_dim for e in ENCODERS[name]]
    return [torch.randn(count, width) for width in widths]


def by_diffusers(name, own):
    """A model whose pipeline learned the words by diffusers' own code."""
    model = model_of(name)
    pipeline, count = model.pipeline, len(own[0])
    for encoder, each in zip(ENCODERS[name], own, strict=True):
        key = encoder.replace("text_encoder", "tokenizer")
        parts = {"tokenizer": getattr(pipeline, key), "text_encoder": getattr(pipeline, encoder)}
        pipeline.load_textual_inversion(
            {"<mug>": each if count > 1 else each[0]}, token="<mug>", **parts
        )
    return model


@pytest.mark.parametrize("name, trainer, count", CASES)
def test_prompts_encode_as_trained_and_gradients_are_autograds(name, trainer, count, tmp_path):
    own = vectors(name, count)
    save_file(TRAINERS[trainer](own), tmp_path / "<mug>.safetensors")
    model = model_of(name, embeddings=tmp_path / "<mug>.safetensors")
    oracle = by_diffusers(name, own)
    tokens = ["<mug>", *(f"<mug>_{n}" for n in range(1, count))]
    assert model.describe()["words"] == {e: [tokens] for e in ENCODERS[name]}
    assert set(model.describe()["text_encoders"]) == set(ENCODERS[name])
    images = [Example(c, torch.rand(3, 16, 16), caption=c) for c in PROMPTS]
    x0, condition = model.encode(collate(images))
    noise, t = torch.randn(x0.shape), torch.tensor([700, 20, 300])
    chosen = choose_parameters(model.network, "lora")
    assert len(chosen.entries) == len(own)
    assert grouped(chosen, "block").groups == tuple(ENCODERS[name])
    found, _ = backward(
        model.network,
        Keep(chosen),
        lambda: per_example_loss(model.predict(x0, noise, t, condition)),
    )
    layers = [getattr(oracle.pipeline, e).get_input_embeddings() for e in ENCODERS[name]]
    weights = [layer.weight.requires_grad_() for layer in layers]
    for b, image in enumerate(images):
        told = oracle._embed([image.caption])
        at, others = slice(b, b + 1), {k: v for k, v in condition.items() if "tokens" not in k}
        rest = {k: v[b : b + 1] for k, v in others.items() if k not in told}
        prediction = oracle.predict(x0[at], noise[at], t[at], {**told, **rest})
        expected = model.predict(x0[at], noise[at], t[at], {k: v[at] for k, v in condition.items()})
        torch.testing.assert_close(prediction.prediction, expected.prediction, rtol=1e-4, atol=1e-5)
        truth = torch.autograd.grad(per_example_loss(prediction).sum(), weights)
        for encoder, entry, gradient in zip(ENCODERS[name], chosen.entries, truth, strict=True):
            tokenizer = getattr(oracle.pipeline, encoder.replace("text_encoder", "tokenizer"))
            rows = gradient[tokenizer.convert_tokens_to_ids(tokens)]
            assert (rows.norm() > 0) == ("<mug>" in image.caption)
            assert (found[entry.name][b] - rows).norm() <= 1e-4 * max(rows.norm(), 1e-6)


LORA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def test_words_in_the_file_of_an_adapter_and_saved(tmp_path):
    torch.manual_seed(0)
    factors = {f"{LORA}.lora_{x}.weight": torch.randn(16, 16) for x in ("down", "up")}
    two, one = torch.randn(2, 16), torch.randn(16)
    words = {"bundle_emb.<mug>.clip_l": two, "bundle_emb.x.y.clip_l": one}
    save_file({**factors, **words}, tmp_path / "a.safetensors")
    model = model_of(SD, adapter=tmp_path / "a.safetensors")
    named = {entry.name for entry in choose_parameters(model.network, "lora").entries}
    learned = "text_encoder.embeddings.token_embedding.learned.default.weight"
    assert learned in named and len(named) == 3
    assert torch.equal(model.network.get_parameter(learned), torch.cat([two, one[None]]))
    frozen = model_of(SD, adapter=tmp_path / "a.safetensors", text_encoders="frozen")
    prompts = ["a <mug>", "x.y dog"]
    found, plain = frozen.condition(prompts), model_of(SD).condition(prompts)
    assert all((found[key][b] - plain[key][b]).abs().max() > 1e-3 for key in found for b in (0, 1))
    model.save_pretrained(tmp_path / "saved")
    again = model_of(SD).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.condition(prompts), plain)
    saved = {"adapter": tmp_path / "saved/lora/default", "text_encoders": "frozen"}
    same = again.from_pretrained(tmp_path / "saved", **saved)
    torch.testing.assert_close(same.condition(prompts), found)
    file = tmp_path / "saved/lora/words.safetensors"
    for setting in ("embeddings", "adapter"):  # a file of words alone
        given = {setting: file, "text_encoders": "frozen"}
        same = again.from_pretrained(tmp_path / "saved", **given)
        torch.testing.assert_close(same.condition(prompts), found)
        assert same.describe()["words"] == frozen.describe()["words"]


def test_a_word_of_another_name_is_another_model(tmp_path):
    save_file({"emb_params": torch.ones(1, 16)}, tmp_path / "mug.safetensors")
    told = [
        model_of(SD, embeddings=given, text_encoders="frozen").describe()
        for given in (
            [tmp_path / "mug.safetensors"],
            f"<mug>={tmp_path / 'mug.safetensors'}",
        )
    ]
    assert (
        told[0]["words"] == {"text_encoder": [["mug"]]}
        and told[0]["encoders"] == told[1]["encoders"]
    )
    assert told[1]["words"] == {"text_encoder": [["<mug>"]]}


ONES = torch.ones(16)


@pytest.mark.parametrize(
    "name, file, state, said",
    [
        (SD, "cat", {"<x>": torch.ones(24)}, r"vectors of 24 .*text_encoder has 16"),
        ("dit", "cat", {"<x>": ONES}, r"vectors of 16 .*have none"),
        (SD, "a", {"emb_params": ONES}, r"tokenizer already has a.*NAME=FILE"),
        (SD, "cat", {"<y>": torch.ones(2, 16), "<y>_1": ONES}, "another of these words"),
        (SD, "cat", {"<x>": ONES.int()}, r"int32.*not a learned word"),
        (SD, "cat", {"<x>": ONES / 0}, "not finite"),
        (SD, "cat", {"bundle_emb.z.clip_l_out": ONES}, r"belongs to none of .* clip_l"),
        (
            SD,
            "cat",
            {"clip_l": ONES, "clip_l_out": ONES + 1},
            r"cat\.clip_l_out belongs to none of",
        ),
        ("stable_diffusion_3", "cat", {"clip_l": torch.ones(2, 16)}, "supports one for each"),
        ("flux", "cat", {"clip_g": torch.ones(1, 24)}, "but this model's encoders have"),
    ],
)
def test_words_that_do_not_fit_are_refused(name, file, state, said, tmp_path):
    save_file(state, tmp_path / f"{file}.safetensors")
    with pytest.raises(DminError, match=said):
        model_of(name, embeddings=str(tmp_path / f"{file}.safetensors"))


def test_files_that_are_no_words(tmp_path):
    vector = torch.randn(2, 16)
    torch.save({"string_to_param": {"*": vector}, "name": "mug"}, tmp_path / "mug.pt")
    with pytest.raises(DminError, match=r"a pickle, .*Convert it: python -c") as refused:
        model_of(SD, embeddings=tmp_path / "mug.pt")
    line = str(refused.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    assert torch.equal(load_file(tmp_path / "mug.safetensors")["emb_params"], vector)
    with pytest.raises(DminError, match=r"cannot be read as a \.safetensors file"):
        model_of(SD, embeddings=tmp_path / "nowhere.safetensors")
    save_file({"<x>": torch.ones(16), "<y>": torch.ones(16)}, tmp_path / "two.safetensors")
    with pytest.raises(DminError, match=r"has 2 words \(<x>, <y>\): use one of these"):
        model_of(SD, embeddings=f"z={tmp_path / 'two.safetensors'}")


def test_a_caption_that_would_be_pooled_at_a_word_is_refused(tmp_path):
    """CLIP's older configs: the end of a caption is its highest token, and words come behind it."""
    shutil.copytree(checkpoint("stable_diffusion_xl"), tmp_path / "xl")
    file = tmp_path / "xl/text_encoder_2/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 2}))
    save_file({"clip_l": torch.ones(16)}, tmp_path / "one.safetensors")
    save_file({"clip_g": torch.ones(16)}, tmp_path / "two.safetensors")
    family = EVERY["stable_diffusion_xl"].model
    family.from_pretrained(tmp_path / "xl", embeddings=tmp_path / "one.safetensors")
    with pytest.raises(DminError, match=r"text_encoder_2/config\.json.*Set eos_token_id=1 there,"):
        family.from_pretrained(tmp_path / "xl", embeddings=tmp_path / "two.safetensors")
