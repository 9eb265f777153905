"""`dmin store`: what it prints, and what it says of mistakes."""

import json

import numpy as np
import pytest

from dmin.cli import main
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter


@pytest.fixture
def store(tmp_path):
    sketch = {"family": "block_cyclic", "dim": 16, "block": 4, "seed": 0, "folds": 4}
    layout = Layout(("loss",), 1, (1.0, 2.0), ("model",), 16)
    manifest = Manifest(layout, {"sketch": sketch}, {"name": "toy"}, 6, 3)
    with StoreWriter(tmp_path / "s", manifest) as writer:
        for block in range(2):
            features = np.random.default_rng(block).standard_normal((3, 1, 2, 1, 16))
            writer.append(
                block,
                Rows(
                    [f"{block}-{row}" for row in range(3)],
                    [{"label": row + 3 * block} for row in range(3)],
                    {"loss": features.astype(np.float32)},
                    {"loss": np.ones((3, 1, 2, 1), np.float32)},
                    np.zeros((3, 1, 2), np.float32),
                ),
            )
    return tmp_path / "s"


def test_every_operation(store, tmp_path, capsys):
    def dmin(*arguments):
        assert main(["store", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert json.loads(dmin("info", store))["rows"] == 6
    assert "6 rows are sound" in dmin("verify", store)
    assert "6 of 6 rows" in dmin("merge", store, store, tmp_path / "m")
    assert "KiB per example" in dmin("fold", store, tmp_path / "f", "dim=8", "dtype=int8")
    assert Store(tmp_path / "f").layout.dim == 8
    dmin("convert", store, tmp_path / "c", "dtype=bfloat16")
    assert Store(tmp_path / "c").layout.dtype == "bfloat16"
    dmin("compact", store, tmp_path / "k")
    assert Store(tmp_path / "k").digest() == Store(store).digest()
    dmin("export", store, tmp_path / "a=b", "format=numpy")
    assert "6 rows" in dmin("import", tmp_path / "a=b", tmp_path / "i")
    rows = tmp_path / "more.npy"
    np.save(rows, np.ones((4, 2, 16), np.float32))
    (tmp_path / "ids").write_text("a\nb\nc\nd\n")
    assert "4 rows" in dmin("import", rows, tmp_path / "j", "sketch=x", f"ids={tmp_path / 'ids'}")
    copied = Store(dmin("merge", store, tmp_path / "n").split(":")[0])
    assert "2 removed, 4 rows are left" in dmin("remove", copied.path, "0-1", "1-2")
    assert "1 removed, 3 rows are left" in dmin("remove", copied.path, "where=label:0")
    kept = dmin("compact", copied.path, tmp_path / "o")
    assert "3 rows" in kept
    assert np.load(tmp_path / "a=b" / "features-loss.npy").shape == (6, 1, 2, 1, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Operations: info, verify"),
        (["fald", "a", "b"], "Did you mean fold?"),
        (["fold", "{}", "t"], "needs dim=..."),
        (["fold", "{}", "t", "dim=x"], "give a whole number"),
        (["fold", "{}", "t", "dim=5"], "cannot be folded to 5"),
        (["info", "{}", "dim=5"], "dim is not a setting of dmin store info. It takes none."),
        (["info"], "takes STORE, but 0 paths"),
        (["info", "{}", "t"], "takes STORE, but 2 paths"),
        (["info", "nowhere"], "There is no store at nowhere"),
        (["append", "{}", "{}"], "has 6 of the examples"),
        (["remove", "{}"], "nothing to remove"),
        (["remove", "{}", "9-9"], "no example '9-9'"),
        (["remove", "{}", "where=label:9"], "no example has label = 9"),
        (["remove", "{}", "ids=nowhere"], "ids=nowhere cannot be read"),
        (["import", "nowhere.npy", "t"], "cannot be imported"),
        (["merge", "{}"], "takes SOURCE... TARGET, but 1 paths"),
    ],
)
def test_mistakes(store, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["store", *(each.format(store) for each in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
