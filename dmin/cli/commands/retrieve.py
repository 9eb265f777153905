"""``dmin retrieve``: the training examples behind each query."""

from __future__ import annotations

from typing import Any

from dmin.cli.commands.command import FEATURES, command
from dmin.cli.workspace.built import build, build_queries
from dmin.cli.workspace.ranking_parts import joined
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.progress import titled


@command(*FEATURES, "queries", "method", "index", "retrieve")
def retrieve(work: Workspace, results: dict[str, Any]) -> None:
    """Find the training examples behind each query, and show them."""
    from dmin.attribution import Approximate, Ranking, retrieve_part
    from dmin.attribution import retrieve as search
    from dmin.attribution.confidence import with_confidence
    from dmin.attribution.methods.popularity import PopularityCorrected
    from dmin.attribution.ranking_files import save_ranking
    from dmin.attribution.ranking_table import ranking_table
    from dmin.attribution.search.selection import Selection
    from dmin.gallery.html import save_html
    from dmin.gallery.png import save_png

    work.require_one_process(shards=True)
    options = work.resolved("retrieve")["retrieve"]
    method = build(work.cfg.method)
    if options["popularity"]:
        method = PopularityCorrected(method)
    chosen = ("order", "min_score", "where", "group_by", "group_score", "split")
    selection = Selection(**{name: options[name] for name in chosen})
    source = build_queries(work.cfg.queries)  # what is wrong with it is said before the work
    train = work.train_side([method])
    queries = work.query_side(source, methods=[method])
    index = None if work.cfg.index is None else build(work.cfg.index)
    rows, device = options["rows"], options["device"]
    k = options["k"]
    # Others that may take their places; an approximate index finds none to rely on.
    sure = options["confidence"] and not (selection.group_by or isinstance(index, Approximate))
    wide = max(k, min(3 * k, selection.count(train.store.metadata))) if sure else k
    asked = method, wide, rows, selection, index, device
    if work.share.shards == 1:
        ranking: Ranking | None = search(queries, train, *asked)
    else:
        part = retrieve_part(queries, train, work.share.range(len(train)), *asked)
        ranking = joined(work, part, queries, train, method, selection)
    if ranking is None:
        return
    if sure:
        ranking = with_confidence(ranking, queries, train, method, k)
    folder = work.run_folder
    save_ranking(ranking, folder)
    images = (lambda id: queries.image(id).numpy()), (lambda id: train.image(id).numpy())
    notes = {
        "training examples": f"{len(train):,}",
        "model": str(work.cfg.model.path),
        "sketch": f"{work.collector.sketch.family}, k = {work.collector.sketch.dim:,}",
    }
    save_png(ranking, *images, folder / "gallery.png")
    save_html(ranking, *images, folder / "gallery.html", notes=notes)
    first = " ".join(found[0] for found in ranking.train_ids[:3])
    results["figures"] = {"queries": f"{len(queries.store):,}", "first found": f"{first} …"}
    results["files"] = [str(folder / name) for name in ("gallery.png", "gallery.html")]
    work.console.print(ranking_table(ranking, width=work.console.width))
    for what, note in ranking.notes.items():
        work.console.print(titled(what, f": {note}"))
    work.console.print(
        f"Look at\n  {folder / 'gallery.html'}\n  {folder / 'gallery.png'}\n"
        f"  {folder / 'ranking.csv'}",
        soft_wrap=True,
    )
