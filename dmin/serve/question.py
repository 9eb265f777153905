"""Requests of a browser, validated before anything else is done with them."""

from __future__ import annotations

import base64
import binascii
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmin.data.formats import suffixes
from dmin.data.pixels import Pixels
from dmin.runtime.errors import DminError

SIDE_BY_SIDE = 4  # most methods in one question
SHOWN = 3  # examples with attribution maps, if these are requested
MASK = "mask.png"
_NUMBERS = {"k": (1, 1000), "seed": (0, 2**31 - 1), "steps": (1, 1000)}
_NONE_YET = {"region": "There is no rectangle: draw one", "mask": "Nothing is painted: paint it"}


@dataclass(frozen=True)
class Question:
    """A picture, or the prompt and seed of one to generate, and settings of the answer.

    Args:
        prompt: caption or class; empty for none.
        methods: names, one or more.
        k: training examples shown.
        seed: of a generated picture, in denoising ``steps``.
        picture: file name and content; None: a picture is generated.
        region: ``(x, y, width, height)`` in pixels, the part asked about.
        mask: a PNG, white in the part asked about.
        places: number of examples with attribution maps.
    """

    prompt: str
    methods: tuple[str, ...]
    k: int
    seed: int
    steps: int
    picture: tuple[str, bytes] | None = None
    region: tuple[int, ...] | None = None
    mask: bytes | None = None
    places: int = 0

    @classmethod
    def read(cls, sent: Mapping[str, Any], upload_mb: float, known: Collection[str]) -> Question:
        """Validate a browser's request and return its question.

        Args:
            sent: untrusted JSON: ``picture`` (``name``, and ``data`` in base64), ``part`` (the
                selected tool), ``region``, ``mask`` (base64), and the fields of the form.
            upload_mb: size of the largest picture accepted, in MB.
            known: available methods.

        Raises:
            DminError: a value is not allowed; the message says what is.
        """
        prompt, methods, picture = (sent.get(name) for name in ("prompt", "methods", "picture"))
        if not isinstance(prompt, str) or len(prompt) > 4000 or "\0" in prompt:
            raise DminError("The prompt must be text of at most 4,000 characters.")
        names = [str(each) for each in methods] if isinstance(methods, list) else []
        if not 1 <= len({*names}) == len(names) <= SIDE_BY_SIDE or {*names} - {*known}:
            raise DminError(f"Choose 1 … {SIDE_BY_SIDE} of the listed methods, each once.")
        form: dict[str, Any] = {n: _whole(sent.get(n), n, *span) for n, span in _NUMBERS.items()}
        places = SHOWN * (sent.get("places") is True)
        form |= {"prompt": prompt, "methods": tuple(names), "places": places}
        if picture is None:
            if not prompt:
                raise DminError("Give a prompt for the picture to generate: a caption, or a class.")
            return cls(**form)
        part, region, mask = (sent.get(name) for name in ("part", "region", "mask"))
        if part in ("region", "mask") and sent.get(part) is None:
            raise DminError(f"{_NONE_YET[part]}, or ask about the whole picture.")
        if region is not None:
            sides = region if isinstance(region, list) and len(region) == 4 else [None]
            region = tuple(_whole(n, "number of the rectangle", 0, 10**6) for n in sides)
        mask = None if mask is None else _decoded(mask, MASK, upload_mb)
        return cls(**form, picture=_picture(picture, upload_mb), region=region, mask=mask)

    @property
    def asked(self) -> int | str | None:
        """The prompt as `dmin retrieve --prompt` reads it: a number is a class."""
        return int(self.prompt) if self.prompt.isdecimal() else self.prompt or None

    def line(self, words: Sequence[str]) -> str:
        """Return the command that gives the same answer; ``words`` has store and settings."""
        said = ["dmin", "retrieve", *words, *([self.picture[0]] if self.picture else [])]
        said += [f"--prompt={self.prompt}"] if self.prompt else []
        if self.picture is None:
            said += [f"queries.seed={self.seed}", f"queries.steps={self.steps}"]
        said += [f"--region={','.join(map(str, self.region))}"] if self.region else []
        said += [f"--mask={MASK}"] if self.mask else []
        said += [f"--places={self.places}"] if self.places else []
        return shlex.join([*said, f"method={','.join(self.methods)}", f"retrieve.k={self.k}"])

    def settings(self, folder: Path) -> dict[str, Any]:
        """Write picture and mask into a folder; return the settings of these queries."""
        name, content = self.picture or ("", b"")
        file, mask = folder / "picture" / name, folder / MASK
        file.parent.mkdir()
        file.write_bytes(content)
        mask.write_bytes(self.mask or b"")
        place = str(mask) if self.mask else None
        return {"root": str(file), "prompt": self.asked, "region": self.region, "mask": place}


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        raise DminError(f"{value!r:.40} is no {what}: give a whole number, {low} … {high:,}.")
    return int(value)


def _picture(sent: Any, upload_mb: float) -> tuple[str, bytes]:
    """Return a safe file name without folders, and the content."""
    said = sent if isinstance(sent, Mapping) else {}
    last = re.split(r"[/\\]", str(said.get("name", "")))[-1]
    name = re.sub(r"[^\w. ()+-]", "_", last).lstrip(". -")[-80:] or "picture"
    if Path(name).suffix.lower() not in suffixes():
        raise DminError(
            f"{name} does not have the suffix of a picture: use one of {', '.join(suffixes())}."
        )
    return name, _decoded(said.get("data"), name, upload_mb)


def _decoded(sent: Any, name: str, upload_mb: float) -> bytes:
    """Decode a picture from base64, check that it can be read, and return its bytes."""
    size = len(sent) * 0.75e-6 if isinstance(sent, str) else 0.0
    if size > upload_mb + 1e-5:
        raise DminError(
            f"{name} has {size:,.1f} MB, of at most {upload_mb:g}. Make it smaller (it is scaled "
            f"to the model's size anyway), or serve with serve.upload_mb=…"
        )
    try:
        content = base64.b64decode(sent, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DminError(f"{name} arrived empty or damaged. Drop it again.") from error
    Pixels(mode=None).decode(content, name)
    return content
