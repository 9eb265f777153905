"""What a store refuses, and what it says: the name, the value, what is allowed, the remedy."""

import gc
import json
import os
import resource
import subprocess

import numpy as np
import pytest

from dmin.runtime.errors import DminError
from dmin.store import Manifest, Store, StoreWriter, segments as segments_module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "'float8' is not supported: use float32 or float16"),
        ({"dim": 0}, "layout.dim is 0"),
        ({"draws": 1.5}, r"layout.draws is 1.5"),
        ({"groups": ()}, "layout.groups is"),
        ({"readouts": ("loss", "loss")}, "layout.readouts is"),
        ({"readouts": ("a/b",)}, "'a/b'"),
        ({"timesteps": (1.0, 1.0)}, "layout.timesteps is"),
        ({"timesteps": (1.0, float("nan"))}, "layout.timesteps is"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"block_size": True}, "block_size is True"),
        ({"features": {"a": float("nan")}}, "features cannot be written as JSON"),
        ({"dataset": {"a": {1, 2}}}, "dataset cannot be written as JSON"),
    ],
)
def test_manifests_that_are_refused(make_manifest, changes, message):
    with pytest.raises(DminError, match=message):
        make_manifest(**changes)


def test_blocks_cover_the_dataset_once(make_manifest):
    for num_examples, block_size in ((30, 4), (32, 4), (3, 4), (1, 1)):
        manifest = make_manifest(num_examples=num_examples, block_size=block_size)
        rows = [row for b in range(manifest.num_blocks) for row in manifest.block_rows(b)]
        assert rows == list(range(num_examples))
    for block in (-1, 1):
        with pytest.raises(DminError, match=f"block {block} does not exist"):
            manifest.block_rows(block)


def test_manifest_as_json(make_manifest):
    manifest = make_manifest(features={"b": (1, 2), "a": {"c": None}})
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert list(json.loads(text)) == sorted(json.loads(text))
    for change in ({"schema": 2}, {"format": "other"}):
        with pytest.raises(DminError, match="this dmin reads 'dmin-store', schema 1"):
            Manifest.from_json(json.dumps(json.loads(text) | change))
    for damaged in (text[:-9], "[]", "{}", text.replace('"dim"', '"dam"')):
        with pytest.raises(DminError, match=r"there.json is damaged"):
            Manifest.from_json(damaged, "there.json")


def test_no_store(tmp_path):
    with pytest.raises(DminError, match=r"There is no store at .*/s: .*`dmin collect`"):
        Store(tmp_path / "s")
    with pytest.raises(DminError, match=r"is not a store .*no manifest.json.*`dmin collect`"):
        Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DminError, match=r"There is no store at .*file/s"):
        Store(tmp_path / "file" / "s")


def test_resuming_with_other_settings_is_refused(tmp_path, make_manifest, make_rows):
    with StoreWriter(tmp_path, make_manifest()) as writer:
        writer.append(0, make_rows(writer.manifest, 0))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for changes, message in (
        (
            {"dataset": {"name": "digits", "content": "ef56"}},
            r"the dataset changed since collection \(dataset.content: \"ef56\" here, \"cd34\"",
        ),
        ({"num_examples": 31}, r"the dataset changed since collection \(num_examples: 31 here"),
        (
            {"features": {"weights": "xx", "sketch": {"kind": "oporp", "dim": 8}}},
            r"the features differ \(features.weights: \"xx\" here, \"ab12\" there",
        ),
        ({"dim": 16}, r"the layout differs \(layout.dim: 16 here, 8 there"),
        ({"block_size": 5}, r"the layout differs \(block_size: 5 here, 4 there"),
        ({"dim": 16, "num_examples": 9}, "the dataset changed.*and the layout differs.*dim"),
    ):
        with pytest.raises(DminError, match=message) as caught:
            StoreWriter(tmp_path, make_manifest(**changes))
        assert str(tmp_path) in str(caught.value)
        assert "choose another directory" in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_data_that_have_grown_are_told_how_to_go_on(tmp_path, make_manifest, make_rows):
    with StoreWriter(tmp_path / "s", make_manifest()):
        pass
    more = make_manifest(num_examples=33, dataset={"name": "digits", "content": "ef56"})
    with pytest.raises(DminError, match=r"only grown, `dmin collect .*/s collect\.grow=true` adds"):
        StoreWriter(tmp_path / "s", more)
    with pytest.raises(DminError) as refused:
        StoreWriter(tmp_path / "s", make_manifest(num_examples=33, dim=16))
    assert "collect.grow" not in str(refused.value)


def test_equal_settings_written_differently_resume(tmp_path, make_manifest, make_rows):
    for number, features in enumerate(({"scale": 1}, {"scale": 1.0})):
        manifest = make_manifest(features=features, timesteps=[1, 2, 3])
        with StoreWriter(tmp_path, manifest) as writer:
            writer.append(number, make_rows(manifest, number))
    assert len(Store(tmp_path)) == 8


def test_directories_that_are_refused(tmp_path, make_manifest):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DminError, match=r"not empty and not a store .*'thesis.tex'.*new directory"):
        StoreWriter(tmp_path, make_manifest())
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(DminError, match=r"thesis.tex .File exists.: .*choose another path"):
        StoreWriter(tmp_path / "thesis.tex", make_manifest())
    with pytest.raises(DminError, match=r"thesis.tex/a/b .Not a directory.: .*another path"):
        StoreWriter(tmp_path / "thesis.tex" / "a" / "b", make_manifest())


def test_heartbeats_left_by_a_deleted_store_are_no_strangers(tmp_path, make_manifest):
    (tmp_path / "s/progress").mkdir(parents=True)
    (tmp_path / "s/progress/shard-0-of-1.rank-0-of-1.jsonl").write_text("{}\n")
    with StoreWriter(tmp_path / "s", make_manifest()) as writer:
        assert len(writer.pending()) == 8


def test_directory_without_permission(tmp_path, make_manifest):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(DminError, match=r"/s .Permission denied.: give yourself permission"):
            StoreWriter(tmp_path / "s", make_manifest())
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("verify", [True, False])
def test_permission_to_read_is_not_taken_for_damage(
    tmp_path, make_manifest, make_rows, monkeypatch, verify
):
    with StoreWriter(tmp_path, make_manifest()) as writer:
        writer.append(0, make_rows(writer.manifest, 0))

    def denied(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(segments_module, "open", denied, raising=False)
    with pytest.raises(DminError, match=r"Could not read .*\.h5 .Permission denied") as caught:
        Store(tmp_path, verify)
    assert "Delete" not in str(caught.value)


def spoil(rows, what, value):
    {
        "features": rows.features["square"][2, 1, 2, 1],
        "norms": rows.norms["square"][2, 1, 2],
        "losses": rows.losses[2, 1],
    }[what][-1] = value


@pytest.mark.parametrize("what", ["features", "norms", "losses"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, make_manifest, make_rows, what, value):
    with StoreWriter(tmp_path, make_manifest()) as writer:
        rows = make_rows(writer.manifest, 1)
        spoil(rows, what, value)
        name = what if what == "losses" else f"{what}/square"
        message = f"array {name} holds {value} for example 'bild-é-6' at timestep 990.5 .draw 1"
        with pytest.raises(DminError, match=message):
            writer.append(1, rows)
        writer.append(1, make_rows(writer.manifest, 1))  # nothing of the refused block was taken
    assert len(Store(tmp_path)) == 4


def test_values_too_large(tmp_path, make_manifest, make_rows):
    for dtype, value, limit in (("float16", 65505, "65504"), ("float32", 1e39, "3.40282e.38")):
        with StoreWriter(tmp_path / dtype, make_manifest(dtype=dtype)) as writer:
            rows = make_rows(writer.manifest, 0)
            rows.features["loss"] = rows.features["loss"].astype(np.float64)
            rows.features["loss"][1, 0, 0, 0, 0] = -value
            with pytest.raises(DminError, match=f"finite values up to {limit} .*{dtype}"):
                writer.append(0, rows)
            rows.features["loss"][1, 0, 0, 0, 0] = -65504
            writer.append(0, rows)
        assert Store(tmp_path / dtype).features("loss")[1, 0, 0, 0, 0] == -65504


def test_rows_that_do_not_fit(tmp_path, make_manifest, make_rows):
    def set_label(rows, value):
        rows.metadata[1]["label"] = value

    cases = [
        (lambda rows: rows.ids.pop(), "3 ids for a block of 4 rows"),
        (lambda rows: rows.metadata.pop(), "3 metadata for a block of 4 rows"),
        (lambda rows: rows.ids.__setitem__(1, 7), "id 7 is a int: ids must be text"),
        (lambda rows: rows.ids.__setitem__(1, rows.ids[0]), "Two examples have the id 'bild-é-0'"),
        (lambda rows: set_label(rows, float("nan")), "metadata of example 'bild-é-1'"),
        (lambda rows: set_label(rows, np.int64(3)), "metadata of example 'bild-é-1'.*int64"),
        (lambda rows: rows.features.pop("loss"), r"features have the readouts \['square'\]"),
        (lambda rows: rows.norms.update(x=0), "norms have the readouts .*'x'"),
        (
            lambda rows: rows.features.update(loss=rows.features["loss"][:, :, :, :, :5]),
            r"features/loss of a block has the shape \(4, 2, 3, 2, 5\).*\(4, 2, 3, 2, 8\)",
        ),
        (
            lambda rows: rows.norms.update(loss=rows.norms["loss"][:3]),
            r"norms/loss of a block has the shape \(3, 2, 3, 2\).*\(4, 2, 3, 2\)",
        ),
        (lambda rows: setattr(rows, "losses", rows.losses[0]), r"losses .* \(2, 3\).*\(4, 2, 3\)"),
    ]
    with StoreWriter(tmp_path, make_manifest()) as writer:
        for change, message in cases:
            rows = make_rows(writer.manifest, 0)
            change(rows)
            with pytest.raises(DminError, match=message):
                writer.append(0, rows)
    assert len(Store(tmp_path)) == 0


def test_blocks_and_ids_are_taken_once(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    writer = StoreWriter(tmp_path, manifest)
    writer.append(0, make_rows(manifest, 0))
    for _ in range(2):
        with pytest.raises(DminError, match=r"Block 0 of .* is already written"):
            writer.append(0, make_rows(manifest, 0))
        writer.seal()
    rows = make_rows(manifest, 1)
    rows.ids[2] = "bild-é-3"
    with pytest.raises(DminError, match="Two examples have the id 'bild-é-3'"):
        writer.append(1, rows)
    with pytest.raises(DminError, match="block 8 does not exist"):
        writer.append(8, rows)
    writer.close()
    with pytest.raises(DminError, match="is closed"):
        writer.append(1, make_rows(manifest, 1))
    # Another process cannot know the ids of this one: they are compared on reading.
    with StoreWriter(tmp_path, manifest) as other:
        other.append(1, rows)
    with pytest.raises(DminError, match="more than one row of id 'bild-é-3'"):
        _ = Store(tmp_path).ids


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small disk here")
    yield place
    gc.collect()  # no map of a file there is left
    subprocess.run(["umount", str(place)], check=True)


def append_until_it_fails(path, manifest, make_rows, message):
    """Leave a writer by the error, and return how many blocks were sealed before."""
    with (
        pytest.raises(DminError, match=message) as caught,
        StoreWriter(path, manifest, segment_bytes=1) as writer,
    ):
        for block in range(manifest.num_blocks):
            writer.append(block, make_rows(manifest, block))
    assert f"4 rows (blocks {block}) are not sealed" in str(caught.value)
    assert not list(path.glob("*.tmp"))
    return block


def test_full_disk(small_disk, make_manifest, make_rows):
    manifest = make_manifest(dim=128)
    path = small_disk / "s"
    sealed = append_until_it_fails(path, manifest, make_rows, "disk is full: free space")
    store = Store(path)
    assert store.missing_blocks == list(range(sealed, 8)) and sealed >= 2
    first = make_rows(manifest, 0).features["loss"]
    assert np.array_equal(store.features("loss", 0, 4), first)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    with StoreWriter(path, manifest) as writer:
        for block in writer.pending():
            writer.append(block, make_rows(manifest, block))
    Store(path).require_complete()


def test_disk_too_full_for_a_manifest(small_disk, make_manifest):
    with open(small_disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(DminError, match="disk is full"):
        StoreWriter(small_disk / "s", make_manifest())
    (small_disk / "ballast").unlink()
    StoreWriter(small_disk / "s", make_manifest()).close()


def test_disk_mounted_read_only(small_disk, make_manifest, make_rows):
    with StoreWriter(small_disk / "s", make_manifest()) as writer:
        writer.append(0, make_rows(writer.manifest, 0))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DminError, match=r"/t .Read-only file system.: .*another directory"):
        StoreWriter(small_disk / "t", make_manifest())
    assert len(Store(small_disk / "s")) == 4  # reading takes no lock and writes nothing


def test_largest_file_reached(tmp_path, make_manifest, make_rows):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        append_until_it_fails(
            tmp_path / "s", make_manifest(dim=4096), make_rows, "raise `ulimit -f`"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(Store(tmp_path / "s")) == 0


def test_a_failed_seal_may_be_tried_again(tmp_path, make_manifest, make_rows, monkeypatch):
    manifest = make_manifest()
    writer = StoreWriter(tmp_path, manifest)
    writer.append(0, make_rows(manifest, 0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(DminError, match=r"4 rows .blocks 0. are not sealed"):
            writer.seal()
    assert os.listdir(tmp_path) == ["manifest.json"]
    writer.close()
    assert len(Store(tmp_path)) == 4


@pytest.mark.parametrize("pattern", ["manifest.json", "growth-*", "segment-*", "removed-*"])
def test_what_has_no_end_is_never_read(tmp_path, make_manifest, make_rows, pattern):
    with StoreWriter(tmp_path / "s", make_manifest()) as writer:
        for block in writer.pending():
            writer.append(block, make_rows(make_manifest(), block))
    file = next((tmp_path / "s").glob(pattern), tmp_path / "s" / pattern.replace("*", "0001.json"))
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(DminError, match=f"{file.name} is a pipe.*: move it away"):
        Store(tmp_path / "s")
