"""``dmin retrieve``: the training examples behind each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmin.cli.commands.command import Command, show_files, shown_count
from dmin.cli.workspace.built import build, build_queries
from dmin.cli.workspace.made_of import note_queries
from dmin.cli.workspace.search import SELECTED, Search, pooling
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.progress import titled

if TYPE_CHECKING:
    from dmin.attribution import Ranking
    from dmin.attribution.place_maps import PlacesOf


@Command
def retrieve(work: Workspace, results: dict[str, Any]) -> None:
    """Find the training examples behind each query, and show them."""
    from dmin.attribution.check import check_train
    from dmin.attribution.methods.pooled import Pool, Pooled
    from dmin.attribution.place_maps import check_places
    from dmin.attribution.search.selection import Selection
    from dmin.cli.workspace.side_by_side import methods_of

    work.require_one_process(shards=True)
    options = work.resolved("retrieve")
    k = shown_count(work, "retrieve.k")
    methods = methods_of(work)
    if (shown := options.get("places", 0)) < 0:  # older records lack it
        raise DminError(f"retrieve.places={shown}: give a number of examples, 0 or more.")
    for method in methods.values() if shown else ():
        check_places(method, options["group_by"])
    selection = Selection(**{name: options[name] for name in SELECTED})
    source = build_queries(work.cfg.queries)  # first, so that errors come early
    work.require_conditions(source, "queries")
    pool = pooling(work, source, methods.values())
    note_queries(work, source)
    train = work.train_side(methods.values())
    number, what = selection.candidates(train.store.metadata)
    if number < k:
        work.console.print(f"retrieve.k={k}: there are {number:,} {what}, and all are shown.")
    options["k"] = min(k, number)
    for method in methods.values():
        check_train(train, method)
    queries = work.query_side(source, methods=methods.values())
    if pool is not None:
        others = source.others and work.query_side(source.others, "against", methods.values())
        queries = Pool(queries, others, pool)
        methods = {name: Pooled(method, queries) for name, method in methods.items()}
    index = None if work.cfg.index is None else build(work.cfg.index)
    search = Search(work, options, queries, train, selection, index)
    rankings = search.rankings(methods)
    if rankings is not None:  # None: other shards are not finished
        with work.notes.status("computing attribution maps" if shown else "drawing"):
            maps = search.places(rankings, methods, shown)
        _show(work, rankings, maps, search, results)


def _show(
    work: Workspace,
    rankings: list[Ranking],
    maps: PlacesOf,
    search: Search,
    results: dict[str, Any],
) -> None:
    """Write and print the rankings."""
    from dmin.attribution.place_maps import save_places
    from dmin.attribution.ranking_files import save_ranking
    from dmin.attribution.ranking_table import ranking_notes, ranking_table
    from dmin.attribution.wording import spell_overlaps
    from dmin.gallery.html import save_html
    from dmin.gallery.pictures import remembered
    from dmin.gallery.png import save_png

    folder, first = work.run_folder, rankings[0]
    pictures = remembered(search.shown), search.pictures[1]
    save_ranking(rankings, folder)
    if maps:
        save_places(maps, folder / "places.npz")
    save_png(rankings, *pictures, folder / "gallery.png", places=maps)
    files = search.queries.file, search.train.file
    page = folder / "gallery.html"
    save_html(rankings, *pictures, page, query_files=files[0], train_files=files[1], places=maps)
    ids = " ".join(found[0] for found in first.train_ids[:3])
    results["figures"] = {"queries": f"{len(first.query_ids):,}", "first found": f"{ids} …"}
    for ranking in rankings:
        work.console.print(ranking_table(ranking, width=work.console.width))
        for line in ranking_notes(ranking):
            work.console.print(line)
        for what, note in ranking.notes.items():
            work.console.print(titled(what, f": {note}"))
    if len(rankings) > 1:
        work.console.print(titled("agreement", f": {'; '.join(spell_overlaps(rankings))}"))
    results["files"] = show_files(work, "gallery.html", "gallery.png", "ranking.csv")
