"""Stores made of stores, against the sketches and numpy; the sources stay as they are."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from dmin.gradients.parameters import Parameter, Parameters
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store, StoreWriter
from dmin.store.export import export
from dmin.store.maintenance import compact, convert, fold, info, merge, verify


def write(path, manifest, make_rows, blocks=None, **options):
    with StoreWriter(path, manifest, **options) as writer:
        for block in writer.pending() if blocks is None else blocks:
            writer.append(block, make_rows(manifest, block))
    return Store(path)


FOLDS = {"weights": "ab12", "sketch": {"family": "mine", "dim": 8, "folds": 2}}


def test_folding_is_the_sketch_of_the_smaller_k(tmp_path, make_manifest, make_rows):
    parameters = Parameters((Parameter("a", (7, 11)), Parameter("b", (30,))))
    generator = torch.Generator().manual_seed(0)
    gradients = {
        "a": torch.randn(30, 7, 11, generator=generator),
        "b": torch.randn(30, 30, generator=generator),
    }
    wide, narrow = (BlockCyclic(k, 3, 4).bind(parameters).of(gradients) for k in (48, 12))
    manifest = make_manifest(
        dim=48,
        groups=("model",),
        draws=1,
        timesteps=(1.0,),
        features={"sketch": {**BlockCyclic(48, 3, 4).describe()}},
    )

    def sketched(manifest, block):
        rows = make_rows(manifest, block)
        chosen = wide[list(manifest.block_rows(block))].numpy()[:, None, None]
        rows.features = {name: chosen for name in rows.features}
        return rows

    source = write(tmp_path / "s", manifest, sketched)
    found = fold(source, tmp_path / "t", 12)
    np.testing.assert_allclose(found.features("loss")[:, 0, 0], narrow.numpy(), atol=1e-5)
    assert found.manifest.features["sketch"] == BlockCyclic(12, 3, 4).describe()
    assert found.layout.dim == 12 and found.ids == source.ids
    assert np.array_equal(found.norms("loss"), source.norms("loss"))
    assert np.array_equal(found.losses(), source.losses())


@pytest.mark.parametrize(
    "sketch, dim, message",
    [
        ({"family": "oporp"}, 4, "'oporp' cannot be folded"),
        ("oporp", 4, "'oporp' cannot be folded"),
        (FOLDS["sketch"], 3, "cannot be folded to 3: .* multiple of 2, such as 2, 4\\."),
        (FOLDS["sketch"], 8, "cannot be folded to 8"),
        (FOLDS["sketch"], 1, "cannot be folded to 1: .* multiple of 2"),
    ],
)
def test_what_does_not_fold(tmp_path, make_manifest, make_rows, sketch, dim, message):
    store = write(tmp_path / "s", make_manifest(features={"sketch": sketch}), make_rows, [0])
    with pytest.raises(DminError, match=message):
        fold(store, tmp_path / "t", dim)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_converting(tmp_path, make_manifest, make_rows, dtype):
    source = write(tmp_path / "s", make_manifest(), make_rows)
    found = convert(source, tmp_path / "t", dtype)
    direct = write(tmp_path / "d", make_manifest(dtype=dtype), make_rows)
    assert found.layout.dtype == dtype and found.digest() == direct.digest()
    assert found.manifest.feature_fingerprint == source.manifest.feature_fingerprint


def test_converting_resumes_and_keeps_what_is_missing_missing(tmp_path, make_manifest, make_rows):
    source = write(tmp_path / "s", make_manifest(), make_rows, [0, 3, 7])
    target = make_manifest(dtype="float16")
    write(tmp_path / "t", target, make_rows, [3])
    found = convert(source, tmp_path / "t", "float16")
    assert found.missing_blocks == source.missing_blocks
    assert found.digest() == write(tmp_path / "d", target, make_rows, [0, 3, 7]).digest()


def test_compacting(tmp_path, make_manifest, make_rows):
    source = write(tmp_path / "s", make_manifest(), make_rows, segment_bytes=1)
    found = compact(source, tmp_path / "t")
    assert info(source)["segments"] == 8 and info(found)["segments"] == 1
    assert found.digest() == source.digest() and found.manifest == source.manifest
    with pytest.raises(DminError, match="the source itself"):
        compact(source, tmp_path / "x" / ".." / "s")


def test_merging(tmp_path, make_manifest, make_rows):
    manifest = make_manifest()
    whole = write(tmp_path / "whole", manifest, make_rows)
    parts = [[0, 3, 5], [1, 2, 4, 6, 7], [5, 3]]
    for number, blocks in enumerate(parts):
        write(tmp_path / f"{number}", manifest, make_rows, blocks)
    found = merge([tmp_path / "0", tmp_path / "2", tmp_path / "1"], tmp_path / "m")
    assert found.complete and found.duplicate_blocks == 0 and found.digest() == whole.digest()
    assert merge([tmp_path / "whole"], tmp_path / "m").duplicate_blocks == 0
    other = write(tmp_path / "o", make_manifest(dataset={"name": "other"}), make_rows, [0])
    with pytest.raises(DminError, match=r"dataset\.name: \"digits\" here, \"other\" there"):
        merge([tmp_path / "0", other.path], tmp_path / "n")
    with pytest.raises(DminError, match="nothing to merge"):
        merge([], tmp_path / "n")


def test_verifying(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows)
    assert verify(store.path).digest() == store.digest()
    segment = next(store.path.glob("*.h5"))
    whole = segment.read_bytes()
    segment.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(DminError, match="damaged segments"):
        verify(store.path)
    segment.write_bytes(whole)
    with h5py.File(segment, "a") as file:
        file["features/square"][17, 0, 1, 0, 2] = np.inf
    shutil.move(segment, StoreName.of(segment))
    with pytest.raises(
        DminError, match=r"not finite in 'square' of example 'bild-é-17' \(row 17\)"
    ):
        verify(store.path)


class StoreName:
    """Names a segment after its bytes, as a forger would."""

    @staticmethod
    def of(path):
        import hashlib

        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return path.with_name(f"{path.stem[:-16]}{digest}.h5")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("form", ["numpy", "safetensors", "parquet"])
def test_export(tmp_path, make_manifest, make_rows, monkeypatch, dtype, form):
    from dmin.store import export as module

    monkeypatch.setattr(module, "ROWS", 7)
    store = write(tmp_path / "s", make_manifest(dtype=dtype), make_rows, segment_bytes=1)
    target = export(store, tmp_path / "new" / "e", form)
    want = {"losses": store.losses()}
    for name in ("loss", "square"):
        want |= {f"features/{name}": store.features(name), f"norms/{name}": store.norms(name)}
    if form == "numpy":
        found = {name: np.load(target / f"{name.replace('/', '-')}.npy") for name in want}
        rows = json.loads((target / "rows.json").read_text())
    elif form == "safetensors":
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(target, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rows = json.loads(file.metadata()["rows"])
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(target).to_pydict()
        rows = [
            {"id": id, "metadata": json.loads(entry)}
            for id, entry in zip(table.pop("id"), table.pop("metadata"), strict=True)
        ]
        found = {name: np.array(values).reshape(want[name].shape) for name, values in table.items()}
    assert rows == [
        {"id": id, "metadata": entry} for id, entry in zip(store.ids, store.metadata, strict=True)
    ]
    assert set(found) == set(want)
    for name, values in want.items():
        assert np.array_equal(found[name].astype(np.float32), values)
    if form != "parquet" and dtype == "float16":
        assert found["features/loss"].dtype == np.float16
    with pytest.raises(DminError, match="is there already"):
        export(store, target, form)


def test_export_names_its_forms(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows, [0])
    with pytest.raises(DminError, match="'csv': use numpy or safetensors or parquet"):
        export(store, tmp_path / "e", "csv")
