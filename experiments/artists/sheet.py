"""A sheet of drawings: each query at the left, what is behind it at the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

COLOURS = {"Noto": "#2a6fdb", "Twemoji": "#e07b00", None: "#8a8a8a"}
SIDE, FRAME, GAP, AISLE, TYPE, HEAD = 128, 6, 16, 44, 21, 92


class Card(NamedTuple):
    """A drawing on the sheet."""

    picture: Image.Image
    artist: str | None
    below: str


def save_sheet(rows: Sequence[Sequence[Sequence[Card]]], heads: Sequence[str], path: Path) -> None:
    """Draw rows of blocks of cards, a head above each block, the colours of the artists on top."""
    pitch = SIDE + 2 * FRAME + GAP
    lefts, left = [], GAP
    for block in rows[0]:
        lefts.append(left)
        left += pitch * len(block) - GAP + AISLE
    step = SIDE + 2 * FRAME + TYPE + 22
    size = left - AISLE + GAP, HEAD + step * len(rows)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    plain, bold = _type("normal"), _type("bold")
    place = GAP
    for artist in ("Noto", "Twemoji"):
        pen.rectangle((place, 14, place + 22, 36), fill=COLOURS[artist])
        pen.text((place + 32, 12), f"drawn by {artist}", "#222222", plain)
        place += 60 + round(pen.textlength(f"drawn by {artist}", plain))
    for left, head in zip(lefts, heads, strict=True):
        pen.text((left, 52), head, "#222222", bold)
    for number, row in enumerate(rows):
        top = HEAD + step * number
        for left, block in zip(lefts, row, strict=True):
            for place, card in enumerate(block):
                x, edge = left + pitch * place, SIDE + 2 * FRAME
                pen.rectangle((x, top, x + edge - 1, top + edge - 1), fill=COLOURS[card.artist])
                shown = card.picture.resize((SIDE, SIDE), _filter(card.picture))
                sheet.paste(shown, (x + FRAME, top + FRAME))
                told = _fitted(pen, card.below, edge, plain)
                middle = x + (edge - pen.textlength(told, plain)) / 2
                pen.text((middle, top + edge + 1), told, "#444444", plain)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _filter(picture: Image.Image) -> Image.Resampling:
    """Keep the hard pixels of what was made at 32 × 32."""
    return Image.Resampling.NEAREST if picture.width <= 32 else Image.Resampling.LANCZOS


def _fitted(pen: ImageDraw.ImageDraw, text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    while text and pen.textlength(text, font) > room + GAP - 4:
        text = f"{text.rstrip('…')[:-1]}…"
    return text


def _type(weight: str) -> ImageFont.FreeTypeFont:
    properties = font_manager.FontProperties("DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties), TYPE)
