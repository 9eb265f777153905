"""The table of families that the tests run over, and their tiny models."""

import functools
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import tiny_flows, tiny_pairs  # noqa: F401  (add their builders)
from models.tiny import save

from dmin.models.families.chroma import Chroma
from dmin.models.families.control import FluxControl, StableDiffusionDepth
from dmin.models.families.dit import DiT
from dmin.models.families.flux import Flux
from dmin.models.families.flux_2 import Flux2
from dmin.models.families.flux_kontext import FluxKontext
from dmin.models.families.hunyuan_dit import HunyuanDiT
from dmin.models.families.inpainting import (
    FluxFill,
    StableDiffusionInpaint,
    StableDiffusionXLInpaint,
)
from dmin.models.families.instruct_pix2pix import InstructPix2Pix, InstructPix2PixXL
from dmin.models.families.lumina_2 import Lumina2
from dmin.models.families.pixart import PixArt
from dmin.models.families.qwen_image import QwenImage, QwenImageEdit
from dmin.models.families.sana import Sana
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.models.families.stable_diffusion_3 import StableDiffusion3
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLRefiner
from dmin.models.families.wan import Wan
from dmin.models.families.z_image import ZImage
from dmin.models.oracle import example_given

SMALL = {"max_sequence_length": 12, "sample_size": (16, 16)}


@dataclass(frozen=True)
class Family:
    """What the tests need to know of one."""

    model: type
    latent: tuple[int, ...]
    condition: dict[str, tuple[int, ...]]  # shapes without the batch
    predictions: tuple[str, ...] = ("epsilon",)
    size: int = 16
    settings: dict = field(default_factory=dict)
    unguided: dict = field(default_factory=dict)  # beside guidance_scale=1
    timesteps: tuple[float, ...] = (700, 20)
    prompts: tuple = ("a red cat", "dog", "blue")
    frames: tuple[int, ...] = ()  # of clips, one number

    @property
    def shape(self):
        return (3, *self.frames, self.size, self.size)


EVERY = {
    "stable_diffusion": Family(
        StableDiffusion,
        (4, 8, 8),
        {"encoder_hidden_states": (8, 16)},
        ("epsilon", "v_prediction", "sample"),
    ),
    "stable_diffusion_xl": Family(
        StableDiffusionXL,
        (4, 8, 8),
        {"encoder_hidden_states": (8, 32), "text_embeds": (16,), "time_ids": (6,)},
        ("epsilon", "v_prediction"),
    ),
    "stable_diffusion_3": Family(
        StableDiffusion3,
        (4, 8, 8),
        {"encoder_hidden_states": (8 + 12, 32), "pooled_projections": (32,)},
        ("flow",),
        settings={"max_sequence_length": 12},
    ),
    "flux": Family(
        Flux,
        (4, 8, 8),
        {"encoder_hidden_states": (12, 16), "pooled_projections": (16,)},
        ("flow",),
        settings={"max_sequence_length": 12, "sample_size": (16, 16)},
        unguided={"embedded_guidance": 1.0},
    ),
    "dit": Family(DiT, (4, 8, 8), {"class_labels": ()}, ("epsilon",), prompts=(3, 0, 999)),
    "pixart": Family(
        PixArt,
        (4, 8, 8),
        {"encoder_hidden_states": (12, 16), "encoder_attention_mask": (12,)},
        ("epsilon",),
        settings={"max_sequence_length": 12},
    ),
    "sana": Family(
        Sana,
        (4, 16, 16),
        {"encoder_hidden_states": (12, 8), "encoder_attention_mask": (12,)},
        ("flow",),
        size=32,
        settings={"max_sequence_length": 12},
    ),
    "hunyuan_dit": Family(
        HunyuanDiT,
        (4, 4, 4),
        {
            "encoder_hidden_states": (77, 16),
            "text_embedding_mask": (77,),
            "encoder_hidden_states_t5": (256, 16),
            "text_embedding_mask_t5": (256,),
            "image_meta_size": (6,),
            "style": (),
        },
        ("v_prediction", "epsilon"),
        size=32,
    ),
    "chroma": Family(
        Chroma,
        (4, 8, 8),
        {"encoder_hidden_states": (12, 16), "attention_mask": (12,)},
        ("flow",),
        settings=SMALL,
    ),
    "qwen_image": Family(
        QwenImage,
        (4, 8, 8),
        {"encoder_hidden_states": (12, 16), "encoder_hidden_states_mask": (12,)},
        ("flow",),
        settings=SMALL,
    ),
    "z_image": Family(
        ZImage,
        (4, 8, 8),
        {"cap_feats": (12, 16), "mask": (12,)},
        ("flow",),
        settings=SMALL,
        unguided={"guidance_scale": 0.0},
    ),
    "lumina_2": Family(
        Lumina2,
        (4, 4, 4),
        {"encoder_hidden_states": (48, 16), "encoder_attention_mask": (48,)},
        ("flow",),
        size=32,
        settings={"max_sequence_length": 48},
    ),
    "flux_2": Family(
        Flux2,
        (4, 8, 8),
        {"encoder_hidden_states": (64, 48)},
        ("flow",),
        settings={**SMALL, "max_sequence_length": 64},
        unguided={"embedded_guidance": 1.0},
    ),
    "wan": Family(
        Wan,
        (4, 4, 4),
        {"encoder_hidden_states": (12, 16)},
        ("flow",),
        size=32,
        settings={"max_sequence_length": 12, "sample_size": (32, 32)},
    ),
}
EVERY["stable_diffusion_xl_refiner"] = replace(
    EVERY["stable_diffusion_xl"],
    model=StableDiffusionXLRefiner,
    condition={**EVERY["stable_diffusion_xl"].condition, "time_ids": (5,)},
    predictions=("epsilon",),
    settings={"aesthetic_score": 6.0, "trained_below": 1000},
)
CLIPS = {"max_sequence_length": 12, "sample_size": (32, 32), "sample_frames": 5}
VIDEOS = {
    name: replace(EVERY["wan"], latent=(4, 2, 4, 4), frames=(5,), settings=CLIPS)
    for name in ("wan_clips", "wan_2_2")
}
EVERY |= VIDEOS


def beside(of, model, channels, **changes):
    """A family that is given an image beside what another is given."""
    base = EVERY[of]
    latent = changes.get("latent", base.latent)
    condition = {**base.condition, "beside": (channels, *latent[1:])}
    changes = {"condition": condition, "predictions": base.predictions[:1], **changes}
    return replace(base, model=model, **changes)


FILL = {"size": 32, "settings": {"max_sequence_length": 12, "sample_size": (32, 32)}}
PAIRS = {
    "stable_diffusion_inpaint": beside("stable_diffusion", StableDiffusionInpaint, 5),
    "stable_diffusion_xl_inpaint": beside("stable_diffusion_xl", StableDiffusionXLInpaint, 5),
    "stable_diffusion_depth": beside("stable_diffusion", StableDiffusionDepth, 1),
    "instruct_pix2pix": beside("stable_diffusion", InstructPix2Pix, 4),
    "instruct_pix2pix_xl": beside("stable_diffusion_xl", InstructPix2PixXL, 4),
    "flux_kontext": beside("flux", FluxKontext, 4),
    "flux_fill": beside("flux", FluxFill, 68, latent=(4, 4, 4), **FILL),
    "flux_control": beside("flux", FluxControl, 4),
    "qwen_image_edit": beside(
        "qwen_image",
        QwenImageEdit,
        4,
        condition={
            "encoder_hidden_states": (24, 16),
            "encoder_hidden_states_mask": (24,),
            "beside": (4, 16, 16),
        },
        settings={**SMALL, "max_sequence_length": 24, "condition_area": 32 * 32},
    ),
}
EVERY |= PAIRS
ALIKE = {*PAIRS} - {"stable_diffusion_inpaint", "flux_kontext", "qwen_image_edit"}
LATER = ("chroma", "qwen_image", "z_image", "lumina_2", "flux_2", "wan", *VIDEOS, *PAIRS)
LATER += ("stable_diffusion_xl_refiner",)
FAMILIES = {
    name: family
    for name, family in EVERY.items()
    if name not in LATER or os.environ.get("DMIN_CONFORMANCE")
}
"""Those that every test runs over; over the others what settles a family, and by `make conformance`
all of it."""
ROWS = [name for name in EVERY if name in FAMILIES or name not in ALIKE]
"""Those whose rows are held to autograd's: of networks that differ by channels alone, one."""


_FOLDER = tempfile.TemporaryDirectory()  # as long as the tests run


@functools.cache
def checkpoint(family, **changes):
    """Return the folder of a family's tiny checkpoint, made when first asked for."""
    return save(family, Path(tempfile.mkdtemp(prefix=family, dir=_FOLDER.name)), **changes)


@functools.cache
def load(name, kind=None, **settings):
    """Return a family's tiny model; tests must not change it."""
    family = EVERY[name]
    changes = {} if kind in (None, "flow") else {"prediction_type": kind}
    return family.model.from_pretrained(
        checkpoint(name, **changes), **{**family.settings, **settings}
    )


def shown(model, image):
    """What an example has beside its image: a grey condition image, if its model reads some."""
    if not model.reads_condition_images({}):
        return {}
    return {"condition_image": image.flip(1)[:1].expand(3, -1, -1)}


def sample(model, prompts, seeds, steps):
    """Return images that a model generates, with images that it is given if it needs some."""
    given = example_given(model)
    if given is None:
        return model.sample(prompts, seeds, steps)
    shown = {name: image.expand(len(prompts), -1, -1, -1) for name, image in given.items()}
    return model.sample(prompts, seeds, steps, given=shown)
