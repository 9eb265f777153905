"""Which keys each trainer has, and what they mean, from ``tables/TRAINER.yaml``."""

import functools
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from dmin.runs import wording


class Setting(NamedTuple):
    """The setting of dmin that corresponds to a key of a trainer."""

    name: str  # of the model's setting
    default: Any = None  # the trainer's, if it differs from the setting's own
    kind: type = float
    nothing: Any = 0  # the value that turns it off
    families: str = ""  # families it applies to, separated by blanks; "": all with the setting


class Table(NamedTuple):
    """How the keys of a section of a config are handled. A text has several keys between blanks.

    Attributes:
        settings: key → setting of the model.
        other: meaning → keys that change the loss to one that dmin does not compute.
        random: meaning → keys that make the data random.
        rounded: key of the base model's quantisation → the trainer's value → model.base_dtype.
        inert: keys that do not change gradients at the final weights; ``*`` at the end: any suffix.
        nothing: values that turn a key off, besides false, zero and none.
    """

    settings: Mapping[str, Setting] = {}
    other: Mapping[str, str] = {}
    random: Mapping[str, str] = {}
    rounded: Mapping[str, Mapping[str, str]] = {}
    inert: str = ""
    nothing: Collection[Any] = ()


@functools.cache
def _yaml(trainer: str) -> dict[str, Any]:
    text = files("dmin.runs").joinpath(f"tables/{trainer}.yaml").read_text("utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def families(trainer: str, section: str = "families") -> dict[str, str | None]:
    """Return name of the trainer → family; None: to be read from the base model."""
    found = _yaml(trainer).get(section, {})
    known = {"base": None}
    return {name: known.get(family, family) for family in found for name in found[family].split()}


@functools.cache
def table(trainer: str, section: str) -> Table:
    """Return how the keys of a section are handled, from ``tables/TRAINER.yaml``."""
    found = dict(_yaml(trainer)[section])
    kinds = {"float": float, "int": int}
    for what in ("other", "random"):
        found[what] = {getattr(wording, k, k): keys for k, keys in found.get(what, {}).items()}
    found["settings"] = {
        key: Setting(**{**each, "kind": kinds[each.get("kind", "float")]})
        for key, each in found.get("settings", {}).items()
    }
    return Table(**found)


# Settings that only some families have.
FLOWS = (
    *("flux", "flux_2", "stable_diffusion_3", "sana", "chroma", "qwen_image", "z_image"),
    *("lumina_2", "wan", "flux_kontext", "flux_fill", "flux_control"),
)
# Families whose networks receive a second image with each example.
GIVEN = (
    *("flux_kontext", "flux_fill", "flux_control", "instruct_pix2pix", "instruct_pix2pix_xl"),
    *("stable_diffusion_inpaint", "stable_diffusion_xl_inpaint", "stable_diffusion_depth"),
)
