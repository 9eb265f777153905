"""How long the tests that draw at random go on: DMIN_FUZZ times as long as in `make test`."""

import os

FUZZ = int(os.environ.get("DMIN_FUZZ", "1"))


def longer(examples):
    """Return hypothesis's settings: the same examples in every `make test`, new ones beyond."""
    from hypothesis import settings

    return settings(max_examples=examples * FUZZ, deadline=None, derandomize=FUZZ == 1)
