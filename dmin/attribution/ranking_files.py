"""Save and load a ranking: CSV, Parquet and JSON."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dmin.attribution.ranking import Ranking
from dmin.attribution.ranking_json import document, plain
from dmin.attribution.ranking_rows import records
from dmin.runtime.escape import write_csv


def save_ranking(ranking: Ranking | Sequence[Ranking], folder: str | Path) -> Path:
    """Write `ranking.csv` (one line for each query and rank) and `ranking.json`.

    With pyarrow installed, `ranking.parquet` holds the lines as well, their types kept.

    Args:
        ranking: one ranking, or those of several methods for the same queries; then each line has
            its method.
        folder: created if it does not exist.

    Returns:
        The folder.
    """
    rankings = [ranking] if isinstance(ranking, Ranking) else list(ranking)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {**({"method": each.method} if len(rankings) > 1 else {}), **line}
        for each in rankings
        for line in records(each)
    ]
    cells = ({key: _cell(value) for key, value in line.items()} for line in lines)
    write_csv(folder / "ranking.csv", cells)
    _save_parquet(lines, folder / "ranking.parquet")
    text = json.dumps(document(rankings), ensure_ascii=False, indent=1, default=plain)
    (folder / "ranking.json").write_text(text + "\n", encoding="utf-8")
    return folder


def _cell(value: Any) -> Any:
    nested = isinstance(value, dict | list | tuple)
    return json.dumps(value, ensure_ascii=False, default=plain) if nested else value


def _save_parquet(records: list[dict[str, Any]], path: Path) -> None:
    """Write the rows with their types, if pyarrow is installed; mixed columns become text."""
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        return
    columns = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [_cell(record.get(name)) for record in records]
        if len({type(value) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    parquet.write_table(pyarrow.table(columns), path)
