"""Every type of feature, read as it lies in the file, against numpy and torch."""

import warnings

import h5py
import numpy as np
import pytest
import torch

from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Rows, Store, StoreWriter
from dmin.store.encoding import STORED_AS, decode, encode, scale_shape

DTYPES = list(STORED_AS)


def write(path, manifest, make_rows, **options):
    with StoreWriter(path, manifest, **options) as writer:
        for block in writer.pending():
            writer.append(block, make_rows(manifest, block))
    return Store(path)


def original(manifest, make_rows):
    parts = [make_rows(manifest, block).features["loss"] for block in range(manifest.num_blocks)]
    return np.concatenate(parts)


def as_stored(rows, dtype):
    """What each type keeps, by another way than the store's; of int8 with a scale in float32."""
    if dtype.startswith("int8"):  # rows here are too short for parts
        scale = np.abs(rows).max((3, 4), keepdims=True) / np.float32(127)
        return np.rint(rows / scale) * scale.astype(np.float64)
    return torch.from_numpy(rows).to(getattr(torch, dtype)).double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segment_bytes", [1, 3000, 2**30])
def test_features_lengths_and_views(tmp_path, make_manifest, make_rows, dtype, segment_bytes):
    manifest = make_manifest(dtype=dtype)
    store = write(tmp_path / "s", manifest, make_rows, segment_bytes=segment_bytes)
    want = as_stored(original(manifest, make_rows), dtype)
    features = store.features("loss")
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    lengths = np.linalg.norm(want.reshape(*want.shape[:3], -1), axis=-1)
    np.testing.assert_allclose(store.lengths("loss"), lengths, rtol=1e-6)
    scales = store.scales("loss")
    for start, stop in ((0, 30), (0, 0), (3, 4), (4, 8), (5, 23), (29, 30)):
        views = list(store.mapped.runs("loss", start, stop))
        assert all(view.dtype == STORED_AS[dtype] for view in views)
        joined = np.concatenate([*views, np.empty((0, *features.shape[1:]), STORED_AS[dtype])])
        chosen = None if scales is None else scales[start:stop]
        assert np.array_equal(decode(joined, dtype, chosen), features[start:stop])
    some = np.array([29, 0, 7, 7, 3])
    chosen = None if scales is None else scales[some]
    assert np.array_equal(decode(store.gather("loss", some), dtype, chosen), features[some])
    assert np.array_equal(store.rows("loss", some), features[some])


def test_bfloat16_rounds_to_nearest_ties_to_even():
    bits = np.random.default_rng(0).integers(0, 2**31, 20_000).astype(np.uint32)
    ties = (np.arange(100, dtype=np.uint32) << 16) + 0x3F808000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.abs(values) < 3.38e38]
    rows = encode(values.reshape(1, 1, 1, 1, -1), "bfloat16").values
    assert np.array_equal(
        rows.view(np.int16).ravel(), torch.tensor(values).bfloat16().view(torch.int16)
    )


def test_int8_keeps_rows_of_zeros_and_is_off_by_half_a_step_at_most():
    rows = np.random.default_rng(0).standard_normal((5, 2, 3, 2, 8)).astype(np.float32)
    rows[2, 1, 1] = 0
    stored = encode(rows, "int8")
    assert stored.scales is not None
    error = np.abs(decode(stored.values, "int8", stored.scales) - rows)
    assert (error <= stored.scales[..., None, None] * 0.5001).all()
    assert stored.lengths[2, 1, 1] == 0 and np.isfinite(stored.lengths).all()


def test_segments_without_lengths_are_read_as_before(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(dtype="float16"), make_rows, segment_bytes=1)
    want = store.lengths("square")
    segment = next((tmp_path / "s").glob("*.h5"))
    with h5py.File(segment, "a") as file:
        del file["lengths"]
    older = Store(tmp_path / "s", verify=False)
    np.testing.assert_allclose(older.lengths("square"), want, rtol=1e-6)


def test_datasets_that_cannot_be_mapped_are_read(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows)
    want = store.features("loss")
    segment = next((tmp_path / "s").glob("*.h5"))
    with h5py.File(segment, "a") as file:
        del file["features/loss"]
        file.create_dataset("features/loss", data=want, chunks=True, compression="gzip")
    views = Store(tmp_path / "s", verify=False).mapped.runs("loss", 2, 25)
    assert np.array_equal(np.concatenate(list(views)), want[2:25])


def test_large_arrays_lie_aligned(tmp_path, make_manifest, make_rows):
    write(tmp_path / "s", make_manifest(dtype="float16"), make_rows)
    with h5py.File(next((tmp_path / "s").glob("*.h5"))) as file:
        assert file["features/loss"].id.get_offset() % 64 == 0


def test_values_too_large_for_a_type_are_named(tmp_path, make_manifest, make_rows):
    manifest = make_manifest(dtype="bfloat16")
    rows = make_rows(manifest, 0)
    rows.features["loss"][2, 0, 0, 0, 0] = 3.4e38
    with (
        StoreWriter(tmp_path / "s", manifest) as writer,
        pytest.raises(DminError, match=r"bild-é-2.*bfloat16"),
    ):
        writer.append(0, rows)


def test_the_fingerprint_follows_the_segments(tmp_path, make_manifest, make_rows):
    store = write(tmp_path / "s", make_manifest(), make_rows, segment_bytes=1)
    assert Store(tmp_path / "s").fingerprint == store.fingerprint
    next((tmp_path / "s").glob("*.h5")).unlink()
    assert Store(tmp_path / "s").fingerprint != store.fingerprint


@pytest.mark.parametrize("width", [8, 48, 100, 512, 4096, 4099])
def test_parts_of_a_row_have_scales_of_their_own(width):
    rows = np.random.default_rng(0).standard_normal((3, 2, 2, 1, width)).astype(np.float32)
    rows[..., 0] *= 100
    found = encode(rows, "int8_parts")
    parts = scale_shape(width, "int8_parts")
    assert found.scales.shape == (3, 2, 2, *parts) and width % parts[0] == 0
    back = decode(found.values, "int8_parts", found.scales)
    errors = np.abs(back - rows).reshape(*found.scales.shape, -1)
    assert (errors <= found.scales[..., None] / 2 * (1 + 1e-5)).all()
    if parts[0] > 1:  # the large number spoils its own part alone
        assert errors[:, :, :, 1:].max() < errors.max() / 10
    lengths = np.linalg.norm(back.reshape(3, 2, 2, -1).astype(float), axis=-1)
    np.testing.assert_allclose(found.lengths, lengths, rtol=1e-6)


def spiky(share, n=64):
    """Rows one number of which holds a share of the energy."""
    rows = np.random.default_rng(1).standard_normal((n, 1, 1, 1, 8192)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    rows[..., 7] = np.sqrt(share / (1 - share))
    return rows


@pytest.mark.parametrize(
    "dtype, share, warned",
    [
        ("int8", 0.0, False),
        ("int8", 0.5, True),
        ("int8_parts", 0.5, False),
        ("float16", 0.9, False),
    ],
)
def test_what_bytes_cost_in_ranking_is_measured_and_said(
    tmp_path, make_manifest, dtype, share, warned
):
    manifest = make_manifest(
        readouts=("loss",),
        draws=1,
        timesteps=(5.0,),
        groups=("all",),
        dim=8192,
        dtype=dtype,
        num_examples=64,
        block_size=32,
    )
    rows, ones = spiky(share), np.ones((32, 1, 1, 1), np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with StoreWriter(tmp_path / "s", manifest) as writer:
            for block in writer.pending():
                some = slice(32 * block, 32 * block + 32)
                ids = [f"{block}-{row}" for row in range(32)]
                writer.append(
                    block, Rows(ids, [{}] * 32, {"loss": rows[some]}, {"loss": ones}, ones[..., 0])
                )
    said = [str(each.message) for each in caught if each.category is DminWarning]
    assert bool(said) == warned
    if warned:
        assert "64 that were compared" in said[0] and "Use int8_parts or float16" in said[0]
    assert np.abs(Store(tmp_path / "s").features("loss") - rows).max() < 0.02
