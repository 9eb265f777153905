"""The Python of docs/python.md runs as it stands, and the links of all pages lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from dmin import GradientCollector
from dmin.collect import predict_trainer
from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.sketches import BlockCyclic

README = Path(__file__).parents[1] / "README.md"
PYTHON = README.parent / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PYTHON.read_text(), flags=re.DOTALL)


@pytest.fixture
def small(monkeypatch, ddpm, tmp_path):
    """A tiny model where the README has its own, few digits, and an empty directory."""
    monkeypatch.chdir(tmp_path)
    ddpm.save_pretrained("outputs/models/digits")
    monkeypatch.setattr(
        "dmin.collect.predict_trainer",
        lambda: predict_trainer(accelerator="cpu", enable_progress_bar=False),
    )
    original = Digits.__init__

    def few(self, split="train"):
        original(self, split)
        self.examples = self.examples[:12]

    monkeypatch.setattr(Digits, "__init__", few)


def test_the_three_lines(small):
    names: dict = {}
    exec(BLOCKS[0], names)
    assert len(names["ranking"].train_ids) == 12
    assert len(names["ranking"].train_ids[0]) == 10
    assert names["ranking"].contributions.shape == (12, 10, 10)


def test_a_model_of_your_own(tmp_path):
    names: dict = {}
    exec(BLOCKS[1], names)
    collector = GradientCollector(names["Denoiser"](), BlockCyclic(512))
    digits = Examples(Digits("train").examples[:5])
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    store = collector.collect(digits, tmp_path / "store", trainer=trainer)
    assert store.complete and collector.attributed.count == 65 * 128 + 128 + 128 * 64 + 64


def test_links_lead_somewhere():
    root = README.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("experiments/*/README.md")]
    links = {
        (page.name, link): page.parent / link
        for page in pages
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text())
    }
    assert len(links) > 50 and [key for key, path in links.items() if not path.exists()] == []


def test_on_a_package_index_no_link_is_relative():
    hook = importlib.util.spec_from_file_location("hatch_build", README.parent / "hatch_build.py")
    module = importlib.util.module_from_spec(hook)
    hook.loader.exec_module(module)
    alone = module.absolute(README.read_text(), None)
    assert not re.findall(r"\]\((?!https?:|#)", alone) and "docs/models.md" not in alone
    hosted = module.absolute(README.read_text(), "https://host.example/dmin/")
    assert "](https://host.example/dmin/blob/main/docs/" in hosted
    assert "](https://host.example/dmin/raw/main/experiments/" in hosted
