"""The pictures that are asked about: one, several, or a folder of them."""

import json

import numpy as np
import pytest
import torch
from examples_on_disk import encoded

from dmin.data.image_folder import ImageFolder
from dmin.data.pictures import Pictures
from dmin.runtime.errors import DminError


@pytest.fixture
def folder(tmp_path):
    """Two described pictures, one that is not, and one below."""
    for number, name in enumerate(("a.png", "b.png", "c d.png", "below/e.png")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.full((4, 4, 3), 40 * number, np.uint8)))
    rows = [{"file_name": f"{name}.png", "text": f"an {name}", "seed": 3} for name in "ab"]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "pictures/metadata.jsonl").write_text(lines)
    return tmp_path / "pictures"


def test_a_picture_is_the_example_that_its_folder_has(folder):
    whole = ImageFolder(folder)
    for name, theirs in zip(whole.ids, whole, strict=True):
        (ours,) = Pictures(folder / name)
        assert ours.id == name and torch.equal(ours.image, theirs.image)
        assert (ours.caption, dict(ours.metadata)) == (theirs.caption, dict(theirs.metadata))


def test_several_pictures_are_named_from_the_folder_they_share(folder):
    found = Pictures([folder / "below/e.png", folder / "a.png"], prompt=["an e", 7])
    assert [(e.id, e.caption, e.label) for e in found] == [
        ("a.png", "an a", 7),
        ("below/e.png", "an e", None),
    ]


def test_a_folder_is_what_it_always_was(folder):
    assert Pictures(folder).describe() == ImageFolder(folder).describe()
    assert [e.caption for e in Pictures(folder, prompt="all")] == ["all", "all"]


def test_prompts_are_part_of_what_a_store_is_made_of(folder):
    asked = [Pictures(folder / "c d.png", prompt=prompt) for prompt in (None, "a", 1, 2)]
    assert len({json.dumps(each.describe()) for each in asked}) == 4


@pytest.mark.parametrize(
    "root, prompt, named",
    [
        ("none.png", None, "none.png: this file does not exist"),
        (["a.png", "none.png"], None, "none.png: this file does not exist"),
        ([], None, "this file does not exist"),
        (["a.png", "a.png"], None, "given twice"),
        (["a.png", "b.png"], ["one"], "1 prompts, and there are 2"),
        ("", ["one"], "1 prompts"),
        ("metadata.jsonl", None, "none of the supported image formats"),
    ],
)
def test_what_cannot_be_asked_about_is_refused(folder, root, prompt, named):
    roots = [folder / each for each in root] if isinstance(root, list) else folder / root
    with pytest.raises(DminError, match=named):
        Pictures(roots, prompt=prompt)
