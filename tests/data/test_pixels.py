"""Every kind of image file comes out as stated, or is refused by name."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_on_disk import encoded
from PIL import Image

from dmin.data.formats import FORMATS
from dmin.data.image_folder import ImageFolder
from dmin.data.pixels import Pixels, Unreadable, buckets
from dmin.runtime.errors import DminError

RED = (255, 0, 0)


def refused(content, message, **settings):
    """Both ways to look at a file must find the same fault with it."""
    pixels = Pixels(**settings)
    for look in (pixels.decode, pixels.probe):
        with pytest.raises(Unreadable, match=message):
            look(content, "x")


def decode(picture, kind="PNG", settings=None, **options):
    return Pixels(**(settings or {})).decode(encoded(picture, kind, **options), "x").image


def mean(image):
    return [round(float(channel.mean()), 2) for channel in image]


def palette():
    picture = Image.new("P", (4, 3), 1)
    picture.putpalette([0, 0, 0, *RED])
    return picture


@pytest.mark.parametrize(
    ("picture", "kind", "options", "expected"),
    [
        (Image.new("RGB", (4, 3), RED), "PNG", {}, [1, 0, 0]),
        (palette(), "PNG", {}, [1, 0, 0]),
        (palette(), "PNG", {"transparency": 1}, [1, 1, 1]),
        (palette(), "GIF", {}, [1, 0, 0]),
        (Image.new("RGB", (4, 3), RED), "PNG", {"transparency": RED}, [1, 1, 1]),
        (Image.new("RGBA", (4, 3), (*RED, 0)), "PNG", {}, [1, 1, 1]),
        (Image.new("RGBA", (4, 3), (*RED, 51)), "PNG", {}, [1, 0.8, 0.8]),
        (Image.new("LA", (4, 3), (0, 0)), "PNG", {}, [1, 1, 1]),
        (Image.new("LA", (4, 3), (0, 255)), "PNG", {}, [0, 0, 0]),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "TIFF", {}, [1, 0, 0]),
        (Image.new("1", (4, 3), 1), "PNG", {}, [1, 1, 1]),
        (Image.new("L", (4, 3), 51), "BMP", {}, [0.2, 0.2, 0.2]),
        (Image.fromarray(np.full((3, 4), 13107, np.uint16)), "PNG", {}, [0.2, 0.2, 0.2]),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), "PNG", {}, [1, 1, 1]),
        (Image.fromarray(np.full((3, 4), 13107, np.int32)), "TIFF", {}, [0.2, 0.2, 0.2]),
        (Image.new("RGB", (4, 3), RED), "WEBP", {"lossless": True}, [1, 0, 0]),
        (Image.new("RGB", (1, 1), RED), "PNG", {}, [1, 0, 0]),
    ],
)
def test_every_mode_is_read_for_what_it_shows(picture, kind, options, expected):
    image = decode(picture, kind, **options)
    assert image.dtype == torch.float32 and image.shape[1:] == picture.size[::-1]
    assert mean(image) == expected
    Pixels().probe(encoded(picture, kind, **options), "x")


def test_what_stands_behind_transparent_pixels_is_a_setting():
    clear = Image.new("RGBA", (2, 2), (*RED, 0))
    assert mean(decode(clear, settings={"background": "#003300"})) == [0, 0.2, 0]
    assert mean(decode(clear, settings={"background": "black", "mode": "L"})) == [0]


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3)]
)
def test_without_a_mode_grey_stays_grey(mode, channels):
    assert len(decode(Image.new(mode, (2, 2)), settings={"mode": None})) == channels
    assert len(decode(Image.new(mode, (2, 2)), settings={"mode": "RGB"})) == 3
    assert len(decode(Image.new(mode, (2, 2)), settings={"mode": "L"})) == 1


def test_the_exif_orientation_is_followed():
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 3] = 255  # light on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn right
    image = decode(pixels, "PNG", exif=exif)
    assert image.shape == (3, 4, 2) and image[:, 3].min() == 1 and image[:, :3].max() == 0


def bars():
    """Three squares side by side, red, green and blue."""
    return np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize("resize", [True, False])
def test_the_middle_is_cut_out(resize):
    image = decode(bars(), settings={"size": 8, "resize": resize})
    assert image.shape == (3, 8, 8) and mean(image[:, :, 2:6]) == [0, 1, 0]


def test_without_a_crop_the_whole_image_is_squeezed():
    image = decode(bars(), settings={"size": 6, "crop": "none"})
    assert image.shape == (3, 6, 6) and image[0, :, 0].min() > 0.8 and image[2, :, 5].min() > 0.8


BUCKETS = {"size": 64, "aspect": "buckets", "bucket_step": 16}


def test_images_are_scaled_down_alone_where_asked_and_listed_buckets_give_the_nearest():
    small, large = Image.new("RGB", (40, 20)), Image.new("RGB", (200, 100))
    settings = {**BUCKETS, "upscale": False}
    shapes = [decode(p, settings=settings).shape[-2:] for p in (small, large)]
    assert shapes == [(16, 32), (32, 80)]
    assert decode(small, settings=BUCKETS).shape[-2:] == (48, 80)
    listed = {**BUCKETS, "bucket_shapes": [[64, 64], [40, 88]]}
    assert [decode(p, settings=listed).shape[-2:] for p in (small, large)] == [(40, 88)] * 2
    assert decode(Image.new("RGB", (60, 64)), settings=listed).shape[-2:] == (64, 64)
    assert Pixels(**listed).settings()["bucket_shapes"] == [[64, 64], [40, 88]]
    assert "upscale" not in Pixels(**BUCKETS).settings()
    with pytest.raises(DminError, match=r"need data\.aspect=buckets"):
        Pixels(upscale=False)


@pytest.mark.parametrize("ratio", ["log", "width/height", "height/width"])
def test_an_image_between_two_buckets_goes_where_its_trainer_puts_it(ratio):
    shapes = sorted([[64, 64], [32, 96], [96, 32], [48, 80], [80, 48]], key=lambda s: s[1])
    settings = {**BUCKETS, "bucket_shapes": shapes, "bucket_ratio": ratio}
    measure = {"log": np.log, "width/height": np.asarray, "height/width": np.reciprocal}[ratio]
    ratios, found = np.array([w / h for h, w in shapes]), set()
    for width in (20, 24, 28, 33, 47, 50, 52, 53, 60, 76, 90, 91, 93, 95, 130):
        shape = decode(Image.new("RGB", (width, 40)), settings=settings).shape[-2:]
        nearest = np.abs(measure(ratios) - measure(np.float64(width / 40))).argmin()
        assert list(shape) == shapes[nearest], (width, ratio)
        found.add((width, shape))
    assert ((53, (64, 64)) in found) == (ratio == "width/height")
    told = Pixels(**settings).settings()
    assert told.get("bucket_ratio", "log") == ratio
    with pytest.raises(DminError, match="choose one of log, width/height"):
        Pixels(bucket_ratio="width")


def test_data_whose_small_images_were_cut_otherwise_before_are_other_data(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    told = [ImageFolder(tmp_path, **BUCKETS, upscale=up).describe() for up in (True, False)]
    assert "sides" not in told[0] and told[1]["sides"] == "multiples of bucket_step"


def test_buckets_have_about_as_many_pixels_as_the_square():
    for size, step in ((1024, 64), (512, 64), (64, 16)):
        shapes = buckets(size, step)
        assert (size, size) in shapes and shapes == tuple((w, h) for h, w in reversed(shapes))
        for shape in shapes:
            short, long = sorted(shape)
            assert short % step == long % step == 0 and short * 2 >= size
            assert short * long <= size * size < short * (long + step)
    published = {(1024, 1024), (832, 1216), (768, 1344), (704, 1472), (640, 1600), (512, 2048)}
    assert published < set(buckets(1024, 64))  # of SDXL's own list


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(50, 50, (64, 64)), (90, 60, (48, 80)), (60, 90, (80, 48)), (640, 50, (32, 128))],
)
def test_an_image_goes_to_the_bucket_of_the_nearest_aspect_ratio(width, height, expected):
    ratios = {b: abs(math.log(b[0] / b[1] * width / height)) for b in buckets(64, 16)}
    assert ratios[expected] == min(ratios.values())
    picture = Image.new("RGB", (width, height), RED)
    for crop in ("center", "none"):
        assert decode(picture, settings={**BUCKETS, "crop": crop}).shape == (3, *expected)


def test_the_sizes_that_a_model_is_told():
    def sizes(picture, settings, **options):
        return Pixels(**settings).decode(encoded(picture, "PNG", **options), "x").sizes

    wide = Image.new("RGB", (300, 100), RED)
    assert sizes(wide, {}) == ((100, 300), (0, 0))
    assert sizes(wide, {"size": 50}) == ((100, 300), (0, 50))  # scaled to 150 × 50, then cut
    assert sizes(wide, {"size": 50, "crop": "none"}) == ((100, 300), (0, 0))
    assert sizes(wide, {"size": 80, "resize": False}) == ((100, 300), (10, 110))
    assert sizes(wide, BUCKETS) == ((100, 300), (5, 0))  # scaled to 128 × 43, cut to 128 × 32
    tall = Image.new("RGB", (40, 100), RED)
    assert sizes(tall, BUCKETS) == ((100, 40), (20, 0))  # scaled to 48 × 120, cut to 48 × 80
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert sizes(wide, {"size": 50}, exif=exif) == ((300, 100), (50, 0))


def test_scaling_up_and_down():
    assert decode(bars(), settings={"size": 32}).shape == (3, 32, 32)
    assert decode(Image.new("RGB", (1, 1), RED), settings={"size": 4}).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 9, "resize": False}, "24 × 8, smaller than size=9"),
        ({"size": 8, "resize": False, "crop": "none"}, "24 × 8, not 8 × 8"),
        ({"max_pixels": 191}, "24 × 8 pixels are more than max_pixels=191"),
    ],
)
def test_an_image_that_does_not_fit_the_settings_is_refused(settings, message):
    refused(encoded(bars()), message, **settings)
    assert decode(bars(), settings={"max_pixels": 192}).shape == (3, 8, 24)


def test_the_limit_of_pillow_is_raised_only_on_request(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(Unreadable, match="far more pixels than max_pixels=50"):
        decode(bars(), settings={"max_pixels": 50})
    assert Image.MAX_IMAGE_PIXELS == 50
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which Pillow warns, below twice that
    with pytest.raises(Unreadable, match="are more than"), warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(bars(), settings={"max_pixels": 100})
    assert decode(bars(), settings={"max_pixels": 500}).shape == (3, 8, 24)


def noise():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_file_that_was_cut_off_is_refused(kind, share):
    content = encoded(noise(), kind)
    refused(content[: int(len(content) * share)], "x cannot be read: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "in none of the supported image formats"),
        (encoded(noise())[:-2000].ljust(5000, b"\0"), "damaged"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    refused(content, reason)


def test_grey_without_a_stated_range_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(buffer, "TIFF")
    refused(buffer.getvalue(), "no stated range")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "centre"}, "data.crop='centre': choose one of center, none"),
        ({"mode": "CMYK"}, "choose one of RGB, L, null"),
        ({"size": 0}, "data.size=0"),
        ({"aspect": "free"}, "data.aspect='free': choose one of square, buckets"),
        ({"aspect": "buckets"}, "data.aspect=buckets with data.size=null.*set a size"),
        ({**BUCKETS, "resize": False}, "data.resize=false.*keep resize=true"),
        ({**BUCKETS, "bucket_step": 65}, "data.bucket_step=65 leaves no bucket for data.size=64"),
        ({"max_pixels": 0}, "data.max_pixels=0"),
        ({"background": "whyte"}, "data.background='whyte' is not a colour"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(DminError, match=message):
        Pixels(**settings)


Image.init()
# Formats that Pillow writes but reads only by a program or library beside it, or not at all.
NOT_WRITTEN = {"BUFR", "GRIB", "HDF5", "WMF", "PALM", "PDF"}
BEGINNINGS = {
    "BUFR": b"BUFR",
    "GRIB": b"GRIB\xff\xff\0\1",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PSD": b"8BPS\0\1",
    "FITS": b"SIMPLE  =                    T",
    "XPM": b"/* XPM */",
}


@pytest.mark.parametrize("kind", sorted(Image.OPEN.keys() | Image.SAVE.keys()))
def test_of_all_formats_that_pillow_knows_only_those_listed_are_opened(kind, monkeypatch):
    def no_program(*_, **__):
        raise AssertionError(f"{kind} started a program")

    monkeypatch.setattr("subprocess.Popen", no_program)
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}.get(kind, "RGB")
    if kind in Image.SAVE and kind not in NOT_WRITTEN:
        content = encoded(Image.new(mode, (64, 64), 1), kind)
    elif kind in BEGINNINGS:
        content = BEGINNINGS[kind].ljust(512, b"\0")
    else:
        pytest.skip("Pillow writes none")
    if kind in FORMATS:
        assert Pixels().decode(content, "x.png").image.shape == (3, 64, 64)
    else:
        named = kind in Image.OPEN and Image.OPEN[kind][1] is not None
        refused(content, r"\(\w+\), which is not supported" if named else "cannot be read")


def test_postscript_in_a_png_is_refused_as_what_it_is():
    refused(BEGINNINGS["EPS"], r"Encapsulated Postscript \(EPS\), which is not supported")


def test_images_are_opened_in_one_place():
    dmin = Path(__file__).parents[2] / "dmin"
    found = [file for file in dmin.rglob("*.py") if "Image.open(" in file.read_text()]
    assert [file.relative_to(dmin).as_posix() for file in found] == ["data/formats.py"]
