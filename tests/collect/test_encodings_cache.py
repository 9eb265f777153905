"""The encoding phase: once an example, before any gradient, and without changing a bit."""

import re

import pytest
import torch
from latent_model import Latent

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store

BLOCKS, BLOCK_SIZE = 4, 8


def collect(model, dataset, path, progress=False, **options):
    collector = GradientCollector(model, BlockCyclic(32, block=16), Stratified(2))
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=progress)
    return collector.collect(dataset, path, block_size=BLOCK_SIZE, trainer=trainer, **options)


def encoded(log, name="vae"):
    return [size for who, size in log if who == name and isinstance(size, int)]


@pytest.fixture
def reference(digits, tmp_path):
    return collect(Latent(), digits, tmp_path / "reference").digest()


def test_each_example_is_encoded_once_before_any_gradient(digits, tmp_path):
    model = Latent()
    collect(model, digits, tmp_path / "s")
    assert encoded(model.log) == encoded(model.log, "text") == [8, 8, 8, 2]
    first = next(i for i, (name, _) in enumerate(model.log) if name == "network")
    before, after = model.log[:first], model.log[first:]
    assert before[:2] == [("vae", "to cpu"), ("text", "to cpu")]  # the trainer's device
    assert before[-2:] == [("vae", "to cpu"), ("text", "to cpu")]  # off it again
    assert encoded(after) == []


def test_encodings_change_no_bit(digits, tmp_path, reference, monkeypatch):
    monkeypatch.setattr(GradientCollector, "encodings_cache", lambda *_: None)
    model = Latent()
    assert collect(model, digits, tmp_path / "s").digest() == reference
    names = [name for name, _ in model.log]
    assert names.index("network") < len(names) - names[::-1].index("vae")  # no phases here


def test_encodings_are_removed_when_the_store_is_complete_unless_kept(digits, tmp_path):
    collect(Latent(), digits, tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    model = Latent()
    collect(model, digits, tmp_path / "a", encodings=tmp_path / "e", keep_encodings=True)
    assert len(list(tmp_path.glob("e/*/block-*.safetensors"))) == BLOCKS
    collect(model, digits, tmp_path / "b", encodings=tmp_path / "e")  # another store of the same
    assert encoded(model.log) == [8, 8, 8, 2]
    assert not (tmp_path / "e").exists()


def test_a_shard_deletes_its_own_when_it_is_done(digits, tmp_path, reference):
    kept, model = tmp_path / "kept", Latent()
    for shard, left in ((1, 0), (0, 0)):
        part = {"shard": shard, "shards": 2, "encodings": kept, "segment_bytes": 1}
        collect(model, digits, tmp_path / "store", **part)
        assert len(list(kept.rglob("block-*"))) == left and not kept.exists()
    assert Store(tmp_path / "store").digest() == reference
    part |= {"keep_encodings": True}
    collect(model, digits, tmp_path / "other", **part)
    assert len(list(kept.rglob("block-*"))) == 2
    part |= {"shard": 1, "keep_encodings": False}
    collect(model, digits, tmp_path / "third", **part)  # does not touch those of the other shard
    assert len(list(kept.rglob("block-*"))) == 2


def test_a_run_that_dies_while_encoding_resumes(digits, tmp_path, reference):
    model = Latent()

    def die(module, args):
        if len(encoded(model.log)) == 2:
            model.log.clear()
            raise MemoryError("no more")

    handle = model.encoders["vae"].register_forward_pre_hook(die)
    with pytest.raises(MemoryError):
        collect(model, digits, tmp_path / "s")
    handle.remove()
    assert len(list(tmp_path.glob("s.encodings/*/*"))) == 2
    assert model.log[-2:] == [("vae", "to cpu"), ("text", "to cpu")]
    model.log.clear()
    assert collect(model, digits, tmp_path / "s").digest() == reference
    assert encoded(model.log) == [8, 2]


def test_a_run_that_dies_in_its_gradients_resumes_without_encoders(digits, tmp_path, reference):
    model = Latent()

    def die(module, args):
        if (
            encoded(model.log, "network").count(16) == 5
        ):  # the first is examined and checked by others
            raise MemoryError("no more")

    handle = model.network.register_forward_pre_hook(die)
    with pytest.raises(MemoryError):
        collect(model, digits, tmp_path / "s", segment_bytes=1)
    handle.remove()
    assert Store(tmp_path / "s").missing_blocks == [2, 3]
    model.log.clear()
    assert collect(model, digits, tmp_path / "s").digest() == reference
    passes = [size for size in encoded(model.log, "network") if size > 1]
    assert encoded(model.log) == [] and passes == [16, 16, 16, 4, 4, 4]  # once each


def test_damaged_encodings_are_refused_and_can_be_mended(digits, tmp_path, reference):
    model = Latent()
    kept = {"encodings": tmp_path / "e", "keep_encodings": True}
    collect(model, digits, tmp_path / "a", **kept)
    file = next(tmp_path.glob("e/*/block-00000001-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DminError, match=r"encodings of block 1 .*Delete the file"):
        collect(model, digits, tmp_path / "b", **kept)
    file.unlink()
    model.log.clear()
    assert collect(model, digits, tmp_path / "b", **kept).digest() == reference
    assert encoded(model.log) == [8]


def test_other_encoders_or_examples_are_encoded_anew(digits, tmp_path):
    kept = {"encodings": tmp_path / "e", "keep_encodings": True}
    collect(Latent(), digits, tmp_path / "a", **kept)
    other = Latent()
    with torch.no_grad():
        other.encoders["vae"].layer.weight += 1
    collect(other, digits, tmp_path / "b", **kept)
    assert encoded(other.log) == [8, 8, 8, 2]
    fewer = Latent()
    collect(fewer, Examples(digits.examples[:8]), tmp_path / "c", **kept)
    assert encoded(fewer.log) == [8]
    manifests = [Store(tmp_path / name).manifest for name in "abc"]
    assert manifests[0].feature_fingerprint != manifests[1].feature_fingerprint
    assert manifests[0].feature_fingerprint == manifests[2].feature_fingerprint


def test_a_progress_line_is_shown(digits, tmp_path, capsys):
    collect(Latent(), digits, tmp_path / "s", progress=True)
    assert re.search(r"encoding: \d+ of \d+ blocks \(100.0%\)", capsys.readouterr().out)


def test_a_folder_that_cannot_be_written_is_named(digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DminError, match=r"file.*not a directory"):
        collect(Latent(), digits, tmp_path / "s", encodings=tmp_path / "file")


def test_methods_that_run_the_model_read_what_was_kept(digits, tmp_path):
    """The same scores as from the encoders, which are not asked for training examples again."""
    from dmin.attribution import EKFAC, FeatureSet, Unlearning, score_matrix

    dataset, queries = Examples(digits.examples[:12]), Examples(digits.examples[20:22])
    scores = {}
    for kept in (False, True):
        collector = GradientCollector(Latent(), BlockCyclic(256), Stratified(2))
        sides = []
        for data, name in ((queries, "q"), (dataset, "x")):
            store = collector.collect(
                data,
                tmp_path / f"{name}{kept}",
                block_size=5,
                keep_encodings=kept and name == "x",
                trainer=predict_trainer(accelerator="cpu", enable_progress_bar=False),
            )
            sides.append(FeatureSet(store, data, origin=collector))
        log = collector.model.log
        for method in (EKFAC(), Unlearning()):
            log.clear()
            scores[kept, method.name] = score_matrix(*sides, method)
            encoded = sum(count for name, count in log if name == "vae")
            assert encoded == (2 if kept else {"ekfac": 14, "unlearning": 26}[method.name])
    for name in ("ekfac", "unlearning"):
        torch.testing.assert_close(scores[False, name], scores[True, name], rtol=1e-4, atol=1e-6)
