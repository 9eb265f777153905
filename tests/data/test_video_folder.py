"""Clips from videos, animations and folders of frames: which frames, and what is refused."""

import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from dmin.data import collate, describe_dataset
from dmin.data.image_folder import save_images
from dmin.data.video import Clips, VideoFolder, saved, sources
from dmin.data.video.sources import numbered
from dmin.queries import Planted, require_one_shape
from dmin.runtime.errors import DminError, DminWarning

SIDE = 16


def shades(count, first=0):
    """Frames whose brightness tells which they are: 10, 20, 30 …"""
    return [np.full((SIDE, SIDE, 3), 10 * (first + n + 1), np.uint8) for n in range(count)]


def gif(path, frames, durations=100):
    first, *others = map(Image.fromarray, frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    return path


def stills(folder, frames, name="{}.png"):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / name.format(number))
    return folder


def video(path, frames, fps=10, codec="ffv1", pixels="bgr0", times=None, sound=False):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        heard = container.add_stream("pcm_s16le", 8000) if sound else None
        if frames:
            stream = container.add_stream(codec, rate=fps)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pixels
        if heard is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
            tone.sample_rate = 8000
            for packet in (*heard.encode(tone), *heard.encode()):
                container.mux(packet)
        for number, frame in enumerate(frames):
            made = av.VideoFrame.from_ndarray(frame, "rgb24")
            made.pts = number if times is None else times[number]
            for packet in stream.encode(made):
                container.mux(packet)
        for packet in stream.encode() if frames else ():
            container.mux(packet)
    return path


def told(clip):
    """Which frames of `shades` a clip has, as numbers of ten."""
    return (clip[0].mean((1, 2)) * 25.5).round().int().tolist()


def refused(match, root, **options):
    with pytest.raises(DminError, match=match) as error:
        VideoFolder(root, **options)
    assert "\n\n" not in str(error.value)


def test_all_kinds_of_clips_with_their_captions_and_labels(tmp_path):
    gif(tmp_path / "cat/a.gif", shades(3))
    save_images(tmp_path / "cat", torch.rand(1, 3, 4, SIDE, SIDE), ["b.webp"], [{}])
    (tmp_path / "cat/metadata.jsonl").unlink()
    stills(tmp_path / "dog/v1.5", shades(3))
    Image.new("RGB", (9, 9)).save(tmp_path / "cat/poster.jpg")
    for name in ("cat/a", "cat/b", "dog/v1.5"):
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    (tmp_path / "dog/v1.txt").write_text("of another")
    data = VideoFolder(tmp_path)
    assert data.ids == ["cat/a.gif", "cat/b.webp", "dog/v1.5"]
    assert [e.caption for e in data] == [f"caption of {n}" for n in ("cat/a", "cat/b", "dog/v1.5")]
    assert [e.label for e in data] == ["cat", "cat", "dog"]
    assert [e.image.shape for e in data] == [(3, n, SIDE, SIDE) for n in (3, 4, 3)]
    assert told(data[0].image) == told(data[2].image) == [1, 2, 3]
    assert data.summary.startswith("3 clips") and "pictures beside clips (cat/poster.jpg)" in (
        data.summary
    )


def test_frames_are_ordered_by_their_numbers_and_all_of_them_are_digested(tmp_path):
    folder = stills(tmp_path / "a", shades(11), "f{}.png")
    data = VideoFolder(tmp_path)
    assert told(data[0].image) == [*range(1, 12)]
    before = describe_dataset(data)
    assert before == describe_dataset(VideoFolder(tmp_path))
    Image.fromarray(shades(1)[0]).save(folder / "f11.png")
    assert describe_dataset(VideoFolder(tmp_path)) != before
    with pytest.raises(DminError, match="a has changed since the data were surveyed"):
        data[0]


@given(st.lists(st.integers(0, 10**6), min_size=2, unique=True))
@settings(max_examples=30, deadline=None)
def test_numbers_in_names_count_as_numbers(values):
    names = [f"shot 2 frame_{value}.png" for value in values]
    assert sorted(names, key=numbered) == [f"shot 2 frame_{value}.png" for value in sorted(values)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"frames": 3}, [1, 2, 3]),
        ({"frames": 3, "start": 0.2}, [3, 4, 5]),
        ({"fps": 5}, [1, 3, 5]),
        ({"fps": 5, "start": 0.1, "frames": 2}, [2, 4]),
        ({"fps": 20, "frames": 4, "start": 0.05}, [1, 2, 2, 3]),
        ({"fps": 10.0}, [1, 2, 3, 4, 5, 6]),
        ({"fps": 4}, [1, 3, 6]),
    ],
)
def test_frames_are_those_shown_at_their_times(options, expected, tmp_path):
    gif(tmp_path / "a.gif", shades(6))
    assert told(VideoFolder(tmp_path, **options)[0].image) == expected


def test_a_video_has_the_frames_that_were_written(tmp_path):
    frames = [np.random.default_rng(n).integers(0, 256, (SIDE, 24, 3), np.uint8) for n in range(6)]
    video(tmp_path / "a.mkv", frames)
    video(tmp_path / "b.mkv", frames, sound=True)
    data = VideoFolder(tmp_path)
    whole = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255
    assert all(torch.equal(example.image, whole) for example in data)
    assert data[0].sizes.original == (SIDE, 24)
    part = VideoFolder(tmp_path, fps=5, frames=2, start=0.1, size=8)[0]
    assert part.image.shape == (3, 2, 8, 8)
    still = ImageOps.fit(Image.fromarray(frames[1]), (8, 8), Image.Resampling.LANCZOS)
    assert torch.equal(part.image[:, 0], torch.from_numpy(np.array(still)).permute(2, 0, 1) / 255)


def test_usual_containers_are_opened_and_their_rate_is_theirs(tmp_path):
    frames = shades(8)
    video(tmp_path / "a.mp4", frames, codec="libx264", pixels="yuv420p")
    video(tmp_path / "b.webm", frames, codec="libvpx", pixels="yuv420p", fps=30)
    for example in VideoFolder(tmp_path):
        assert told(example.image) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_video_is_turned_as_its_header_says(tmp_path):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :16] = 250  # at the upper left
    file = video(tmp_path / "a.mp4", [frame] * 3, codec="libx264", pixels="yuv420p")
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: a quarter clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    clip = VideoFolder(tmp_path)[0].image
    assert clip.shape == (3, 3, 48, 32)
    assert clip[..., :16, -16:].min() > 0.8 and clip[..., 20:, :].max() < 0.2


def test_what_is_no_clip_is_refused_while_the_data_are_surveyed(tmp_path):
    gif(tmp_path / "short/a.gif", shades(6))
    refused(
        r"a\.gif \(it has 6 frame\(s\), too few for data\.frames=9", tmp_path / "short", frames=9
    )
    at = {"frames": 5, "fps": 5, "start": 0.2}
    refused(
        r"it has 2 frame\(s\) at data\.fps=5 from data\.start=0\.2 s on, too",
        tmp_path / "short",
        **at,
    )
    stills(tmp_path / "one/a", shades(1))
    refused(r"it has 1 frame\(s\), too few for a clip of 2", tmp_path / "one")
    stills(tmp_path / "sizes/a", [*shades(2), np.zeros((8, 8, 3), np.uint8)])
    refused(r"its frames have several sizes \(\(16, 16\), \(8, 8\)\)", tmp_path / "sizes")
    refused(
        r"a \(its frames have no timestamps: data\.start needs data\.fps", tmp_path / "one", start=1
    )
    gif(tmp_path / "uneven/a.gif", shades(4), [50, 200, 50, 50])
    refused(r"are 50 to 200 ms apart.*set data\.fps", tmp_path / "uneven")
    assert told(VideoFolder(tmp_path / "uneven", fps=20)[0].image) == [1, 2, 2, 2, 2, 3, 4]
    refused("more than max_pixels=100", tmp_path / "short", max_pixels=100)
    refused(
        "more than 4 × max_pixels=300 pixels in all: set data.frames",
        tmp_path / "short",
        max_pixels=300,
    )
    whole = (tmp_path / "short/a.gif").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.gif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut/b.gif").write_bytes(whole)
    refused(r"a\.gif \(it is damaged", tmp_path / "cut")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = VideoFolder(tmp_path / "cut", on_error="skip")
    assert data.ids == ["b.gif"] and said[0].category is DminWarning
    stills(tmp_path / "root", shades(2))
    refused(r"contains images, like a folder of frames.*data=image_folder", tmp_path / "root")


def test_videos_that_are_damaged_or_have_no_picture_are_refused(tmp_path):
    frames = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(8)]
    for suffix, codec in ((".mp4", "libx264"), (".webm", "libvpx")):
        whole = video(tmp_path / f"a{suffix}", frames, codec=codec, pixels="yuv420p").read_bytes()
        place = tmp_path / f"cut{suffix}"
        place.mkdir()
        (place / f"a{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
        refused(r"it is (damaged|not a supported video)|its header says", place)
        if suffix == ".webm":  # VP8 takes any bits for a picture
            continue
        flipped = bytearray(whole)
        middle = len(whole) // 2
        flipped[middle : middle + 400] = bytes(400)
        (place / f"a{suffix}").write_bytes(flipped)
        refused(r"it is damaged at frame|its header says", place)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.mp4").write_bytes(b"no video" * 100)
    refused(r"a\.mp4 \(it is not a supported video, or damaged", tmp_path / "text")
    (tmp_path / "text/a.mp4").write_bytes(b"")
    refused(r"a\.mp4 \(it is empty", tmp_path / "text")
    (tmp_path / "text/a.mp4").write_text(
        "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    )
    refused(r"a\.mp4 \(it is not a supported video", tmp_path / "text")
    video(tmp_path / "sound/a.mkv", [], sound=True)
    refused(r"a\.mkv \(it has no video stream\)", tmp_path / "sound")
    video(tmp_path / "uneven/a.mkv", shades(5), times=[0, 1, 5, 6, 7])
    refused(r"not at a constant rate: set data\.fps", tmp_path / "uneven")
    assert told(VideoFolder(tmp_path / "uneven", fps=5)[0].image) == [1, 2, 2, 4]


def test_without_a_decoder_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    gif(tmp_path / "a.gif", shades(3))
    assert len(VideoFolder(tmp_path)) == 1
    (tmp_path / "b.mp4").write_bytes(b"whatever")
    refused(r"b\.mp4 is a video, and video files need PyAV: pip install 'dmin\[video\]'", tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fps": 0}, r"data\.fps=0: give frames per second"),
        ({"frames": 1}, r"data\.frames=1: a clip has two frames or more.*data=image_folder"),
        ({"start": -1}, r"data\.start=-1: give seconds"),
        ({"condition_image": "x"}, r"data\.condition_image: no video model takes condition images"),
    ],
)
def test_settings_that_no_clip_satisfies_are_refused(options, match, tmp_path):
    gif(tmp_path / "a.gif", shades(3))
    refused(match, tmp_path, **options)
    refused("holds no clips", stills(tmp_path / "none", []))


def test_clips_are_asked_about_by_file_by_folder_of_frames_and_by_folder(tmp_path):
    file = gif(tmp_path / "a.gif", shades(3))
    frames = stills(tmp_path / "jump", shades(3))
    (tmp_path / "jump.txt").write_text("a jump")
    both = Clips([file, frames], fps=10)
    assert both.ids == ["a.gif", "jump"] and both[1].caption == "a jump"
    assert Clips(frames, prompt="another")[0].caption == "another"
    assert Clips(frames).ids == ["jump"] and Clips(tmp_path).ids == ["a.gif", "jump"]
    with pytest.raises(DminError, match=r"--region, --mask\) ask about a part of a picture"):
        Clips(file, region=[0, 0, 4, 4])
    data = VideoFolder(tmp_path)
    require_one_shape(both, data)
    with pytest.raises(DminError, match=r"queries are 2 × 16 × 16 pixels.* 3 × 16 × 16"):
        require_one_shape(Clips(file, frames=2), data)


def test_generated_clips_are_written_without_loss_and_read_back(tmp_path):
    clips = torch.randint(0, 256, (2, 3, 5, SIDE, 24)) / 255
    save_images(tmp_path, clips, ["0.webp", "1.webp"], [{"text": "a"}, {"text": "b"}])
    found = saved(tmp_path)
    assert torch.equal(collate([*found])["image"], clips) and found[1].caption == "b"
    exact, noisy, shifted = (
        Planted(kind, count=1).plant(found)[0].image for kind in ("exact", "noisy", "shifted")
    )
    assert any(torch.equal(exact, clip) for clip in clips) and noisy.shape == shifted.shape
    source = next(clip for clip in clips if torch.equal(exact, clip))
    assert torch.equal(shifted[:, :, 1:, 1:], source[:, :, :-1, :-1])
