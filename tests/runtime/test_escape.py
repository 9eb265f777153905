"""Texts of data, paths and settings: nothing in them acts on a terminal or in a spreadsheet."""

import csv
import io
import json
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dmin.cli.config import compose
from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.escape import end_lines_in_lf, printable, read_csv, write_csv
from dmin.runtime.progress import PlainConsole, console, titled

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\r\rover",
    "a\x08b\x7f",
    "\u202eeman",
    "\u2066x\u2069",
    "[bold]x[/]",
    "[/b]",
    "[link=http://e]x[/link]",
    ":boom:",
    "\udc80",
    "a\u2028b",
]
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(HOSTILE)
FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "  =1", "\n=1", "=cmd|'/c calc'!A0", "-a"]


def test_tables_are_written_in_one_place_which_ends_lines_in_lf(tmp_path):
    root = Path(__file__).parents[2]
    writers = [
        file.relative_to(root).as_posix()
        for folder in ("dmin", "experiments")
        for file in (root / folder).rglob("*.py")
        if re.search(r"csv\.(Dict)?[wW]riter\(|\.to_csv\(|\bsavetxt\(", file.read_text("utf-8"))
    ]
    assert writers == ["dmin/runtime/escape.py"]
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": "x\ny"}, {"a": 2}])
    (tmp_path / "b.csv").write_bytes(b"step,loss\r\n1,2\r\n")
    end_lines_in_lf(tmp_path / "b.csv")
    assert b"\r" not in (tmp_path / "a.csv").read_bytes()
    assert (tmp_path / "b.csv").read_bytes() == b"step,loss\n1,2\n"


@given(texts)
def test_what_is_printable_holds_nothing_that_is_obeyed(text):
    shown = printable(text)
    shown.encode()
    assert all(char in "\n\t" or not 0 <= ord(char) < 32 for char in shown)
    assert not re.search("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert printable(shown) == shown
    json.loads(printable(json.dumps(text, ensure_ascii=False)))


@pytest.mark.parametrize("text", ["Bär, 猫 😀 \u200d", "naïve\n\ttext", "[bold]"])
def test_other_texts_stay_as_they_are(text):
    assert printable(text) == text


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=3))
def test_a_console_shows_texts_as_they_are(words):
    file = io.StringIO()
    shown = PlainConsole(file=file, width=10_000, markup=False, emoji=False, force_terminal=True)
    for word in words:
        shown.print(word, highlight=False, soft_wrap=True)
        shown.print(titled(word, f": {word}"), highlight=False)
    written = re.sub(r"\x1b\[\d*m", "", file.getvalue())
    assert "\x1b" not in written and "\x9b" not in written
    for word in words:
        word = re.sub("[\x07\x08\x0b\x0c\r]", "", word)  # rich leaves these out
        assert "".join(printable(word).split()) in "".join(written.split())


def test_the_console_of_the_commands_is_such_a_one(capsys):
    console().print("[red]x[/] :boom: [/b] \x1b[2J", highlight=False)
    assert capsys.readouterr().out == "[red]x[/] :boom: [/b] \\u001b[2J\n"


def test_nothing_else_makes_a_console_or_writes_markup():
    dmin = Path(__file__).parents[2] / "dmin"
    for file in dmin.rglob("*.py"):
        source = file.read_text()
        if file.name != "progress.py":
            assert not re.search(r"(?<!Plain)\bConsole\(|get_console|from_markup", source), file
        assert "[/]" not in source and "[bold" not in source, file
        assert not re.search(r'TextColumn\("\{task\.description\}"\)', source), file


def test_an_error_says_nothing_that_is_obeyed():
    assert str(DminError("data.root=\x1b[2J: \udcff")) == "data.root=\\u001b[2J: \\udcff"


def test_a_warning_of_the_command_line_says_nothing_that_is_obeyed(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    compose._show_warnings_plainly()
    warnings.showwarning(DminWarning("a\x1b[2J"), DminWarning, "file", 1)
    assert capsys.readouterr().err == "Warning: a\\u001b[2J\n"


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_table_is_a_formula(text, tmp_path):
    write_csv(tmp_path / "a.csv", [{text: text, "n": -0.5, "s": "-0.5", "e": "1e-05", "x": None}])
    content = (tmp_path / "a.csv").read_bytes()
    assert b"\r" not in content and content.endswith(b"\n")
    with (tmp_path / "a.csv").open(newline="") as file:
        head, cells = csv.reader(file)
    assert head[0] == cells[0] == f"'{text}" and cells[1:] == ["-0.5", "-0.5", "1e-05", ""]
    (row,) = read_csv(tmp_path / "a.csv")
    assert row[f"'{text}"] == text


@given(st.lists(st.dictionaries(st.sampled_from("abc"), texts, min_size=1), max_size=4))
@settings(deadline=None)
def test_a_table_is_read_as_it_was_written(rows):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder, "a.csv"), rows)
        columns = dict.fromkeys(name for row in rows for name in row)
        same = [{name: printable(row.get(name, "")) for name in columns} for row in rows]
        assert read_csv(Path(folder, "a.csv")) == same
