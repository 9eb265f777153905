"""``dmin losses``: how well each training image was learned, compared with held-out images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmin.cli.commands.command import Command, show_files, shown_count
from dmin.cli.workspace.built import build_queries
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.progress import followed, titled

if TYPE_CHECKING:
    from dmin.data.base import Dataset
    from dmin.store import Store


@Command
def losses(work: Workspace, results: dict[str, Any]) -> None:
    """Rank the training images by their relative loss, and show both ends."""
    from rich.table import Table

    from dmin.attribution.features import FeatureSet
    from dmin.attribution.losses import (
        loss_table,
        over_fitting,
        require_held_out,
        save_losses,
        usual_losses,
    )
    from dmin.gallery.sheet import save_sheet

    work.require_one_process()
    k = shown_count(work, "losses.k")
    others = None
    if work.cfg.losses.held_out:  # first, so that errors come early
        others = work.queries(build_queries(work.cfg.queries))
        work.require_conditions(others, "queries")
    store = _losses_of(work)
    found = store.losses()
    train, folder = FeatureSet(store, work.data), work.run_folder
    buckets = _buckets(work, work.data)
    paired = work.collector.noise.antithetic
    table = loss_table(found, buckets, paired=paired)
    order = save_losses(store, table, folder / "losses.csv", buckets)
    sheets = {"highest": order[:k], "lowest": order[::-1][:k]}
    for end, rows in sheets.items():
        ids = [store.ids[row] for row in rows]
        below = [f"{table.relative[row]:.2f} ± {table.error[row]:.2f}" for row in rows]
        pictures = [train.image(id).numpy() for id in ids]
        title = f"The {end} relative loss (1 is usual)"
        save_sheet(pictures, ids, below, folder / f"{end}.png", title=title)
    shown = Table(title="Training images that the model has learned worst")
    for column in ("", "image", "loss", "relative loss", "± s.e."):
        shown.add_column(column, justify="left" if column == "image" else "right")
    for rank, row in enumerate(sheets["highest"].tolist(), 1):
        line = f"{table.loss[row]:.4g}", f"{table.relative[row]:.2f}", f"{table.error[row]:.2f}"
        shown.add_row(str(rank), store.ids[row], *line)
    work.console.print(shown)
    if table.draws == 1:
        text = ": from the differences between timesteps; noise.draws=4 gives a better estimate"
        work.console.print(titled("s.e.", text))
    results["figures"] = {"images": f"{len(store):,}", "first": store.ids[order[0]]}
    if others is not None:
        kept = work.store(others, "held-out", losses_only=True)
        held = kept.losses()
        require_held_out(kept.ids, held, store.ids, found)
        usual = usual_losses(held, _buckets(work, others), found, buckets)
        gap = over_fitting(table, loss_table(held, usual=usual, paired=paired))
        work.console.print(titled("held out", f": {gap.spell()}"), soft_wrap=True)
        results["figures"]["gap"] = f"{gap.mean:+.1%}"
    results["files"] = show_files(work, "losses.csv", "highest.png", "lowest.png")


def _losses_of(work: Workspace) -> Store:
    """Return a store with the losses of the training images: the existing one if it is complete."""
    from dmin.store import Store

    path = work.train_path
    if (path / "manifest.json").is_file() and Store(path, verify=False).complete:
        return work.find_train()
    return work.store(work.data, "losses", losses_only=True)


def _buckets(work: Workspace, dataset: Dataset) -> list[str] | None:
    """Return the size of each image, as width x height; None if all have the same size."""
    if work.collector.noise.shapes == "one":
        return None
    images = (dataset[place].image for place in range(len(dataset)))
    shown = followed(images, "sizes", len(dataset), "images", transient=True)
    return [f"{image.shape[2]}x{image.shape[1]}" for image in shown]
