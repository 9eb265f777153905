"""A kept file is believed whole or not at all, whatever happened to it."""

import os

import numpy as np
import pytest

from dmin.runtime.array_files import (
    MAGIC,
    START,
    _digest,
    packed,
    read_arrays,
    unpacked,
    write_arrays,
)
from dmin.runtime.errors import DminWarning

ARRAYS = {
    "codes": np.arange(12, dtype=np.int8).reshape(3, 4),
    "none": np.empty((0, 5), np.float32),
    "scalar": np.array(2.5),
}


def signed(content):
    """Return content under the digest it should have."""
    line = MAGIC + _digest(memoryview(content)[START:])
    return line.ljust(START - 1) + b"\n" + content[START:]


def test_what_was_kept_is_had_again(tmp_path):
    write_arrays(tmp_path / "a", {"of": ["x", 1]}, ARRAYS)
    about, arrays = read_arrays(tmp_path / "a")
    assert about == {"of": ["x", 1]} and list(arrays) == list(ARRAYS)
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert {array.dtype for array in arrays.values()} == {a.dtype for a in ARRAYS.values()}
    assert read_arrays(tmp_path / "b") is None and len(os.listdir(tmp_path)) == 1


def test_a_file_of_several_chunks_has_one_digest(tmp_path, monkeypatch):
    whole = bytes(packed({}, ARRAYS))
    monkeypatch.setattr("dmin.runtime.array_files.CHUNK", 100)
    parts = bytes(packed({}, ARRAYS))
    assert whole[START:] == parts[START:] and whole != parts
    assert np.array_equal(unpacked(np.frombuffer(parts, np.uint8)).arrays["codes"], ARRAYS["codes"])


def test_every_flipped_bit_and_every_length_is_found(tmp_path):
    content = bytes(packed({"of": 1}, ARRAYS))
    for place in range(len(content)):
        for bit in range(8):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError, match="its digest does not"):
                unpacked(damaged)
        with pytest.raises(ValueError, match="its digest does not"):
            unpacked(np.frombuffer(content[:place], np.uint8))
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.warns(DminWarning, match=r"a is damaged \(its digest.*it is rebuilt"):
        assert read_arrays(tmp_path / "a") is None


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b"nan",
        b"[" * 100_000,
        b'{"about": 1, "arrays": {}}',
        b'{"about": {}, "arrays": {"a": ["|O", [1]]}}',
        b'{"about": {}, "arrays": {"a": ["<f4", [1000000]]}}',
        b'{"about": {}, "arrays": {"a": ["<f4", [-1]]}}',
        b'{"about": {}, "arrays": {"a": ["<f4", ["x"]]}}',
        b'{"about": {}, "arrays": {"a": ["<f4", [1e400]]}}',
        b'{"about": {}, "arrays": {"a": ["nothing", [1]]}}',
    ],
)
def test_what_no_file_can_hold_is_refused_under_the_right_digest_too(head):
    for length in (len(head), 2**63):
        content = signed(bytes(START) + length.to_bytes(8, "little") + head)
        with pytest.raises(ValueError, match=r"\w"):
            unpacked(np.frombuffer(content, np.uint8))


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    assert read_arrays(tmp_path / "a") is None
