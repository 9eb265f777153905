"""``dmin outliers``: the training examples with the highest self-influence."""

from typing import Any

from hydra.core.hydra_config import HydraConfig

from dmin.cli.commands.command import Command, show_files, shown_count
from dmin.cli.workspace.built import build
from dmin.cli.workspace.workspace import Workspace


@Command
def outliers(work: Workspace, results: dict[str, Any]) -> None:
    """Rank the training examples by their self-influence, and show the first."""
    from rich.table import Table

    from dmin.attribution.self_influence import outlier_scores, save_self_influence
    from dmin.gallery.sheet import save_sheet

    work.require_one_process()
    method, k = build(work.cfg.method), shown_count(work, "outliers.k")
    train = work.train_side([method])
    scores = outlier_scores(train, method, HydraConfig.get().runtime.choices.get("method"))
    folder, store = work.run_folder, train.store
    order = save_self_influence(store, scores, folder / "outliers.csv")
    first = order[:k].tolist()
    labels = [str(store.metadata[row].get("label", "")) for row in first]
    ids, spelled = [store.ids[row] for row in first], [f"{scores[row]:.4g}" for row in first]
    table = Table(title=f"Training examples with the highest self-influence, by {method.name}")
    for column in ("", "example", "label", "self-influence"):
        table.add_column(column, justify="left" if column == "example" else "right")
    for rank, line in enumerate(zip(ids, labels, spelled, strict=True), 1):
        table.add_row(str(rank), *line)
    below = [
        f"{label} · {score}" if label else score
        for label, score in zip(labels, spelled, strict=True)
    ]
    pictures = [train.image(id).numpy() for id in ids]
    title = "Highest self-influence: rare, or labelled wrongly?"
    save_sheet(pictures, ids, below, folder / "outliers.png", title=title)
    results["figures"] = {"examples": f"{len(store):,}", "first": " ".join(ids[:3]) + " …"}
    work.console.print(table)
    results["files"] = show_files(work, "outliers.png", "outliers.csv")
