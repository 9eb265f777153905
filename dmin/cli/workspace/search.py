"""One search by several methods: the common inputs, and the ranking of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dmin.cli.workspace.ranking_parts import joined
from dmin.cli.workspace.side_by_side import about
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.progress import titled

if TYPE_CHECKING:
    import numpy as np

    from dmin.attribution import FeatureSet, Method, Ranking
    from dmin.attribution.place_maps import PlacesOf
    from dmin.attribution.search.index import Index
    from dmin.attribution.search.selection import Selection
    from dmin.gallery.pictures import Images

SELECTED = ("order", "min_score", "where", "group_by", "group_score", "split")


@dataclass
class Search:
    """The common inputs of a search by several methods: features, selection, index."""

    work: Workspace
    options: dict[str, Any]
    queries: FeatureSet
    train: FeatureSet
    selection: Selection
    index: Index | None = None
    blind: dict[str, tuple[float, ...] | None] = field(default_factory=dict)  # by readout

    def __post_init__(self) -> None:
        """Create the cache of decoded pictures."""
        from dmin.gallery.pictures import remembered

        queries, train = self.queries, self.train
        self.pictures: tuple[Images, Images] = (
            remembered(lambda id: queries.image(id).numpy()),
            remembered(lambda id: train.image(id).numpy()),
        )

    def rankings(self, methods: Mapping[str, Method]) -> list[Ranking] | None:
        """Return the answers of several methods; None while other shards are not done.

        Raises:
            DminError: a method cannot compare the queries with the training examples.
        """
        from dmin.attribution.check import check_pair

        for method in methods.values():
            check_pair(self.queries, self.train, method)
        head, found = about(self.work, self.train), []
        for name, method in methods.items():
            if len(methods) > 1:
                self.work.notes.print(titled("method", f": {name}"))
            ranking = self.ranking(method)
            if ranking is None:
                return None
            named = ranking if len(methods) == 1 else replace(ranking, method=name)
            found.append(replace(named, about=head))
        return found

    def places(
        self, rankings: Sequence[Ranking], methods: Mapping[str, Method], shown: int
    ) -> PlacesOf:
        """Return the maps of the first examples, if requested."""
        from dmin.attribution import places

        found: PlacesOf = {}
        for ranking, method in zip(rankings, methods.values(), strict=True):
            if shown:
                found |= places(self.queries, self.train, ranking, method, shown)
        return found

    def ranking(self, method: Method) -> Ranking | None:
        """Return the ranking by one method, with scale, errors and copies."""
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
            blind = self.blind_at(method.requires.readouts[0])
            found = replace(found, blind=blind and tuple(t for t in blind if t in found.timesteps))
        if chosen.group_by:
            return found
        sides = getattr(queries, "sides", ())  # of a Pool
        members = [side.image(id).numpy() for side in sides for id in side.store.ids]
        return with_copies(found, *self.pictures, wider, namesakes(queries, train), members)

    def blind_at(self, readout: str) -> tuple[float, ...] | None:
        """Return the blind timesteps as defined by the doctor; None for too few examples."""
        from dmin.doctor.timestep_report import report_of

        if readout not in self.blind:
            report = report_of(self.train.store, readout) if len(self.train) > 2 else None
            found = None if report is None else (t.timestep for t in report if t.blind)
            self.blind[readout] = None if found is None else tuple(found)
        return self.blind[readout]

    def shown(self, id: str) -> np.ndarray:
        """Return a query for display, with parts outside of the mask made pale."""
        from dmin.data.part import dimmed

        example = self.queries.example(id)
        return dimmed(example.image, example.mask).numpy()


def pooling(work: Workspace, source: Any, methods: Iterable[Method]) -> str | None:
    """Return how queries are pooled, if at all; refuse incompatible settings."""
    kind, others = getattr(source, "pool", None), getattr(source, "others", None)
    if others is None and (kind is None or len(source) == 1):
        return None
    work.require_conditions(others, "queries")
    places = work.cfg.retrieve.get("places")
    odd = [f"retrieve.places={places}"] * bool(places)
    odd += ["an index: a max is not an inner product"] * (kind == "max" and bool(work.cfg.index))
    odd += [f"method={m.name}, which ignores the query" for m in methods if not m.by_query]
    if odd:
        raise DminError(
            f"queries.pool and queries.against cannot be combined with {odd[0]}. Leave one out."
        )
    return kind or "mean"
