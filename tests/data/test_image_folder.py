"""Folders as people have them: damaged, linked, oddly named, described well or badly."""

import json
import os
import pickle
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from examples_on_disk import encoded, write_folder

from dmin.data import image_folder, survey as survey_module
from dmin.data.image_folder import ImageFolder, save_images
from dmin.runtime.errors import DminError

PICTURE = encoded(np.full((4, 4, 3), 99, np.uint8))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what a large folder's survey found out of the user's own cache."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place / "dmin"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name in ("b.png", "a/c.png", "a/B.PNG", "é 猫.png"):
        put(root, name)
    return root


def put(root, name, content=PICTURE):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write(root, name, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (root / name).write_text(text, encoding="utf-8")


def refused(message, root, **settings):
    with pytest.raises(DminError, match=message):
        ImageFolder(root, **settings)


def test_images_are_found_everywhere_and_ordered_by_name(folder):
    for name in (".hidden.png", ".trash/x.png", "__MACOSX/y.png", "notes.txt"):
        put(folder, name)
    dataset = ImageFolder(folder)
    assert dataset.ids == ["a/B.PNG", "a/c.png", "b.png", "é 猫.png"]
    assert [dataset[index].label for index in range(4)] == ["a", "a", None, None]


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    put(tmp_path, "elsewhere/d.png")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink("..", folder / "a" / "up")
    os.symlink("b.png", folder / "again.png")
    names = ["a/B.PNG", "a/c.png", "again.png", "b.png", "linked/d.png", "é 猫.png"]
    assert ImageFolder(folder).ids == names


BAD = {
    "empty.png": (b"", "it is empty"),
    "cut.png": (PICTURE[:-35], "damaged"),
    "text.jpg": (b"hello", "none of the supported image formats"),
    "link.png": (None, "symbolic links"),
    "dangling.png": (None, "broken link"),
}


@pytest.fixture
def bad_folder(folder):
    for name, (content, _) in BAD.items():
        if content is not None:
            put(folder, name, content)
    os.symlink("link.png", folder / "link.png")
    os.symlink("nowhere.png", folder / "dangling.png")
    return folder


def test_unreadable_images_are_refused_before_anything_starts(bad_folder):
    refused(
        r"5 of the 9 image.* cut\.png \(it is damaged.*dangling\.png.*on_error=skip", bad_folder
    )


@pytest.mark.parametrize("name", BAD)
def test_each_unreadable_image_is_refused_by_name_with_the_reason(name, bad_folder):
    for other in BAD:
        if other != name:
            (bad_folder / other).unlink()
    refused(rf"{name} \(.*{BAD[name][1]}", bad_folder)


@pytest.mark.parametrize("name", BAD)
def test_without_a_check_an_unreadable_image_is_named_when_its_turn_comes(name, bad_folder):
    for other in BAD:
        if other != name:
            (bad_folder / other).unlink()
    if name in ("link.png", "dangling.png"):
        refused(f"{name} .there is no such file", bad_folder, check=False)  # that costs nothing
        return
    dataset = ImageFolder(bad_folder, check=False)
    with pytest.raises(DminError, match=rf"{name} cannot be read: .*{BAD[name][1]}"):
        dataset[dataset.ids.index(name)]


def test_unreadable_images_can_be_left_out_and_are_counted(bad_folder):
    good = ["a/B.PNG", "a/c.png", "b.png", "é 猫.png"]
    with pytest.warns(UserWarning, match=r"5 of the 9 .*cut\.png.*They are left out"):
        dataset = ImageFolder(bad_folder, on_error="skip")
    assert dataset.ids == good and len(dataset) == 4
    assert all(BAD[name][1] in reason for name, reason in dataset.skipped.items())
    assert dataset.describe()["skipped"] == sorted(BAD)
    assert [dataset[index].id for index in range(4)] == good


def test_a_folder_of_nothing_but_unreadable_images_is_refused(tmp_path):
    put(tmp_path, "x.png", b"")
    refused("1 of the 1", tmp_path, on_error="skip")


def test_what_does_not_fit_the_settings_counts_as_unreadable(folder):
    put(folder, "wide.png", encoded(np.zeros((2, 9, 3), np.uint8)))
    refused("wide.png .9 × 2 pixels are more than max_pixels=16", folder, max_pixels=16)
    with pytest.warns(UserWarning, match=r"wide.png \(it is 9 × 2, smaller than size=4"):
        dataset = ImageFolder(folder, size=4, resize=False, on_error="skip")
    assert list(dataset.skipped) == ["wide.png"]


def test_a_wrong_suffix_does_not_matter_where_the_content_is_an_image(folder):
    put(folder, "jpeg.png", encoded(np.full((4, 4, 3), 255, np.uint8), "JPEG"))
    dataset = ImageFolder(folder)
    assert dataset[dataset.ids.index("jpeg.png")].image.min() == 1


def test_a_name_that_is_no_text_is_refused(folder):
    try:
        (folder / os.fsdecode(b"\xff.png")).write_bytes(PICTURE)
    except OSError:
        pytest.skip("this file system has no such names")
    refused(r"\\udcff.png \(its name is not UTF-8", folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, "choose one of raise, skip"),
        ({"on_error": "skip", "check": False}, "data.check=true"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message, folder):
    refused(message, folder, **settings)


def test_no_folder_and_no_images(tmp_path):
    refused("no such folder", tmp_path / "nowhere")
    refused("holds no images", tmp_path)


def test_metadata_of_sub_folders_names_images_beside_it(folder):
    write(folder / "a", "metadata.csv", "file_name,label,text", "c.png,3,seven", "B.PNG,4,")
    write(folder, "metadata.jsonl", {"file_name": "./b.png", "label": 5.0, "text": 7, "more": [1]})
    with pytest.warns(UserWarning, match="does not name 1 image.* such as é 猫.png"):
        dataset = ImageFolder(folder)
    found = [dataset[index] for index in range(3)]
    assert [e.id for e in found] == ["a/B.PNG", "a/c.png", "b.png"]
    assert [e.label for e in found] == [4, 3, 5]
    assert [e.caption for e in found] == [None, "seven", "7"]
    assert found[2].metadata == {"more": [1]}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-2", "30"], [1, -2, 30]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2", "x"], ["1", "2", "x"]),
        (["007", "1", "2"], ["007", "1", "2"]),
        (["1.5", "1", "2"], ["1.5", "1", "2"]),
        (["²", "1", "2"], ["²", "1", "2"]),
    ],
)
def test_a_csv_column_is_of_integers_only_if_all_of_it_is(cells, expected, tmp_path):
    names = ("a.png", "b.png", "c.png")
    for name in names:
        put(tmp_path, name)
    rows = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    write(tmp_path, "metadata.csv", "\ufefffile_name,label", *rows)  # as Excel writes it
    dataset = ImageFolder(tmp_path)
    assert [dataset[index].label for index in range(3)] == expected


def test_line_separators_inside_values_do_not_end_a_row(tmp_path):
    for name in ("a.png", "b.png"):
        put(tmp_path, name)
    write(tmp_path, "metadata.csv", "file_name,text", 'a.png,"two\nlines, 1\u2028"', "b.png,x")
    assert ImageFolder(tmp_path)[0].caption == "two\nlines, 1\u2028"
    (tmp_path / "metadata.csv").unlink()
    write(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "one\u2028two"}')
    with pytest.warns(UserWarning, match="b.png"):
        assert ImageFolder(tmp_path)[0].caption == "one\u2028two"


def test_a_name_spelt_in_the_other_unicode_form_is_found(tmp_path):
    on_disk = unicodedata.normalize("NFD", "é.png")
    put(tmp_path, on_disk)
    write(tmp_path, "metadata.jsonl", {"file_name": unicodedata.normalize("NFC", "é.png")})
    assert ImageFolder(tmp_path).ids == [on_disk]


ROW = {"file_name": "b.png"}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (["{"], {}, "line 1 is not JSON"),
        (["[1]"], {}, "line 1 is not a JSON object"),
        ([ROW, {"filename": "x", "text": "y"}], {}, "line 2: no file_name.*there: filename, text"),
        ([{"file_name": 3}], {}, "line 1: no file_name"),
        ([ROW, "", {"file_name": "./b.png"}], {}, "line 3: b.png is listed twice"),
        ([{"file_name": "../b.png"}], {}, "points outside of the folder"),
        ([{"file_name": "/b.png"}], {}, "points outside of the folder"),
        ([ROW, {"file_name": "gone.png"}], {}, r"gone.png \(there is no such file"),
        ([ROW, {"file_name": "gone.png"}], {"check": False}, r"gone.png \(there is no such file"),
        ([{**ROW, "lable": 1}], {}, "no column 'label'. Did you mean lable"),
        ([{**ROW, "Text": "x"}], {}, "no column 'text'. Did you mean Text"),
        ([{**ROW, "x": 1, "y": 2}], {"label": "kind"}, "no column 'kind'. Columns there: x, y"),
        ([{**ROW, "label": [1]}], {}, r"b.png has the label \[1\]"),
        ([{**ROW, "label": 1.5}], {}, "b.png has the label 1.5"),
        ([{**ROW, "text": ["x"]}], {}, r"b.png has the caption \['x'\]"),
    ],
)
def test_metadata_with_a_mistake_is_refused(rows, settings, message, folder):
    write(folder, "metadata.jsonl", *rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the images that these rows do not name
        refused(message, folder, **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["file_name;label", "b.png;1"], "no file_name.*columns there: file_name;label"),
        (["file_name,label", "b.png,1,2"], "line 2 has more cells than the header"),
    ],
)
def test_a_csv_with_a_mistake_is_refused(rows, message, folder):
    write(folder, "metadata.csv", *rows)
    refused(message, folder)


def test_two_kinds_of_metadata_in_one_folder_are_refused(folder):
    write(folder, "metadata.csv", "file_name", "b.png")
    write(folder, "metadata.jsonl", ROW)
    refused("Keep one of the two", folder)


def test_metadata_that_is_not_utf8_is_refused(folder):
    (folder / "metadata.csv").write_bytes("file_name,text\nb.png,café\n".encode("latin-1"))
    refused("is not UTF-8", folder)


def test_columns_can_be_chosen_or_done_without(folder):
    write(folder, "metadata.jsonl", {**ROW, "kind": "k", "prompt": "p", "labels": 1})
    with pytest.warns(UserWarning, match="does not name 3"):
        example = ImageFolder(folder, label="kind", text="prompt")[0]
    assert (example.label, example.caption, example.metadata) == ("k", "p", {"labels": 1})
    with pytest.warns(UserWarning, match="does not name 3"):
        example = ImageFolder(folder, label=None)[0]
    assert (example.label, example.caption) == (None, None)


def test_what_was_saved_is_read_back(tmp_path):
    images = torch.randint(0, 256, (2, 3, 5, 6)) / 255
    rows = [{"text": "one", "label": 1, "seed": 5}, {"text": "two", "label": 2, "seed": 6}]
    save_images(tmp_path, images, ["0.png", "1.png"], rows)
    dataset = ImageFolder(tmp_path)
    assert torch.equal(torch.stack([dataset[0].image, dataset[1].image]), images)
    assert dataset[1].describe() == {"label": 2, "caption": "two", "seed": 6}


def test_the_same_bytes_under_other_settings_are_another_dataset(tmp_path):
    root = write_folder(tmp_path)
    variants = [{}, {"size": 4}, {"size": 4, "crop": "none"}, {"mode": "L"}, {"background": "red"}]
    described = [json.dumps(ImageFolder(root, **settings).describe()) for settings in variants]
    assert len(set(described)) == len(variants)


def test_a_large_folder_is_read_once(tmp_path, cache, monkeypatch):
    root = write_folder(tmp_path / "pictures")
    first = ImageFolder(root).describe()
    assert not cache.exists()  # a small one is no burden
    monkeypatch.setattr(survey_module, "LARGE", 1)
    settled = survey_module._SETTLED_NS
    monkeypatch.setattr(survey_module, "_SETTLED_NS", -(10**12))
    reads = []
    read = survey_module.read_bytes
    monkeypatch.setattr(image_folder, "read_bytes", lambda *a: (reads.append(a[1]), read(*a))[1])
    assert ImageFolder(root).describe() == first and len(reads) == 7
    assert ImageFolder(root).describe() == first and len(reads) == 7
    changed = write_folder(tmp_path / "changed", "pixel") / "3.png"
    (root / "3.png").write_bytes(changed.read_bytes())
    assert ImageFolder(root).describe() != first and set(reads[7:]) == {"3.png"}
    monkeypatch.setattr(survey_module, "_SETTLED_NS", settled)
    os.utime(root / "3.png", (1, 1))
    # Just changed, so it may change again within one tick of the clock: it is not kept.
    count = len(reads)
    ImageFolder(root)
    assert reads[count:] == ["3.png"]
    for path in cache.iterdir():
        path.write_text("{cut")
    assert ImageFolder(root).describe() != first


def test_a_failure_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_module, "LARGE", 1)
    root = write_folder(tmp_path)
    good = (root / "3.png").read_bytes()
    put(root, "3.png", b"x" * len(good))
    os.utime(root / "3.png", (1, 1))
    refused("3.png", root)
    put(root, "3.png", good)
    os.utime(root / "3.png", (1, 1))
    assert len(ImageFolder(root)) == 7


def test_an_unreadable_image_in_a_worker_process_keeps_its_message(tmp_path):
    with pytest.raises(DminError) as error:
        put(tmp_path, "x.png", b"")
        ImageFolder(tmp_path, check=False)[0]
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value) and type(copy) is type(error.value)
