"""What a browser sends, and what becomes of it."""

import base64
import io
import shlex

import pytest
from PIL import Image

from dmin.cli.config.line import parse
from dmin.cli.config.store_settings import GROUPS
from dmin.runtime.errors import DminError
from dmin.serve.question import Question

FORM = {"prompt": "7", "methods": ["dmin"], "k": 5, "seed": 3, "steps": 20}
FILE = io.BytesIO()
Image.new("L", (2, 2)).save(FILE, "PNG")
PNG = FILE.getvalue()


def read(upload_mb=1, **sent):
    return Question.read({**FORM, **sent}, upload_mb, ["dmin", "blend"])


def picture(name="cat.png", content=PNG):
    return {"name": name, "data": base64.b64encode(content).decode()}


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 5000}, "4,000 characters"),
        ({"prompt": ""}, "Give a prompt"),
        ({"methods": []}, "Choose 1 … 4"),
        ({"methods": "dmin"}, "Choose 1 … 4"),
        ({"methods": ["dmin", "dmin"]}, "each once"),
        ({"methods": ["../secret"]}, "Choose 1 … 4"),
        ({"k": 0}, "0 is no k"),
        ({"k": float("nan")}, "nan is no k"),
        ({"seed": 1.5}, "1.5 is no seed"),
        ({"steps": None}, "None is no steps"),
        ({"picture": "/etc/passwd"}, "does not have the suffix of a picture"),
        ({"picture": {"path": "/etc/passwd"}}, "does not have the suffix of a picture"),
        ({"picture": picture("notes.txt")}, "notes.txt does not have the suffix of a picture"),
        ({"picture": {"name": "cat.png"}}, "arrived empty"),
        ({"picture": {"name": "cat.png", "data": "%"}}, "damaged"),
        ({"picture": picture(content=b"notes")}, "cat.png cannot be read"),
        ({"picture": picture(), "mask": "AAAA"}, "mask.png cannot be read"),
        ({"picture": picture(content=b"a" * 1_100_000)}, "1.1 MB, of at most 1"),
        ({"picture": picture(), "part": "region"}, "There is no rectangle"),
        ({"picture": picture(), "part": "mask"}, "Nothing is painted"),
        ({"picture": picture(), "region": [1, 2, 3]}, "None is no number of the rectangle"),
        ({"picture": picture(), "region": [1, 2, 3, -4]}, "-4 is no number of the rectangle"),
        ({"picture": picture(), "mask": "A" * 2_000_000}, "mask.png has 1.5 MB"),
    ],
)
def test_what_may_not_be_asked_is_refused_in_words(sent, told):
    with pytest.raises(DminError, match=told):
        read(**sent)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("/etc/../a/cat.png", "cat.png"),
        (r"C:\photos\cat.png", "cat.png"),
        ("..png.png", "png.png"),
        ("-rf;$(ls) ü.png", "rf__(ls) ü.png"),
        ("a" * 300 + ".PNG", "a" * 76 + ".PNG"),
    ],
)
def test_a_name_is_no_path(tmp_path, name, kept):
    question = read(picture=picture(name))
    settings = question.settings(tmp_path)
    assert settings["root"] == str(tmp_path / "picture" / kept)
    assert (tmp_path / "picture" / kept).read_bytes() == PNG
    assert settings["prompt"] == 7 and settings["region"] is None and settings["mask"] is None


def test_the_command_says_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").write_text("{}")
    settings = "format: 1\npaths: []\nname: x\nseed: 0\ncollect: {}\n"
    settings += "".join(f"{group}: {{}}\n" for group in GROUPS)
    (tmp_path / "store/settings.yaml").write_text(settings)
    (tmp_path / "a cat.png").write_bytes(PNG)

    def composed(question):
        program, command, *words = shlex.split(question.line(["store", "seed=2"]))
        assert (program, command) == ("dmin", "retrieve")
        line = parse(command, words)
        return line.root["queries"], line.settings

    asked = read(picture=picture("a cat.png"), prompt="it's ${a} fox", region=[1, 2, 3, 4], k=6)
    queries, settings = composed(asked)
    assert queries == {"root": "a cat.png", "prompt": r"it's \${a} fox", "region": [1, 2, 3, 4]}
    assert settings == ["seed=2", "method=dmin", "retrieve.k=6"]
    queries, settings = composed(read(methods=["dmin", "blend"]))
    assert queries == {"prompts": [7]}
    assert "--places=3" in read(places=True).line([]) and "places" not in read(places="3").line([])
    seed = ["queries.seed=3", "queries.steps=20"]
    assert settings == ["seed=2", *seed, "method=dmin,blend", "retrieve.k=5"]
