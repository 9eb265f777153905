"""``make experiments``: every experiment with its question, time, hardware and command.

``python experiments repeat NAME`` runs one that is a script again (see ``repeat.py``).

What is listed stands at the head of each ``experiments/<name>/README.md``, between two lines of
``---``, one ``key: value`` a line. The list needs nothing but the standard library.
"""

import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEYS = ("question", "command", "minutes", "hardware", "results", "plot")


def header(readme: Path) -> dict[str, str]:
    """Return the keys and values at the head of a README; empty where there is no head."""
    first, *lines = readme.read_text().splitlines() or [""]
    if first != "---" or "---" not in lines:
        return {}
    pairs = (line.partition(":") for line in lines[: lines.index("---")])
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def experiments() -> dict[str, dict[str, str]]:
    """Return the header of every experiment by its name."""
    return {readme.parent.name: header(readme) for readme in sorted(HERE.glob("*/README.md"))}


def minutes(found: dict[str, str]) -> str:
    """Say a time as one would."""
    value = float(found.get("minutes", "nan"))
    if value != value:
        return "time not stated"
    return f"{value / 60:.1f} hours" if value >= 90 else f"{value:g} minutes"


def main() -> None:
    """Print the list."""
    for name, found in experiments().items():
        question = textwrap.wrap(found.get("question", "(no question stated)"), 84)
        print(f"{name}: {minutes(found)}, {found.get('hardware', 'hardware not stated')}")
        print(textwrap.indent("\n".join(question), "    "))
        print(f"    $ {found.get('command', f'see experiments/{name}/README.md')}\n")
    print("Results, plots and what to distrust: experiments/<name>/README.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["repeat"]:
        from experiments.repeat import run

        sys.exit(run(sys.argv[2:]))
    main()
