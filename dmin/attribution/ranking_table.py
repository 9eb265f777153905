"""A ranking for a terminal."""

import numpy as np
from rich.table import Table
from rich.text import Text

from dmin.attribution.ranking import Ranking, headline
from dmin.attribution.wording import (
    spell_blind,
    spell_confidence,
    spell_copies,
    spell_query,
    spell_scale,
    spell_size,
)

LONG = 40  # characters of an id, of which more are folded


def ranking_table(
    ranking: Ranking, max_queries: int = 12, columns: int = 5, width: int | None = None
) -> Table:
    """Draw the ranking for a terminal, one line of training examples per query.

    Args:
        ranking: the answer.
        max_queries: queries shown, from the first.
        columns: training examples shown for each, from the best.
        width: characters of the terminal; fewer examples are shown if their ids are long.

    Returns:
        A table in which every cell gives id, label and score; a label that agrees with the
        query's is bold and green.
    """
    queries, k = min(max_queries, len(ranking.query_ids)), min(columns, ranking.scores.shape[1])
    k = k if width is None else min(k, _fitting(ranking, queries, k, width))
    cards = [ranking.cards(query)[:k] for query in range(queries)]
    k = max(map(len, cards), default=0) or 1
    table = Table(
        title=Text(f"{headline(ranking)}, by {ranking.method}", style="bold"),
        caption=f"{queries} of {len(ranking.query_ids)} queries, "
        f"{k} of {ranking.scores.shape[1]} {_shown(ranking)}",
        show_lines=any("label" in metadata for metadata in ranking.query_metadata),
    )
    table.add_column("query", style="bold", overflow="fold")
    for rank in range(k):
        table.add_column(str(rank + 1), justify="right", overflow="fold")
    if ranking.group_contributions is not None:
        table.add_column("from", style="dim")
    for query in range(queries):
        head = Text(ranking.query_ids[query])
        if (label := ranking.query_metadata[query].get("label")) is not None:
            head.append(f"\n{label}", style="not bold")
        cells = [_terminal_cell(ranking, query, *card) for card in enumerate(cards[query])]
        if ranking.group_contributions is not None:
            cells += [Text()] * (k - len(cells)) + [_largest_groups(ranking, query, k)]
        table.add_row(head, *cells)
    return table


def _fitting(ranking: Ranking, queries: int, k: int, width: int) -> int:
    """Return how many columns with complete ids fit into a line, at least one."""
    asked = max(len(id) for id in ("query", *ranking.query_ids[:queries]))
    found = max(len(id) for each in ranking.train_ids[:queries] for id in each[:k])
    least = 22  # what stands below an id: ±0.013 sketch · 100 %
    left = width - min(asked, LONG) - 4 - (25 if ranking.group_contributions is not None else 0)
    return max(1, left // (min(max(found, least), LONG) + 3))


def _largest_groups(ranking: Ranking, query: int, k: int, most: int = 3) -> Text:
    """Describe which groups of layers contribute most to the first k examples."""
    assert ranking.group_contributions is not None
    parts = ranking.group_contributions[query, : min(k, ranking.count(query))].mean(0)
    total = abs(float(parts.sum())) or 1.0
    largest = np.argsort(-np.abs(parts), kind="stable")[:most]
    return Text("\n".join(f"{ranking.groups[g]} {parts[g] / total:.0%}" for g in largest))


def _terminal_cell(ranking: Ranking, query: int, place: int, rank: int) -> Text:
    # Text, never markup: an id may hold square brackets.
    cell = Text("" if rank == place else f"rank {rank + 1}: ", style="dim")
    cell.append(ranking.train_ids[query][rank])
    if (copies := spell_copies(ranking, query, rank)) is not None:
        cell.append(f" {copies}", style="not dim")
    if (label := ranking.label(query, rank)) is not None:
        style = "bold green not dim" if ranking.same_label(query, rank) else "not dim"
        cell.append(f"\n{label}", style=style)
    if (size := spell_size(ranking, query, rank)) is not None:
        cell.append(f" {size}")
    cell.append(f"\n{spell_scale(ranking, query, rank)}", style="not dim")
    sure = spell_confidence(ranking, query, rank)
    return cell if sure is None else cell.append(f"\n{sure}", style="dim")


def _shown(ranking: Ranking) -> str:
    if ranking.group_by is not None:
        name = ranking.group_by
        return f"values of {name} each: foremost example, {name} and its examples, score"
    of = {"sketch": "of sketching alone", "total": "of sketching and noise"}
    sure = "" if ranking.errors is None else f", its standard error {of[ranking.errors[0]]}"
    sure += ", and the probability that it is among them" if sure else ""
    split = "; from: the groups of layers that add most" if ranking.groups else ""
    bounded = ranking.maximum is not None and bool(ranking.maximum.any())
    bound = " of the largest possible" if bounded else ""
    pixels = "; ×: copies of the same pixels" if _collapsed(ranking) else ""
    return f"examples each: id, label, score{bound}{sure}{split}{pixels}"


def _collapsed(ranking: Ranking) -> bool:
    return any(ranking.copies(query, rank) for query, rank in ranking.places())


def ranking_notes(ranking: Ranking, max_queries: int = 12) -> list[Text]:
    """Return notes below the table: blind timesteps, and one line for each query."""
    blind = spell_blind(ranking)
    found = [] if blind is None else [Text.assemble((f"{blind}.", "yellow"))]
    for query in range(min(max_queries, len(ranking.query_ids))):
        if told := spell_query(ranking, query):
            found.append(Text.assemble((ranking.query_ids[query], "bold"), f": {'; '.join(told)}"))
    return found
