"""Several checkpoints from the command line: a store each, one question."""

import numpy as np
import pytest
import torch
from command_line import dmin

from dmin.attribution.ranking_json import load_ranking
from dmin.collect import GradientCollector
from dmin.data.base import collate
from dmin.data.digits import Digits
from dmin.data.image_folder import ImageFolder
from dmin.diffusion.timesteps import Stratified
from dmin.models.families.ddpm import DDPM
from dmin.sketches import BlockCyclic

DATA = [
    *("model=ddpm", "data=subset", "data@data.dataset=digits", "data.count=12"),
    *("sketch.dim=256", "timesteps.num=1", "trainer=cpu", "extras.threads=1", "name=many"),
    "extras.print_config=false",
]


@pytest.mark.slow
def test_tracin_is_the_mean_of_both_models(ddpm, ddpm_path, tmp_path):
    other = DDPM.from_pretrained(ddpm_path)
    with torch.no_grad():
        for weight in other.network.parameters():
            weight *= 0.9
    other.save_pretrained(tmp_path / "other")
    models = f"model.path={ddpm_path},{tmp_path / 'other'}"
    dmin("collect", "-m", *DATA, models, cwd=tmp_path)
    named = f"method.checkpoints=[{tmp_path / 'other'}]"
    asked = [*DATA, "queries=generated", "queries.prompts=[1,2]", "queries.steps=3"]
    one = f"model.path={ddpm_path}"
    dmin("retrieve", *asked, one, "retrieve.k=12", "method=tracin", named, cwd=tmp_path)
    (found,) = (tmp_path / "outputs/runs/retrieve").glob("*/ranking.json")
    ranking = load_ranking(found.parent)
    expected = 0
    for path in (ddpm_path, tmp_path / "other"):
        made = GradientCollector(DDPM.from_pretrained(path), BlockCyclic(256), Stratified(1))
        x = Digits("train")
        queries = ImageFolder(next((tmp_path / "outputs/queries").iterdir()), mode=None)
        rows = []
        for examples in (
            [*queries],
            [x[i] for i in range(len(x)) if x[i].id in ranking.train_ids[0]],
        ):
            batch = collate(examples)
            features = made.features(*made.model.encode(batch), batch["id"])
            rows.append((features.values["loss"] * features.norms["loss"][..., None])[:, 0, 0, 0])
        expected = expected + rows[0] @ rows[1].T / 2
    np.testing.assert_allclose(
        np.sort(ranking.scores), np.sort(expected.numpy()), rtol=5e-3, atol=1e-3
    )
