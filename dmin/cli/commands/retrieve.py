"""``dmin retrieve``: the training examples behind each query."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dmin.cli.commands.command import Command, shown_count
from dmin.cli.workspace.built import build, build_queries
from dmin.cli.workspace.made_of import note_queries
from dmin.cli.workspace.ranking_parts import joined
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.progress import titled

if TYPE_CHECKING:
    import numpy as np

    from dmin.attribution import FeatureSet, Method, Ranking
    from dmin.attribution.search.index import Index
    from dmin.attribution.search.selection import Selection
    from dmin.gallery.pictures import Images

SELECTED = ("order", "min_score", "where", "group_by", "group_score", "split")


@Command
def retrieve(work: Workspace, results: dict[str, Any]) -> None:
    """Find the training examples behind each query, and show them."""
    from dmin.attribution.check import check_pair, check_train
    from dmin.attribution.search.selection import Selection
    from dmin.cli.workspace.side_by_side import about, methods_of
    from dmin.gallery.pictures import remembered

    work.require_one_process(shards=True)
    options = work.resolved("retrieve")["retrieve"]
    k = shown_count(work, "retrieve.k")
    methods = methods_of(work)
    selection = Selection(**{name: options[name] for name in SELECTED})
    source = build_queries(work.cfg.queries)  # what is wrong with it is said before the work
    work.require_conditions(source, "queries")
    note_queries(work, source)
    train = work.train_side(methods.values())
    number, what = selection.candidates(train.store.metadata)
    if number < k:
        work.console.print(f"retrieve.k={k}: there are {number:,} {what}, and all are shown.")
    options["k"] = min(k, number)
    for method in methods.values():
        check_train(train, method)
    queries = work.query_side(source, methods=methods.values())
    for method in methods.values():
        check_pair(queries, train, method)
    index = None if work.cfg.index is None else build(work.cfg.index)
    pictures = (
        remembered(lambda id: queries.image(id).numpy()),
        remembered(lambda id: train.image(id).numpy()),
    )
    asked = _Asked(work, options, queries, train, selection, index, pictures)
    head, rankings = about(work, train), []
    for name, method in methods.items():
        if len(methods) > 1:
            work.notes.print(titled("method", f": {name}"))
        found = asked.ranking(method)
        if found is None:  # other shards are not done
            return
        named = found if len(methods) == 1 else replace(found, method=name)
        rankings.append(replace(named, about=head))
    _show(work, rankings, asked, results)


@dataclass
class _Asked:
    """What is asked of every method alike."""

    work: Workspace
    options: dict[str, Any]
    queries: FeatureSet
    train: FeatureSet
    selection: Selection
    index: Index | None
    pictures: tuple[Images, Images]
    blind: dict[str, tuple[float, ...] | None] = field(default_factory=dict)  # by readout

    def ranking(self, method: Method) -> Ranking | None:
        """Return the answer by one method, with all that its scores mean."""
        from dmin.attribution import Approximate, retrieve as search, retrieve_part
        from dmin.attribution.confidence import with_confidence
        from dmin.attribution.copies import namesakes, with_copies

        k, chosen = self.options["k"], self.selection
        queries, train = self.queries, self.train
        # Others that may take their places; an approximate index finds none to rely on.
        unsure = chosen.group_by or isinstance(self.index, Approximate)
        sure = self.options["confidence"] and not unsure
        wide = max(k, min(3 * k, chosen.candidates(train.store.metadata)[0])) if sure else k
        rows, device = self.options["rows"], self.options["device"]
        asked = method, wide, rows, chosen, self.index, device
        if self.work.share.shards == 1:
            found: Ranking | None = search(queries, train, *asked)
        else:
            part = retrieve_part(queries, train, self.work.share.range(len(train)), *asked)
            found = joined(self.work, part, queries, train, method, chosen, k)
        if found is None:
            return None
        wider = found
        if sure:
            found = with_confidence(found, queries, train, method, k)
        if found.contributions is not None and method.requires.readouts:
            found = replace(found, blind=self.blind_at(method.requires.readouts[0]))
        if chosen.group_by:
            return found
        return with_copies(found, *self.pictures, wider, namesakes(queries, train))

    def blind_at(self, readout: str) -> tuple[float, ...] | None:
        """Return the timesteps that the doctor calls blind; None of too few examples to tell."""
        from dmin.doctor.timestep_report import report_of

        if readout not in self.blind:
            report = report_of(self.train.store, readout) if len(self.train) > 2 else None
            found = None if report is None else (t.timestep for t in report if t.blind)
            self.blind[readout] = None if found is None else tuple(found)
        return self.blind[readout]


def _show(
    work: Workspace,
    rankings: list[Ranking],
    asked: _Asked,
    results: dict[str, Any],
) -> None:
    """Write and print the answer."""
    from dmin.attribution.ranking_files import save_ranking
    from dmin.attribution.ranking_table import ranking_remarks, ranking_table
    from dmin.attribution.wording import spell_overlaps
    from dmin.data.part import dimmed
    from dmin.gallery.html import save_html
    from dmin.gallery.pictures import remembered
    from dmin.gallery.png import save_png

    def asked_about(id: str) -> np.ndarray:
        example = asked.queries.example(id)
        return dimmed(example.image, example.mask).numpy()

    folder, first = work.run_folder, rankings[0]
    pictures = remembered(asked_about), asked.pictures[1]
    save_ranking(rankings, folder)
    save_png(rankings, *pictures, folder / "gallery.png")
    files = asked.queries.file, asked.train.file
    page = folder / "gallery.html"
    save_html(rankings, *pictures, page, query_files=files[0], train_files=files[1])
    ids = " ".join(found[0] for found in first.train_ids[:3])
    results["figures"] = {"queries": f"{len(first.query_ids):,}", "first found": f"{ids} …"}
    results["files"] = ["gallery.png", "gallery.html"]  # beside the record
    for ranking in rankings:
        work.console.print(ranking_table(ranking, width=work.console.width))
        for remark in ranking_remarks(ranking):
            work.console.print(remark)
        for what, note in ranking.notes.items():
            work.console.print(titled(what, f": {note}"))
    if len(rankings) > 1:
        work.console.print(titled("agreement", f": {'; '.join(spell_overlaps(rankings))}"))
    work.console.print(
        f"Look at\n  {folder / 'gallery.html'}\n  {folder / 'gallery.png'}\n"
        f"  {folder / 'ranking.csv'}",
        soft_wrap=True,
    )
