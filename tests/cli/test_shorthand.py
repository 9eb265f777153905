"""What a command line leaves out or says shorter, and what is none of that."""

import pytest

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
