import json

import pytest
import torch

from dmin.data import Example, Examples
from dmin.data.image_folder import ImageFolder
from dmin.models.base import DiffusionModel
from dmin.queries import Generated, Planted, require_one_shape
from dmin.runtime.errors import DminError


def test_generated_images_are_those_of_their_own_seed(ddpm, tmp_path):
    source = Generated(prompts=[3, 7], per_prompt=2, seed=5, steps=2, batch_size=3)
    source.generate(ddpm, tmp_path / "q")
    folder = ImageFolder(tmp_path / "q", mode=None)
    assert [folder[i].label for i in range(4)] == [3, 3, 7, 7]
    assert [folder[i].metadata["seed"] for i in range(4)] == [5, 6, 7, 8]
    alone = ddpm.sample([7], [8], 2)[0]
    assert (folder[3].image - alone).abs().max() < 1 / 254  # 8-bit files


def test_an_interrupted_generation_leaves_no_folder(ddpm, tmp_path, monkeypatch):
    source = Generated(prompts=[0, 1, 2], steps=1, batch_size=2)
    sample, calls = ddpm.sample, []

    def failing(prompts, seeds, steps):
        calls.append(prompts)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return sample(prompts, seeds, steps)

    monkeypatch.setattr(ddpm, "sample", failing)
    with pytest.raises(RuntimeError, match="killed"):
        source.generate(ddpm, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    source.generate(ddpm, tmp_path / "q")
    lines = (tmp_path / "q" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [0, 1, 2]


def test_the_trajectory_of_generated_images(ddpm, tmp_path):
    source = Generated(prompts=[3, 5], per_prompt=2, steps=7, batch_size=3, trajectory=3)
    source.generate(ddpm, tmp_path / "q")
    images = ImageFolder(tmp_path / "q", mode=None)
    states = [ImageFolder(folder, mode=None) for folder in source.states(tmp_path / "q")]
    assert len(states) == 3 and all(state.ids == images.ids for state in states)
    assert [e.label for e in states[0]] == [e.label for e in images] == [3, 3, 5, 5]
    each = [torch.stack([e.image for e in state]) for state in (*states, images)]
    assert torch.equal(each[2], each[3])  # the last estimate is the image
    assert (each[0] - each[3]).abs().mean() > 2 * (each[1] - each[3]).abs().mean() > 0
    alone = ddpm.trajectory([5], [3], 7, 3)
    assert torch.allclose(alone[:, 0], torch.stack([x[3] for x in each[:3]]), atol=0.003)


def test_a_trajectory_longer_than_the_steps_and_models_without_one_are_refused(digits, tmp_path):
    with pytest.raises(DminError, match=r"queries\.trajectory=9: of 7 steps"):
        Generated(prompts=[0], steps=7, trajectory=9)

    class Silent(DiffusionModel):
        def predict(self, x0, noise, t, condition):
            raise NotImplementedError

        def sample(self, prompts, seeds, steps):
            return torch.zeros(len(prompts), 1, 8, 8)

    with pytest.raises(DminError, match="Silent does not record"):
        Generated(prompts=[0], trajectory=2).generate(Silent(), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_nothing_to_generate_is_refused():
    with pytest.raises(DminError, match=r"queries\.prompts=\[\]"):
        Generated(prompts=[])


@pytest.mark.parametrize("kind", ["exact", "noisy", "shifted"])
def test_planted_copies_name_their_source(digits, kind):
    sources = {e.id: e for e in digits.examples}
    copies = Planted(kind, count=9, noise=0.1, seed=1).plant(digits)
    assert len(copies) == 9 and len({c.metadata["source_id"] for c in copies.examples}) == 9
    for copy in copies.examples:
        source = sources[copy.metadata["source_id"]].image
        if kind == "exact":
            assert torch.equal(copy.image, source)
        elif kind == "noisy":
            assert 0.01 < (copy.image - source).std() < 0.11
            assert copy.image.min() >= 0 and copy.image.max() <= 1
        else:
            assert torch.equal(copy.image[:, 1:, 1:], source[:, :-1, :-1])
    again = Planted(kind, count=9, noise=0.1, seed=1).plant(digits)
    assert all(torch.equal(a.image, b.image) for a, b in zip(copies, again, strict=True))


def test_queries_of_another_size_are_refused(digits):
    small = Examples([Example("small", torch.zeros(3, 4, 8))])
    with pytest.raises(DminError, match=r"queries are 4 × 8 pixels, .* 8 × 8.*queries\.size"):
        require_one_shape(small, digits)
    require_one_shape(Planted("noisy", 3).plant(digits), digits)
