"""The tables of docs/trainers.md, of the code: ``PYTHONPATH=tests python -m runs.documented``."""

import re
from pathlib import Path

from dmin.runs.keys import tables
from dmin.runs.recognise import HEADERS, TRAINERS

PAGE = Path(__file__).parents[2] / "docs/trainers.md"


def table(trainer):
    """Return what becomes of a trainer's keys, as Markdown."""
    rows = {"taken": [], "approximated": [], "refused unless ignored": []}
    for section in tables(trainer).values():
        for key, setting in section.settings.items():
            rows["taken"].append(f"`{key}` → `model.{setting.name}`")
        for meaning, keys in section.random.items():
            rows["approximated"].append(f"{_keys(keys)}: {meaning}")
        for meaning, keys in section.other.items():
            rows["refused unless ignored"].append(f"{_keys(keys)}: {meaning}")
    lines = [f"| {name} | {'; '.join(each)} |" for name, each in rows.items() if each]
    return "\n".join(["| | keys |", "|---|---|", *lines])


def _keys(keys):
    return ", ".join(f"`{key}`" for key in keys.split())


def page():
    """Return docs/trainers.md with the tables of the readers."""
    text = PAGE.read_text()
    for module in (*TRAINERS, *HEADERS):
        name = module.__name__.rpartition(".")[2]
        made = {
            "keys": lambda name=name: table(name),
            "models": lambda module=module: ", ".join(f"`{each}`" for each in module.FAMILIES),
        }
        for what, content in made.items():
            marks = re.compile(rf"(<!-- {what} of {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if marks.search(text):
                told = content()
                text = marks.sub(lambda m, told=told: f"{m[1]}{told}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
