"""Texts that explain the numbers of a ranking, shared by terminal, picture and page."""

import math
from collections.abc import Sequence
from itertools import combinations, groupby

import numpy as np

from dmin.attribution.ranking import Ranking, format_score


def spell_scale(ranking: Ranking, query: int, rank: int) -> str:
    """Return a score, and the largest possible where there is one: ``8.910 of 10``."""
    score = format_score(ranking.scores[query, rank])
    if ranking.maximum is None or not ranking.maximum[query]:  # "-3 of 0" is no scale
        return score
    return f"{score} of {_short(float(ranking.maximum[query]))}"


def spell_size(ranking: Ranking, query: int, rank: int) -> str | None:
    """Say of how many examples per group is, as `of 1,024`; None if groups are not ranked."""
    return None if ranking.group_sizes is None else f"of {ranking.group_sizes[query, rank]:,}"


def spell_confidence(ranking: Ranking, query: int, rank: int) -> str | None:
    """Say standard error, its name and stability as `±.012 total · 97 %`; None if not known."""
    if ranking.errors is None or ranking.stability is None:
        return None
    name, errors = ranking.errors
    sure = spell_certainty(float(ranking.stability[query, rank]))
    return f"±{format_score(errors[query, rank])} {name} · {sure}"


def spell_certainty(share: float) -> str:
    """Format a probability in percent; 100 % only if certain."""
    return f"{100 * share:.0f} %" if share < 0.995 else ">99 %"


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
    """Describe which ranks are not significant: ``1 to 4 cannot be distinguished``."""
    if ranking.tiers is None:
        return []
    shown = ranking.tiers[query, : ranking.count(query)].tolist()
    tiers = [
        [place + 1 for place in group] for _, group in groupby(range(len(shown)), shown.__getitem__)
    ]
    last = tiers.pop() if _goes_on(ranking, query) else None
    found = []
    for alone, group in groupby(tiers, lambda tier: len(tier) == 1):
        several = list(group)
        spans = [[tier[0] for tier in several]] if alone else several
        for span in spans:
            verb = "cannot be distinguished" if not alone else "each stand alone"
            found.append(f"{_span(span)} {'stands alone' if len(span) == 1 else verb}")
    return (
        found
        if last is None
        else [*found, f"{_span(last)} and what follows cannot be distinguished"]
    )


def _span(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def spell_order(ranking: Ranking, query: int, most: int = 2) -> str | None:
    """Name the timesteps that decided the order; None if unknown."""
    shares = None if ranking.order_shares is None else ranking.order_shares[query]
    if shares is None or not np.isfinite(shares).all() or len(shares) < 2:
        return None
    largest = np.argsort(-shares, kind="stable")[:most]
    told = " and ".join(f"t = {ranking.timesteps[t]:g} ({100 * shares[t]:.0f} %)" for t in largest)
    against = spell_against(ranking, shares)
    return f"the order is made at {told}" + (f", against {against}" if against else "")


def spell_against(ranking: Ranking, shares: np.ndarray) -> str | None:
    """Name the timestep that most opposes the order; the shares of the others then exceed 100 %."""
    least = int(np.argmin(shares))
    if round(100 * float(shares[least])) >= 0:
        return None
    return f"t = {ranking.timesteps[least]:g} (−{-100 * shares[least]:.0f} %)"


def spell_query(ranking: Ranking, query: int) -> list[str]:
    """Return the remarks on one query's answer, the most important first."""
    usual = None if ranking.typical is None else float(ranking.typical[query])
    scale = [] if ranking.maximum is None else [f"at most {_short(float(ranking.maximum[query]))}"]
    scale += [] if usual is None else [f"usually {format_score(usual)}"]
    above = (
        spell_percentile(ranking, query, ranking.count(query) - 1) if ranking.count(query) else None
    )
    told = [spell_same_as(ranking, query), f"scores: {', '.join(scale)}" if scale else None]
    told += [None if above is None else f"all shown {above}", *spell_tiers(ranking, query)]
    return [text for text in (*told, spell_order(ranking, query)) if text is not None]


def spell_about(ranking: Ranking) -> list[str]:
    """Return the parts of the header: ``model my/sd15``, ``1,797 examples``."""
    told = dict(ranking.about)
    if (examples := told.pop("examples", None)) is not None:
        told["examples"] = f"{examples} examples"
    bare = ("examples", "date")
    return [text if name in bare else f"{name} {text}" for name, text in told.items()]


def spell_overlaps(rankings: Sequence[Ranking]) -> list[str]:
    """Say how many of their examples methods share: ``dmin and blend share 7.4 of 10``."""
    return [
        f"{one.method} and {other.method} share {_shared(one, other):.3g} of {one.scores.shape[1]}"
        for one, other in combinations(rankings, 2)
    ]


def _shared(one: Ranking, other: Ranking) -> float:
    pairs = zip(one.train_ids, other.train_ids, strict=True)
    return float(np.mean([len(set(a) & set(b)) for a, b in pairs]))


def spell_blind(ranking: Ranking) -> str | None:
    """Name the timesteps that hardly distinguish examples; None if none is known to be blind."""
    if not ranking.blind:
        return None
    names, all_ = ", ".join(f"{t:g}" for t in ranking.blind), len(ranking.timesteps)
    are = "is" if len(ranking.blind) == 1 else "are"
    return (
        f"{len(ranking.blind)} of {all_} timesteps {are} blind (t = {names}): there all examples "
        f"look alike, so that they add much the same to every score"
    )


def spell_same_as(ranking: Ranking, query: int) -> str | None:
    """Say that a query is itself a training image, and which; None if none was found."""
    found = ranking.same_as and ranking.same_as[query]
    if not found:
        return None
    pooled = "pool" in ranking.query_metadata[query]
    told = (
        "pictures of this query are training images"
        if pooled
        else "this query is itself a training image"
    )
    return f"{told}: {', '.join(found)}"


def spell_copies(ranking: Ranking, query: int, rank: int) -> str | None:
    """Say how many examples have the same pixels, as ``× 3``; None for one alone."""
    count = 1 + len(ranking.copies(query, rank))
    return f"× {count:,}" if count > 1 else None


def _goes_on(ranking: Ranking, query: int) -> bool:
    if ranking.count(query) < ranking.scores.shape[1] or ranking.tier_goes_on is None:
        return False
    return bool(ranking.tier_goes_on[query])


def _short(value: float) -> str:
    """Format a bound, without decimals if it is whole."""
    whole = round(value)
    return f"{whole:,}" if abs(value - whole) <= 1e-4 * max(1, abs(whole)) else format_score(value)
