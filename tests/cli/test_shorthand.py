"""What a command line leaves out or says shorter, and what is none of that."""

import pytest
from golden.settings import dmin

from dmin.cli.config.shorthand import spelled_out


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("demo", ["seed=1"], ["experiment=digits", "seed=1"]),
        ("demo", ["+experiment=mine"], ["+experiment=mine"]),
        ("outliers", ["data=digits"], ["method=grad_dot", "data=digits"]),
        ("outliers", ["-m", "method=trak,datainf"], ["-m", "method=trak,datainf"]),
        ("retrieve", ["method=a,b,c", "x=1"], ["method=a", "retrieve.beside=[b,c]", "x=1"]),
        ("retrieve", ["method=a"], ["method=a"]),
        ("retrieve", ["method=a,b", "-m"], ["method=a,b", "-m"]),
        ("retrieve", ["--multirun", "method=a,b"], ["--multirun", "method=a,b"]),
        ("retrieve", ["method.weights=[1,2]", "k=a,b"], ["method.weights=[1,2]", "k=a,b"]),
        ("evaluate", ["method=a,b"], ["method=a,b"]),
    ],
)
def test_words_are_spelled_out(command, words, expected):
    assert spelled_out(command, words) == expected


def test_settings_of_the_machine_are_found_in_the_folder_one_is_in(tmp_path):
    place = tmp_path / 'it\'s "mine"'
    (place / "conf/local").mkdir(parents=True)
    text = "# @package _global_\nsketch: {dim: 512}\nextras: {quiet: true}\n"
    (place / "conf/local/default.yaml").write_text(text)
    status, shown = dmin("collect", "model=mlp", "data=digits", "--cfg", "job", place=place)
    assert status == 0 and "dim: 512" in shown and "quiet: true" in shown
