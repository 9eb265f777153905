"""The same few labelled, captioned images in each form that a dataset can have on disk."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COUNT, SIDE = 7, 8
CHANGES = ("pixel", "label", "caption")


def rows(change=None):
    """Return (pixels, label, caption) of each image; a change touches the fourth in one thing."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        label, caption = number % 3, f"picture {number}"
        if number == 3 and change == "pixel":
            pixels[0, 0, 0] ^= 1
        if number == 3 and change == "label":
            label += 1
        if number == 3 and change == "caption":
            caption += "!"
        found.append((pixels, label, caption))
    return found


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, change=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (pixels, label, caption) in enumerate(rows(change)):
        name = f"{number}.png"
        (folder / name).write_bytes(encoded(pixels))
        lines.append(json.dumps({"file_name": name, "label": label, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def write_clips(folder: Path, change=None) -> Path:
    """Write folders of three frames, of which the change is in the first."""
    lines = []
    for number, (pixels, label, caption) in enumerate(rows(change)):
        (folder / f"clip.{number}").mkdir(parents=True)
        for frame in range(3):
            content = encoded(np.roll(pixels, frame, 1))
            (folder / f"clip.{number}" / f"frame_{8 + frame}.png").write_bytes(content)
        told = {"file_name": f"clip.{number}", "label": label, "text": caption}
        lines.append(json.dumps(told) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def write_shards(folder: Path, change=None) -> str:
    """Write two tar files; return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(enumerate(rows(change)))
    for shard, part in enumerate((samples[:4], samples[4:])):
        members = [
            member
            for number, (pixels, label, caption) in part
            for member in (
                (f"{number}.png", encoded(pixels)),
                (f"{number}.txt", caption.encode()),
                (f"{number}.cls", str(label).encode()),
            )
        ]
        write_tar(folder / f"part-{shard:03d}.tar", members)
    return f"{folder}/part-{{000..001}}.tar"


def write_tar(path: Path, members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def table(change=None):
    """Return the images as a `datasets.Dataset`."""
    import datasets

    found = rows(change)
    columns = {
        "image": [{"bytes": encoded(pixels), "path": None} for pixels, _, _ in found],
        "label": [label for _, label, _ in found],
        "text": [caption for _, _, caption in found],
        "key": [f"key-{number}" for number in range(len(found))],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "elk"]),
            "text": datasets.Value("string"),
            "key": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def write_table(folder: Path, change=None) -> Path:
    table(change).save_to_disk(str(folder))
    return folder
