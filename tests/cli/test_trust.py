"""Records from elsewhere: each hostile one is refused by what it asks for, and runs nothing."""

import json
import os
import pickle
import sys

import pytest
import yaml
from golden.settings import RECORDS

from dmin.cli import main
from dmin.cli.config import trust
from dmin.cli.config.trust import demands, read_settings

KNOWN = json.loads((RECORDS.parent / "settings_0_1_0.json").read_text())["targets"]
PLAIN = yaml.safe_load((RECORDS / "train/config.yaml").read_text())


class Ran:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder beside what would leave `ran` here if any of it were obeyed."""
    monkeypatch.chdir(tmp_path)
    evil = "import os\nos.makedirs('ran')\nclass Evil: pass\n"
    (tmp_path / "evil_code.py").write_text(evil)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Ran()))
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "evil.yaml").write_text("_target_: os.mkdir\npath: ran\n")
    (folder / "record.json").write_text((RECORDS / "train/record.json").read_text())
    yield folder
    assert not (tmp_path / "ran").exists() and "evil_code" not in sys.modules
    assert not (tmp_path / "outputs").exists()


def changed(place, value):
    """Return the settings of a run with one changed."""
    settings = yaml.safe_load(yaml.safe_dump(PLAIN))
    *path, last = place.split(".")
    node = settings
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return settings


MKDIR = {"_target_": "os.mkdir", "path": "ran"}
BUILT = {
    # what is built: by any name, at any place, however it is called
    "a pickle": ("data", {"_target_": "torch.load", "f": "evil.pt", "weights_only": False}),
    "by detour": ("data", {"_target_": "dmin.train.torch.load", "f": "evil.pt"}),
    "by an old name": ("data", {"_target_": "dmin.noise.torch.load", "f": "evil.pt"}),
    "a call": ("model", MKDIR),
    "in a list": ("trainer.callbacks", [[{"_target_": "os.mkdir", "_args_": ["ran"]}]]),
    "in a section": ("retrieve.where", {"a": {"b": MKDIR}}),
    "in a method's settings": ("benchmark.settings", {"dmin": MKDIR}),
    "partial": ("train.model", MKDIR | {"_partial_": True}),
    "not recursive": ("data", MKDIR | {"_recursive_": False}),
    "a module of theirs": ("model", {"_target_": "evil_code.Evil"}),
    "one in the folder": ("model", {"_target_": "theirs.evil_code.Evil"}),
    "hydra's": ("data", {"_target_": "hydra.utils.get_object", "path": "evil_code.Evil"}),
    "hydra's own call": ("data", {"_target_": "hydra.utils.instantiate", "config": {}}),
    "through dmin": ("data", {"_target_": "dmin.cli.workspace.built.instantiate"}),
    "a process": ("data", {"_target_": "dmin.runtime.provenance.subprocess.run", "args": ["ls"]}),
    "functools": ("train", {"_target_": "functools.partial", "_args_": ["os.mkdir", "ran"]}),
    "inside a class": ("data", {"_target_": "dmin.models.DDPM.from_pretrained.__globals__"}),
    "another method": ("model", {"_target_": "dmin.models.StableDiffusion.save_pretrained"}),
    "no name": ("model", {"_target_": ["os.mkdir"]}),
    "a number": ("model", {"_target_": 3}),
    "empty": ("model", {"_target_": ""}),
    "a launcher": (
        "trainer",
        {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"},
    ),
    "a trainer's hook": ("trainer.default_root_dir", "/"),
    "its arguments by place": ("trainer._args_", ["cpu"]),
    "a login sent away": (
        "logger",
        {"_target_": "lightning.pytorch.loggers.WandbLogger", "settings": {"base_url": "http://e"}},
    ),
}
READ = {
    "the environment": ("name", "${oc.env:HOME}"),
    "in a part": ("data.split", "a-${oc.env:HOME}"),
    "another setting": ("model._target_", "${name}"),
    "made": ("data", "${oc.create:'{_target_: os.mkdir, path: ran}'}"),
    "decoded": ("data", "${oc.decode:'{_target_: os.mkdir, path: ran}'}"),
    "hydra": ("name", "${hydra:runtime.cwd}"),
    "a made name": ("name", "${${seed}:x}"),
    "an unknown resolver": ("name", "${evil:1}"),
}
WRITTEN = {
    "elsewhere": ("paths.outputs", "/etc/dmin"),
    "above": ("paths.outputs", "../out"),
    "home": ("collect.path", "~/store"),
    "encodings": ("collect.encodings", "/etc/encodings"),
    "the model": ("model.path", "/etc/model"),
    "by the name": ("name", "../../up"),
    "by the logger": (
        "logger",
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "../../up"},
    ),
}


@pytest.mark.parametrize("kind", {**BUILT, **READ, **WRITTEN})
def test_what_a_record_asks_for_beyond_settings_is_refused_and_shown(kind, folder, capsys):
    place, value = {**BUILT, **READ, **WRITTEN}[kind]
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(place, value)))
    assert main(["repeat", str(folder)]) == 1
    refused = capsys.readouterr().err
    assert place.partition(".")[0] in refused and "--trust" in refused
    assert main(["repeat", str(folder), "--dry"]) == 0
    _, _, shown = capsys.readouterr().out.partition("needs --trust:\n")
    lines = [line.strip() for line in shown.splitlines()]
    assert lines and all(line in refused for line in lines)


TEXTS = {
    "python": "data: !!python/object/apply:os.mkdir [ran]\n",
    "a path": "name: !!python/object/apply:pathlib.PosixPath [ran]\n",
    "any tag": "name: !mine x\n",
    "hydra": "hydra: {run: {dir: /etc}}\n",
    "a launcher": "hydra: {launcher: {_target_: os.mkdir, path: ran}}\n",
    "a callback": "hydra: {callbacks: {a: {_target_: os.mkdir, path: ran}}}\n",
    "a search path": "hydra: {searchpath: ['file:///etc']}\n",
    "empty": "hydra:\n",
    "defaults": "defaults: [evil]\n",
    "other defaults": "defaults: [{/data: evil}, 'pkg://evil_code/a', _self_]\n",
    "a package": "# @package hydra\nrun: {dir: /etc}\ndefaults: []\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "merged": "a: &a {_target_: os.mkdir}\ndata: {<<: *a, path: ran}\n",
    "deep": "a: " + "[" * 600 + "]" * 600,
    "two documents": "name: a\n---\nname: b\n",
    "a key twice": "name: a\nname: b\n",
    "a list": "- name\n",
    "no YAML": "a: [",
    "an interpolation that is none": "name: '${'\n",
    "no text": b"\xff\xfe\x00",
    "large": b"# " + b"x" * (2 << 20),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_plain_mapping_of_settings_is_refused_also_if_trusted(kind, folder, capsys):
    text = TEXTS[kind]
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for more in ([], ["--trust"], ["--dry"]):
        assert main(["repeat", str(folder), *more]) == 1
        assert "config.yaml" in capsys.readouterr().err


RECORDED = {
    "no mapping": [],
    "a number": 3,
    "no command": {},
    "another command": {"command": "rm"},
    "a tool": {"command": "repeat"},
    "a list": {"command": ["collect"]},
    "an override": {"command": "train", "job": {"method": "a,hydra.run.dir=/etc"}},
    "an interpolation": {"command": "train", "job": {"method": "${oc.env:HOME}"}},
    "no name": {"command": "train", "job": {"method": {"_target_": "os.mkdir"}}},
}


@pytest.mark.parametrize("kind", RECORDED)
def test_a_damaged_record_is_refused(kind, folder, capsys):
    (folder / "config.yaml").write_text(yaml.safe_dump(PLAIN))
    (folder / "record.json").write_text(json.dumps(RECORDED[kind]))
    assert main(["repeat", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("dmin: ")


@pytest.mark.parametrize("text", ["", "name\n", "seed: 0\n", "data: ???\n"])
def test_settings_that_are_not_there_are_no_defect(text, folder):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match="paths"):
        main(["repeat", str(folder)])


def test_parts_of_another_kind_and_control_characters_do_no_harm(folder, capsys):
    (folder / "config.yaml").write_text(yaml.safe_dump(PLAIN))
    said = {"git": [], "versions": "x", "machine": {"platform": "\x1b[2J\x1b]0;me\x07"}, "job": 3}
    (folder / "record.json").write_text(json.dumps({"command": "train", "results": 4, **said}))
    assert main(["repeat", str(folder), "--dry"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\u001b[2J" in shown


@pytest.mark.parametrize("name", ["record.json", "config.yaml"])
def test_a_pipe_keeps_nobody_waiting(name, folder, capsys):
    (folder / "config.yaml").write_text(yaml.safe_dump(PLAIN))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert main(["repeat", str(folder)]) == 1
    capsys.readouterr()


def test_a_setting_of_ones_own_takes_the_place_of_theirs(folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(changed("name", "${oc.env:HOME}")))
    settings = read_settings(folder / "config.yaml")
    assert demands(settings, "train", folder) == ["name: reads ${oc.env:HOME}"]
    assert demands(settings, "train", folder, {"name"}) == []


@pytest.mark.parametrize("command", sorted(each.name for each in RECORDS.iterdir()))
def test_records_of_dmin_ask_for_nothing_more(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = RECORDS / command / "config.yaml"
    assert demands(read_settings(file), command, file.parent) == []


def test_all_that_dmin_ever_named_is_allowed_but_for_launchers():
    refused = [name for name in KNOWN if trust._of_call({"_target_": name})]
    assert refused and all(name.startswith("hydra_plugins.") for name in refused)


SAME = {
    "dmin.attribution.methods.dmin.DMin": "dmin.attribution.DMin",
    "dmin.models.families.ddpm.DDPM.from_pretrained": "dmin.models.DDPM.from_pretrained",
    "dmin.train.lightning.Trainer": "lightning.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer": "lightning.Trainer",
}


@pytest.mark.parametrize("name", SAME)
def test_a_name_is_compared_by_what_it_stands_for(name):
    assert trust._listed(name) == SAME[name]


def test_a_store_under_its_own_outputs_is_written_to(tmp_path, monkeypatch):
    here, folder = tmp_path / "here", tmp_path / "scratch/runs/collect/one"
    here.mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    for outputs, asked in ((tmp_path / "scratch", 0), (tmp_path / "other", 1)):
        (folder / "config.yaml").write_text(yaml.safe_dump(changed("paths.outputs", str(outputs))))
        settings = read_settings(folder / "config.yaml")
        assert len(demands(settings, "collect", folder)) == asked


def test_no_other_file_of_the_folder_is_composed_and_trust_runs_what_is_shown(
    tmp_path, monkeypatch, capsys
):
    from dmin.cli.commands import train

    theirs, seen = tmp_path / "theirs", []
    (theirs / "model").mkdir(parents=True)
    (theirs / "model/ddpm.yaml").write_text("_target_: os.mkdir\npath: ran\n")
    (theirs / "record.json").write_text((RECORDS / "train/record.json").read_text())
    (tmp_path / "own_code.py").write_text("class Own:\n    def __init__(self, path): ...\n")
    own = changed("data", {"_target_": "own_code.Own", "path": "there"})
    (theirs / "config.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    monkeypatch.setattr(train, "train", lambda cfg: seen.append((cfg, list(sys.path))))
    assert main(["repeat", str(theirs)]) == 1 and not seen
    with pytest.raises(FileNotFoundError):  # the step left no record
        main(["repeat", str(theirs), "--trust"])
    (cfg, inside) = seen[0]
    assert cfg.data._target_ == "own_code.Own" and str(tmp_path) in inside
    (theirs / "config.yaml").write_text(yaml.safe_dump(PLAIN))
    sys.path[:] = path
    with pytest.raises(FileNotFoundError):
        main(["repeat", str(theirs)])
    assert str(tmp_path) not in seen[1][1]
    sys.path[:] = path
