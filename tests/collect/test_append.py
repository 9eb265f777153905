"""A dataset that grew: the store takes the new examples, and the old rows stay as they are."""

import numpy as np
import pytest

from dmin.collect import GradientCollector, predict_trainer
from dmin.collect.append import collect_more
from dmin.data import Examples
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError, DminWarning
from dmin.sketches import BlockCyclic
from dmin.store import Store
from dmin.store.maintenance import compact
from dmin.store.removal import remove

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def collector(ddpm):
    return GradientCollector(ddpm, sketch=BlockCyclic(256), timesteps=Stratified(2))


@pytest.fixture
def store(collector, digits, tmp_path):
    """Of every other one of the first eighteen digits."""
    some = Examples(digits.examples[:18:2])
    return collector.collect(some, tmp_path / "s", block_size=4, trainer=predict_trainer(**QUIET))


def test_new_examples_are_collected_and_only_these(collector, store, digits, monkeypatch):
    seen, original = [], type(collector).inputs

    def watched(self, x0, condition, ids):
        seen.extend(ids)
        return original(self, x0, condition, ids)

    monkeypatch.setattr(type(collector), "inputs", watched)
    remove(store, [store.ids[2]])
    now = Examples([e for e in digits.examples[:21] if e.id != store.ids[2]])
    found = collect_more(collector, now, store.path, trainer=predict_trainer(**QUIET))
    new = [e.id for e in now.examples if e.id not in store.ids]
    assert seen == new and found.complete
    assert found.ids == [*(id for id in store.ids if id != store.ids[2]), *new]
    assert np.array_equal(found.features("loss")[:8], store.features("loss")[[0, 1, *range(3, 9)]])
    assert not list(store.path.parent.glob("*.more"))
    # It is now a store of this dataset: collecting, plainly or once more, finds nothing to do.
    seen.clear()
    again = collect_more(collector, now, store.path, trainer=predict_trainer(**QUIET))
    plain = collector.collect(now, store.path, block_size=4, trainer=predict_trainer(**QUIET))
    assert not seen and again.fingerprint == plain.fingerprint == found.fingerprint
    # Rows do not depend on when they were collected, but for the blocks they were computed in.
    whole = collector.collect(
        now, store.path.parent / "w", block_size=4, trainer=predict_trainer(**QUIET)
    )
    order = [whole.index(id) for id in found.ids]
    np.testing.assert_allclose(found.features("loss"), whole.rows("loss", order), atol=2e-3)


def test_a_kill_between_costs_nothing(collector, store, digits, monkeypatch):
    from dmin.collect import append as growth

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(growth, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            collect_more(collector, digits, store.path, trainer=predict_trainer(**QUIET))
    assert len(Store(store.path)) == 9
    found = collect_more(collector, digits, store.path, trainer=predict_trainer(**QUIET))
    assert len(found) == len(digits) and found.complete


def test_what_is_refused(collector, store, digits, ddpm):
    with pytest.raises(DminError, match=rf"has 1 examples .* such as '{store.ids[0]}'.* remove"):
        collect_more(collector, Examples(digits.examples[1:]), store.path)
    other = GradientCollector(ddpm, sketch=BlockCyclic(512), timesteps=Stratified(2))
    with pytest.raises(
        DminError, match=r"cannot be extended by this .*features\.sketch\.dim: 512 here"
    ):
        collect_more(other, digits, store.path)


def test_growing_takes_back_what_was_removed_only_if_asked(collector, store, digits, tmp_path):
    gone = store.ids[2]
    remove(store, [gone])
    compacted = compact(Store(store.path), tmp_path / "c").path
    options = {"trainer": predict_trainer(**QUIET)}
    for path in (store.path, compacted):
        with pytest.warns(DminWarning, match=rf"1 of the examples .* '{gone}': they are left out"):
            found = collect_more(collector, digits, path, **options)
        assert gone not in found.ids and len(found) == len(digits) - 1 and found.complete
        with pytest.warns(DminWarning, match="left out"):
            again = collect_more(collector, digits, path, **options)
        assert again.fingerprint == found.fingerprint
        remove(found, [digits.examples[1].id])
        back = collect_more(collector, digits, path, restore=True, **options)
        assert sorted(back.ids) == sorted(e.id for e in digits.examples)
        row = collector.collect(digits, tmp_path / "w", block_size=4, **options)
        for id in (gone, digits.examples[1].id):
            one, other = (s.features("loss")[s.index(id)] for s in (back, row))
            np.testing.assert_allclose(one, other, atol=2e-3)
