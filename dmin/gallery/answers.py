"""Short answers to the five questions that a reader of a ranking has."""

from typing import NamedTuple

import numpy as np

from dmin.attribution.ranking import Ranking, format_score
from dmin.attribution.wording import (
    spell_against,
    spell_certainty,
    spell_copies,
    spell_percentile,
    spell_scale,
    spell_size,
    spell_tiers,
)


class Answer(NamedTuple):
    """A question, its answer, and what else there is to say; empty if nothing."""

    question: str
    text: str
    note: str = ""


def answers(ranking: Ranking, query: int, shares: np.ndarray | None) -> list[Answer]:
    """Answer for one query: which, how sure, on what scale, would the second do, what decided.

    Args:
        ranking: the result of retrieval.
        query: index of the query.
        shares: its row of `Ranking.order_shares`, float [T], or None.

    Returns:
        Five answers, "Not known" among them; only one if no example was found.
    """
    verb = "is behind it" if ranking.order == "proponents" else "speaks against it"
    which = f"Which {ranking.group_by or 'image'} {verb}?"
    if not ranking.count(query):
        bound = format_score(ranking.min_score or 0.0)
        return [Answer(which, "None", f"no score reaches retrieve.min_score={bound}")]
    return [
        _which(ranking, query, which),
        _how_sure(ranking, query),
        _scale(ranking, query),
        _second(ranking, query),
        _decided(ranking, query, shares),
    ]


def _which(ranking: Ranking, query: int, question: str) -> Answer:
    first, label = ranking.train_ids[query][0], ranking.label(query, 0)
    if ranking.group_by and label is not None:
        best = f"{spell_size(ranking, query, 0) or ''}, best example {first}"
        return Answer(question, label, best)
    copies = spell_copies(ranking, query, 0)
    same = ", with the query's label" if ranking.same_label(query, 0) else ""
    note = f"label {label}{same}" if label is not None else ""
    return Answer(question, first, "; ".join(filter(None, [copies and f"{copies} the same", note])))


def _how_sure(ranking: Ranking, query: int) -> Answer:
    question = "How sure is that?"
    if ranking.errors is None or ranking.stability is None:
        why = ranking.notes.get("error bars", "not computed")
        return Answer(question, "Not known", f"error bars: {why}")
    stability, shown = ranking.stability[query], ranking.count(query)
    surest = int((stability[:shown] >= 0.9).sum())
    k, certainty = len(stability), spell_certainty(float(stability[0]))
    return Answer(
        question,
        f"{certainty} sure to be among the first {k}",
        f"{_bars(ranking, query)}; {surest} of {shown} shown are 90\u00a0% sure",
    )


def _bars(ranking: Ranking, query: int) -> str:
    """Return both standard errors of the first score with their sources."""
    known = {
        "of sketching alone": ranking.sketch_errors,
        "of sketching and noise": ranking.total_errors,
    }
    told = [f"±{format_score(v[query, 0])} {n}" for n, v in known.items() if v is not None]
    return f"standard error of its score: {', '.join(told)}"


def _scale(ranking: Ranking, query: int) -> Answer:
    notes = [spell_percentile(ranking, query, 0)]
    if ranking.typical is not None:
        side = "more" if ranking.order == "opponents" else "less"
        notes.append(f"half of all examples have {format_score(ranking.typical[query])} or {side}")
    if ranking.maximum is None:
        notes.append("this method's scores have no largest value")
    elif not ranking.maximum[query]:
        notes.append(f"the {'largest' if ranking.order == 'proponents' else 'smallest'} is 0")
    return Answer(
        "What is the scale?", spell_scale(ranking, query, 0), "; ".join(filter(None, notes))
    )


def _second(ranking: Ranking, query: int) -> Answer:
    question = "Would the second do as well?"
    cards = ranking.cards(query)
    if len(cards) < 2:
        return Answer(question, "There is no second", "only one picture is shown")
    second, scores = cards[1], ranking.scores[query]
    less = format_score(abs(float(scores[0] - scores[second])))
    if ranking.tiers is None:
        return Answer(question, "Not known", f"its score differs by {less}; no error bars")
    alike = bool(ranking.tiers[query, second] == ranking.tiers[query, 0])
    said = spell_tiers(ranking, query)
    more = "; …" if len(said) > 2 else ""
    note = f"its score differs by {less}; {'; '.join(said[:2])}{more}"
    return Answer(question, "Yes, they cannot be distinguished" if alike else "No", note)


def _decided(ranking: Ranking, query: int, shares: np.ndarray | None) -> Answer:
    question, note = "Which part of the process decided?", ""
    if ranking.group_contributions is not None:
        parts = ranking.group_contributions[query, : ranking.count(query)].mean(0)
        largest = int(np.abs(parts).argmax())
        share = parts[largest] / (parts.sum() or 1)
        note = f"{ranking.groups[largest]} gave {100 * share:.0f} % of the scores"
    if shares is None:
        return Answer(question, "Not known", note or "this method does not split its scores")
    if len(ranking.timesteps) == 1:
        return Answer(question, f"t = {ranking.timesteps[0]:g}, the only one", note)
    if not np.isfinite(shares).all():
        return Answer(question, "None: all scores are equal", note)
    order = np.argsort(-shares)
    first, second = (
        f"t = {ranking.timesteps[t]:g} made {100 * shares[t]:.0f} %" for t in order[:2]
    )
    against = spell_against(ranking, shares)
    notes = filter(None, [f"then {second}", against and f"against it {against}", note])
    return Answer(question, f"{first} of the order", "; ".join(notes))
