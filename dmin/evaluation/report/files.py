"""The files of a report: tables, pictures, a page."""

from pathlib import Path

from dmin.evaluation.report.page import save_page
from dmin.evaluation.report.plots import save_all
from dmin.evaluation.report.results import Report
from dmin.evaluation.report.tables import markdown


def save(report: Report, folder: str | Path) -> list[Path]:
    """Write tables, pictures and the page; return the most important files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder)
    (folder / "results.md").write_text(markdown(report), encoding="utf-8")
    pictures = save_all(report, folder)
    page = save_page(report, folder / "results.html")
    return [page, folder / "results.md", *pictures[:1]]
