"""Tiny pipelines of networks that are given an image; built as in `models.tiny`."""

import functools
import tempfile

import diffusers
import transformers
from models.tiny import BUILDERS, flux, stable_diffusion, stable_diffusion_xl, vae
from models.tiny_flows import qwen_image, words

from dmin.models.families.qwen_image import processor_of_images

SEEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SD, XL = (stable_diffusion, {"requires_safety_checker": False}), (stable_diffusion_xl, {})
NO_DEPTHS = {"depth_estimator": None, "feature_extractor": None}
PAIRS = {  # of another family: its pipeline, the channels that its network takes, and changes
    "stable_diffusion_inpaint": (*SD, "StableDiffusionInpaintPipeline", 9),
    "stable_diffusion_xl_inpaint": (*XL, "StableDiffusionXLInpaintPipeline", 9),
    "stable_diffusion_depth": (SD[0], NO_DEPTHS, "StableDiffusionDepth2ImgPipeline", 5),
    "instruct_pix2pix": (*SD, "StableDiffusionInstructPix2PixPipeline", 8),
    "instruct_pix2pix_xl": (*XL, "StableDiffusionXLInstructPix2PixPipeline", 8),
    "flux_kontext": (flux, {}, "FluxKontextPipeline", 16),
    "flux_fill": (flux, {}, "FluxFillPipeline", 16 + 16 + 4 * 64),
    "flux_control": (flux, {}, "FluxControlPipeline", 32),
}


def given(build, changes, pipeline, channels, **told):
    """A family's tiny pipeline as another class, with a network of more channels."""
    found = build(**told).components
    name = "transformer" if "transformer" in found else "unet"
    settings = {n: v for n, v in found[name].config.items() if n[0] != "_"}
    out = settings["out_channels"] or settings["in_channels"]
    settings |= {"in_channels": channels, "out_channels": out}
    parts = {**found, name: type(found[name])(**settings), **changes}
    if "Fill" in pipeline:  # whose mask has 8 × 8 pixels for each latent
        parts["vae"] = vae(stages=4, shift_factor=0.1, scaling_factor=0.4)
    kind = getattr(diffusers, pipeline)
    names = kind.__init__.__code__.co_varnames
    return kind(**{name: part for name, part in parts.items() if name in names})


def qwen_image_edit():
    parts, tokenizer = qwen_image().components, words(*SEEN)
    start, _, image, video = tokenizer.convert_tokens_to_ids(SEEN)
    ids = {"vision_start_token_id": start, "image_token_id": image, "video_token_id": video}
    parts["text_encoder"].config.update(ids)
    with tempfile.TemporaryDirectory() as folder:  # as transformers makes it of torchvision alone
        for part in (tokenizer, transformers.Qwen2VLImageProcessor()):
            part.save_pretrained(f"{folder}/processor")
        processor = processor_of_images(folder)
    parts.update(tokenizer=tokenizer, processor=processor)
    return diffusers.QwenImageEditPipeline(**parts)


BUILDERS["qwen_image_edit"] = qwen_image_edit
BUILDERS.update({name: functools.partial(given, *how) for name, how in PAIRS.items()})
