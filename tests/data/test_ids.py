"""Finding an example by its id decodes that example alone."""

import torch
from attribution.made_stores import drawn, made

from dmin.attribution import FeatureSet
from dmin.data import Subset
from dmin.data.ids import ids_of, positions_of
from dmin.data.image_folder import ImageFolder, save_images


def test_one_of_many_is_decoded_once(tmp_path, monkeypatch):
    names = [f"{number:03}.png" for number in range(400)]
    save_images(tmp_path, torch.rand(400, 1, 4, 4), names, [{}] * 400)
    folder, decoded = ImageFolder(tmp_path), []
    whole = ImageFolder.__getitem__

    def counted(self, index):
        decoded.append(index)
        return whole(self, index)

    monkeypatch.setattr(ImageFolder, "__getitem__", counted)
    part = Subset(folder, ids=names[100:])
    store = made(tmp_path / "store", drawn(1))
    for dataset in (folder, part):
        decoded.clear()
        example = FeatureSet(store, dataset).example("317.png")
        assert example.id == "317.png" and decoded == [317]


def test_a_dataset_without_a_list_is_read(tmp_path):
    save_images(tmp_path, torch.rand(3, 1, 4, 4), ["b.png", "a.png", "c.png"], [{}] * 3)
    folder = ImageFolder(tmp_path)
    plain = [folder[index] for index in range(3)]
    assert ids_of(plain) == folder.ids == ["a.png", "b.png", "c.png"]
    assert positions_of(plain) == {"a.png": 0, "b.png": 1, "c.png": 2}
