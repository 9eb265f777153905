"""Paths, names and metadata reach terminal, tables and pages as text, whatever they hold."""

import csv
import json
import re

import pytest
from examples_on_disk import encoded
from golden.settings import dmin
from PIL import Image

NAME = "[-b]=\x1b[2J"  # an id cannot begin with it: it is below the folder
CAPTION = "</script><img src=x onerror=alert(1)> [/b] \x1b]0;x\x07 \u202e"
SMALL = [
    *("model=mlp", "data=image_folder", "data.root=images", "data.mode=L"),
    *("data.size=8", "debug=fast", "trainer=cpu", "model.path=model", 'paths.outputs="o[/b]"'),
    *("extras.threads=1", "name='[/x]=1'"),
]


@pytest.mark.slow
def test_what_is_shown_of_hostile_examples_is_text(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(12):
        name = f"=1+{number}{NAME}.png"
        (images / name).write_bytes(encoded(Image.new("L", (8, 8), 20 * number), "PNG"))
        rows.append({"file_name": name, "label": number % 3, "text": CAPTION, "=by": "=cmd|1"})
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    queries = ["queries.root=images", "queries.label=label", "retrieve.k=3"]
    dims = ["sketch.dim=64", "sketch.block=16"]
    for command, more in (
        ("train", ["train=digits_mlp"]),
        ("collect", dims),
        ("retrieve", dims + queries),
    ):
        status, shown = dmin(command, *SMALL, *more, place=tmp_path)
        assert status == 0 and "o[/b]" in shown
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    (folder,) = (tmp_path / "o[/b]/runs/retrieve").iterdir()
    content = (folder / "ranking.csv").read_bytes()
    assert b"\r" not in content and b"\x1b" not in content
    with (folder / "ranking.csv").open(newline="") as file:
        for row in csv.reader(file):
            assert not [cell for cell in row if cell.startswith(("=", "+", "@", "\t"))]
    page = (folder / "gallery.html").read_text()
    assert page.count("</script>") == page.count("<script") == 2 and "<img src=x" not in page
    # Each picture has its own file, above the page's folder.
    originals = set(re.findall(r'"file":"([^"]*)"', page))
    assert originals <= {(images / f"=1+{n}{NAME}.png").as_uri() for n in range(12)}
    assert len(originals) >= 3
