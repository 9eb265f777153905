"""The conclusions of a report: which method to use for what, and how far to trust that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dmin.evaluation.report.results import TRANSFORMED, Place, Report, Result


@dataclass(frozen=True)
class Purpose:
    """A purpose of attribution, and the metrics that measure how well it is served."""

    wish: str
    fits: Callable[[Result], bool]


def _of_both_sources(result: Result) -> bool:
    """Return whether a result is precision over queries of both sources, used instead of mAP."""
    metric = result.metric
    return result.task == "sources" and metric.startswith("precision@") and "," not in metric


PURPOSES = (
    Purpose("To predict what training on other data would do", lambda r: r.metric == "LDS"),
    Purpose(
        "To name the examples whose removal hurts most",
        lambda r: r.metric.startswith(("removal@", "union@")),
    ),
    Purpose("To tell which class of examples matters", lambda r: r.metric == "leave-out ρ"),
    Purpose(
        "To find where a query's kind comes from",
        lambda r: r.truth != "label" and (r.metric == "mAP" or _of_both_sources(r)),
    ),
    Purpose("To find the original of a copy", lambda r: r.metric == "recall@1"),
    Purpose(
        "To find examples that are marked, such as wrong labels", lambda r: r.metric == "AUROC"
    ),
)


@dataclass(frozen=True)
class Conclusion:
    """The conclusion from one metric of one task.

    Attributes:
        wish: the purpose.
        where: task and metric.
        text: the finding, in words.
        best: the row with the largest mean.
        tied: number of other rows that are not worse beyond chance.
    """

    wish: str
    where: str
    text: str
    best: Result
    tied: int


def conclusions(report: Report) -> list[Conclusion]:
    """Return the conclusions for every purpose that the report measured."""
    report = report.at_one_size()
    return [
        _conclude(purpose.wish, _where(place, report), _at(report, place), report.reference)
        for purpose in PURPOSES
        for place in _places(purpose, report)
    ]


def summary(report: Report) -> str:
    """Return the first paragraph: which method to use for which purpose, and how good it is."""
    return " ".join(advice(report))


def advice(report: Report) -> list[str]:
    """Return the sentences of `summary`: one method for all purposes, then one per purpose."""
    report = report.at_one_size()
    found = [text for purpose in PURPOSES if (text := _advise(purpose, report))]
    if not found:
        return ["Nothing was measured that a conclusion could be drawn from."]
    return [_over_all(report), *found]


def _advise(purpose: Purpose, report: Report) -> str:
    """Return one sentence: the method that is best, or tied with the best, in most places."""
    everywhere = _places(purpose, report)
    places = [place for place in everywhere if _found_by_any(place, report)]
    lost = [_where(place, report) for place in everywhere if place not in places]
    nothing = f"No method is better than chance at {_listed(lost)}." if lost else ""
    if not places:
        return f"{purpose.wish}: none. {nothing}" if lost else ""
    rows = [r for place in places for r in _at(report, place) if not r.control]
    tops = {place: max(r.mean for r in _at(report, place) if not r.control) for place in places}

    def merit(name: str) -> tuple[int, float]:
        own = [r for r in rows if r.name == name]
        shares = [r.mean / tops[r.place] for r in own if tops[r.place] > 0]
        return sum(r.best for r in own), sum(shares)

    name = max(dict.fromkeys(r.name for r in rows), key=merit)
    base = {r.place: r for r in rows if r.name == report.reference}
    scores = []
    for r in (r for r in rows if r.name == name):
        text = f"{r.metric} {number(r.mean, r.metric)}"
        if r.of_ceiling is not None:
            text += f", {r.of_ceiling:.0%} of the ceiling"
        if not r.best:
            here = [o for o in rows if o.place == r.place]
            leader = max(here, key=lambda o: o.mean)
            text += f"; there {leader.name} is better, {number(leader.mean, r.metric)}"
        if name != report.reference and r.place in base:
            other = base[r.place]
            tied = ", tied" if other.best else ""
            text += f"; {report.reference} {number(other.mean, r.metric)}{tied}"
        scores.append(f"{text} ({_where(r.place, report).rpartition(', ')[0]})")
    sentence = f"{purpose.wish}: {name}, with {'; '.join(scores)}"
    plain = sorted({r.name for r in rows if not r.reads and r.best and r.name != name})
    if plain:
        sentence += f". Without a gradient, {_listed(plain)} "
        sentence += f"{'is' if len(plain) == 1 else 'are'} tied with it in places"
    return f"{sentence}. {nothing}".strip()


def _found_by_any(place: Place, report: Report) -> bool:
    """Return whether the best method's interval is above that of random scores."""
    return _beats_chance([r for r in _at(report, place) if not r.control])


def _beats_chance(methods: Sequence[Result]) -> bool:
    chance = next((r for r in methods if r.method == "random"), None)
    return chance is None or max(methods, key=lambda r: r.mean).low > chance.high


def _over_all(report: Report) -> str:
    """Name the method that is best on most measures, and how many do not distinguish methods."""
    places = [place for purpose in PURPOSES for place in _places(purpose, report)]
    places = [place for place in places if _found_by_any(place, report)]
    wins: dict[str, int] = {}
    crowded = 0
    for place in places:
        best = [r for r in _at(report, place) if r.best]
        crowded += len(best) >= 6
        for r in best:
            wins[r.name] = wins.get(r.name, 0) + 1
    if not wins:
        return "Nothing that was measured is found better than by chance."
    most = max(wins.values())
    leaders = [name for name, count in wins.items() if count == most]
    text = (
        f"One for all: {_listed(leaders)} {'is' if len(leaders) == 1 else 'are'} best, or tied "
        f"with the best within the interval of the paired difference, on {most} of "
        f"{len(places)} measures; {report.reference} on {wins.get(report.reference, 0)}."
    )
    if crowded:
        text += f" By {crowded} of them six or more methods cannot be distinguished."
    return text


def _conclude(wish: str, where: str, rows: Sequence[Result], reference: str) -> Conclusion:
    methods = [r for r in rows if not r.control]
    best = max(methods, key=lambda r: r.mean)
    tied = [r for r in methods if r.best and r is not best]
    of = f", {best.of_ceiling:.0%} of the ceiling" if best.of_ceiling is not None else ""
    text = f"{best.name} leads with {spell(best)}{of}"
    if not _beats_chance(methods):
        text += ", which is no better than chance"
    elif len(tied) >= 5:
        text += f", but {len(tied)} others are tied with it: this measure does not distinguish them"
    elif tied:
        text += f", tied with {_listed([r.name for r in tied])}"
    text += "."
    base = [r for r in rows if r.name == reference != best.name]
    asides = [f"{reference} has {spell(r)}" for r in base[:1]]
    plain = [r for r in methods if not r.reads and r.method != "random"]
    top = max(plain, key=lambda r: r.mean, default=best)
    if top.name != best.name:
        asides.append(f"without gradients {top.name} reaches {number(top.mean, top.metric)}")
    kin = (best.method, best.tuned, "untrained")
    if blind := [r for r in rows if (r.method, r.tuned, r.control) == kin]:
        asides.append(f"{best.name} on an untrained network {number(blind[0].mean, best.metric)}")
    own = [r for r in rows if r.method == reference and not r.tuned]
    if shaped := [r for r in own if r.control in TRANSFORMED]:
        top = max(shaped, key=lambda r: r.mean)
        asides.append(f"{top.name} {number(top.mean, top.metric)}")
    if asides:
        text += f" For comparison: {'; '.join(asides)}."
    return Conclusion(wish, where, text, best, len(tied))


def _where(place: Place, report: Report) -> str:
    """Return task and metric, with the ground truth where the task has several with this metric."""
    task, truth, metric = place
    truths = {r.truth for r in report.results if (r.task, r.metric) == (task, metric)}
    return f"{task}, {truth}, {metric}" if len(truths) > 1 else f"{task}, {metric}"


def _at(report: Report, place: Place) -> list[Result]:
    return [r for r in report.results if r.place == place]


def _places(purpose: Purpose, report: Report) -> list[Place]:
    """Return the places where a purpose is measured; union removal at one k, that of `Removal`."""
    places = list(dict.fromkeys(r.place for r in report.results if purpose.fits(r)))
    alone = {metric.partition("@")[2] for _, _, metric in places if metric.startswith("removal@")}
    kept: dict[Place, None] = {}
    for place in places:
        if place[2].startswith("union@"):
            group = [p for p in places if p[:2] == place[:2] and p[2].startswith("union@")]
            place = next((p for p in group if p[2].partition("@")[2] in alone), group[0])
        kept[place] = None
    return list(kept)


def number(value: float, metric: str) -> str:
    """Format a value: .54, or +21 %."""
    if metric.endswith("%"):
        return f"{value:+.1f} %".replace("-", "−")
    text = f"{value:.2f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def spell(result: Result) -> str:
    """Return a value with its interval."""
    low, high = number(result.low, result.metric), number(result.high, result.metric)
    return f"{number(result.mean, result.metric)} ({low} to {high})"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
