from pathlib import Path

import pytest
from models.tiny import save


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return the folder of a family's tiny checkpoint, made when first asked for."""
    made: dict[str, Path] = {}

    def of(family, **changes):
        key = f"{family}-{changes}"
        if key not in made:
            made[key] = save(family, tmp_path_factory.mktemp(family) / "checkpoint", **changes)
        return made[key]

    return of
