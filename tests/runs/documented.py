"""The tables of docs/trainers.md, of the code: ``PYTHONPATH=tests python -m runs.documented``."""

import re
from pathlib import Path

import yaml

from dmin.runs.trainer_tables import families, table

TOP = Path(__file__).parents[2]
PAGE, TABLES = TOP / "docs/trainers.md", TOP / "dmin/runs/tables"


def keys(trainer, sections):
    """Return what becomes of a trainer's keys, as Markdown."""
    rows = {"taken": [], "approximated": [], "refused unless ignored": []}
    for section in (table(trainer, name) for name in sections):
        for key, setting in section.settings.items():
            rows["taken"].append(f"`{key}` → `model.{setting.name}`")
        for key, known in section.rounded.items():
            rounded = ", ".join(f"`{word}` → `{kind}`" for word, kind in known.items())
            told = f"`{key}` → `model.base_dtype` of all layers ({rounded}; others are refused)"
            rows["approximated"].append(told)
        for meaning, several in section.random.items():
            rows["approximated"].append(f"{_keys(several)}: {meaning}")
        for meaning, several in section.other.items():
            rows["refused unless ignored"].append(f"{_keys(several)}: {meaning}")
    lines = [f"| {name} | {'; '.join(each)} |" for name, each in rows.items() if each]
    return "\n".join(["| | keys |", "|---|---|", *lines])


def _keys(several):
    return ", ".join(f"`{key}`" for key in several.split())


def page():
    """Return docs/trainers.md with the tables of the readers."""
    text = PAGE.read_text()
    for file in sorted(TABLES.glob("*.yaml")):
        sections = list(yaml.safe_load(file.read_text()))
        made = {"keys": keys(file.stem, [s for s in sections if s not in ("families", "versions")])}
        for section in ("families", "versions"):
            known = families(file.stem, section)
            pairs = (
                f"`{name}` → {family or 'its base model tells'}" for name, family in known.items()
            )
            made[section] = "; ".join(pairs)
        for what, told in made.items():
            marks = rf"(<!-- {what} of {file.stem} -->\n).*?(<!-- end -->)"
            text = re.sub(marks, lambda m, t=told: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
