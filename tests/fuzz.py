"""How long the tests that draw at random go on: DMIN_FUZZ times as long as in `make test`.

`make fuzz` and `make zoo` note each trial in a file, of which they make a page:
``python tests/fuzz.py docs/fuzz.md NOTES``.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

FUZZ = int(os.environ.get("DMIN_FUZZ", "1"))
_NOTES = os.environ.get("DMIN_FUZZ_NOTES")

HEADS = {
    "fuzz.md": """# Damaged files and killed writers

Written by `make fuzz`. *Right*: the answer of the undamaged store. *Made again*: a damaged cache
was rebuilt, with a warning, and the answer is right. *Refused*: one paragraph names the file. A
wrong answer, a traceback, a crash or a hang fails the run. Exports have no digest: a flipped bit
may have changed their numbers.
""",
    "zoo.md": """# Random layers and networks

Written by `make zoo`. Networks are drawn at random. The gradients of all examples of a pass at
once are compared with autograd, one example at a time. *Largest error*: distance of an example's
gradient from autograd's over its length, or over 1e-2 (bfloat16: 1e-4) if it is shorter.
""",
}


def longer(examples):
    """Return hypothesis's settings: the same examples in every `make test`, new ones beyond."""
    from hypothesis import settings

    return settings(max_examples=examples * FUZZ, deadline=None, derandomize=FUZZ == 1)


def note(what, outcome, count=1, error=None):
    """Note trials for the page; does nothing in `make test`."""
    if _NOTES:
        with Path(_NOTES).open("a") as file:  # one short write: processes do not mix
            file.write(json.dumps([what, outcome, count, error]) + "\n")


def page(name, notes):
    """Return the page of what was noted."""
    counts, errors = defaultdict(lambda: defaultdict(int)), {}
    for what, outcome, count, error in map(json.loads, notes.splitlines()):
        counts[what][outcome] += count
        if error is not None:
            errors[what] = max(errors.get(what, 0.0), error)
    outcomes = sorted({outcome for each in counts.values() for outcome in each})
    columns = [*outcomes, *(["largest error"] if errors else [])]
    rows = [["what", "trials", *columns], ["---"] * (2 + len(columns))]
    for what, found in sorted(counts.items()):
        cells = [f"{found[o]:,}" if found[o] else "" for o in outcomes]
        if errors:
            cells.append(f"{errors[what]:.0e}" if what in errors else "")
        rows.append([what, f"{sum(found.values()):,}", *cells])
    return HEADS[name] + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    target, source = map(Path, sys.argv[1:])
    target.write_text(page(target.name, source.read_text()))
    print(target)
