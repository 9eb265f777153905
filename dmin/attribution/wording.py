"""What the numbers of a ranking mean, in words that table, picture and page share."""

from __future__ import annotations

import math
from itertools import groupby

from dmin.attribution.ranking import Ranking, format_score


def spell_scale(ranking: Ranking, query: int, rank: int) -> str:
    """Return a score, and the largest possible where there is one: ``8.910 of 10``."""
    score = format_score(ranking.scores[query, rank])
    if ranking.maximum is None:
        return score
    return f"{score} of {_short(float(ranking.maximum[query]))}"


def spell_percentile(ranking: Ranking, query: int, rank: int) -> str | None:
    """Say how many candidates score less: ``above 99.99 % of 100,000``; None if not known."""
    share = ranking.percentile(query, rank)
    if share is None or ranking.candidates is None:
        return None
    side = "above" if ranking.order == "proponents" else "below"
    digits = max(0, math.ceil(math.log10(ranking.candidates)) - 2)
    floor = math.floor(share * 10**digits + 1e-6) / 10**digits  # never up to 100 %
    if ranking.sample is None:
        return f"{side} {floor:.{digits}f} % of {ranking.candidates:,}"
    return (
        f"{side} about {share:.0f} % of {ranking.candidates:,}, by a sample of {ranking.sample:,}"
    )


def spell_tiers(ranking: Ranking, query: int) -> list[str]:
    """Say which examples shown can be told apart: ``1 to 4 cannot be told apart``."""
    if ranking.tiers is None:
        return []
    shown = ranking.tiers[query, : ranking.count(query)].tolist()
    found, last = [], len(shown)
    for _, places in groupby(range(len(shown)), shown.__getitem__):
        ranks = [place + 1 for place in places]
        goes_on = ranks[-1] == last and _goes_on(ranking, query)
        if len(ranks) == 1 and not goes_on:
            found.append(f"{ranks[0]} stands alone")
            continue
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        found.append(f"{span}{' and what follows' * goes_on} cannot be told apart")
    return found


def spell_blind(ranking: Ranking) -> str | None:
    """Name the timesteps that hardly tell examples apart; None if none is known to be blind."""
    if not ranking.blind:
        return None
    names, all_ = ", ".join(f"{t:g}" for t in ranking.blind), len(ranking.timesteps)
    are = "is" if len(ranking.blind) == 1 else "are"
    return (
        f"{len(ranking.blind)} of {all_} timesteps {are} blind (t = {names}): there all examples "
        f"look alike, so that they add much the same to every score"
    )


def spell_same_as(ranking: Ranking, query: int) -> str | None:
    """Say that a query is itself a training image, and which; None if it was not found to be."""
    found = ranking.same_as and ranking.same_as[query]
    return f"this query is itself a training image: {', '.join(found)}" if found else None


def spell_copies(ranking: Ranking, query: int, rank: int) -> str | None:
    """Say how many examples have the same pixels, as ``× 3``; None for one alone."""
    count = 1 + len(ranking.copies(query, rank))
    return f"× {count:,}" if count > 1 else None


def _goes_on(ranking: Ranking, query: int) -> bool:
    if ranking.count(query) < ranking.scores.shape[1] or ranking.tier_goes_on is None:
        return False
    return bool(ranking.tier_goes_on[query])


def _short(value: float) -> str:
    """Write a bound: whole where it is one."""
    whole = round(value)
    return f"{whole:,}" if abs(value - whole) <= 1e-4 * max(1, abs(whole)) else format_score(value)
