"""How often do 95 % intervals hold the true mean of few and of skewed values?

python experiments/coverage/intervals.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmin.evaluation.metrics import bootstrap, interval, resampled_means
from dmin.evaluation.truths.lds import Resamples, lds, membership
from dmin.runtime.escape import write_csv
from experiments.record import recorded

HERE, WORLDS, RESAMPLES = Path(__file__).parent, 2000, 400
COLUMNS = "values", "how many", "percentiles", "as here"
VALUES = {  # and their mean
    "normal": (lambda generator, count: generator.normal(size=count), 0.0),
    "exponential": (lambda generator, count: generator.exponential(size=count), 1.0),
    "precision, mostly low": (lambda generator, count: generator.beta(0.5, 2, size=count), 0.2),
}


def world_of_subsets(generator, subsets, seeds, quality, noise, queries=20, examples=150):
    """Return scores of known quality, subsets, and losses of models retrained on them."""
    effects = generator.standard_t(4, size=(queries, examples))
    each = np.clip(quality + 0.15 * generator.normal(size=(queries, 1)), 0.02, 0.98)
    others = np.sqrt(1 - each**2) * effects.std() * generator.normal(size=effects.shape)
    members = membership(
        [generator.permutation(examples)[: examples // 2] for _ in range(subsets)], examples
    )
    sums = members @ effects.T
    spread = noise * sums.std(0)
    losses = [-(sums + spread * generator.normal(size=sums.shape)) for _ in range(seeds)]
    return each * effects + others, members, np.stack(losses)


def of_lds(subsets, seeds, quality, noise):
    """Return the mean LDS, and the intervals of each world: percentiles, and as here."""
    means, intervals = [], []
    for world in range(WORLDS // 5):
        generator = np.random.default_rng([world, subsets, seeds])
        scores, members, losses = world_of_subsets(generator, subsets, seeds, quality, noise)
        means.append(lds(scores, members, losses.mean(0)).mean())
        draws = Resamples(subsets, len(scores), RESAMPLES, world, seeds)
        drawn = draws.means(scores, members, losses)
        found = interval(means[-1], drawn, min(subsets, len(scores)))
        intervals.append((np.quantile(drawn, [0.025, 0.975]), found[1:]))
    return np.mean(means), np.array(intervals)


def of_values(draw, count):
    """Return the intervals of each world: percentiles, and as here."""
    intervals = []
    for seed in range(WORLDS):
        values = draw(np.random.default_rng([seed, count]), count)
        drawn = resampled_means(values, RESAMPLES)
        found = bootstrap(values, RESAMPLES)
        intervals.append((np.quantile(drawn, [0.025, 0.975]), found[1:]))
    return np.array(intervals)


def main() -> None:
    """Simulate, and write the table."""
    cells = [
        (name, count, mean, of_values(draw, count))
        for name, (draw, mean) in VALUES.items()
        for count in (4, 8, 10, 20, 40, 100)
    ]
    for subsets, seeds in ((64, 2), (128, 4)):
        for quality, noise in ((0.1, 0.8), (0.65, 0.8), (0.9, 0.3)):
            mean, found = of_lds(subsets, seeds, quality, noise)
            cells.append((f"LDS of {mean:.2f}, {seeds} seeds", subsets, mean, found))
    lines = []
    for name, count, mean, found in cells:
        held = ((found[:, :, 0] <= mean) & (mean <= found[:, :, 1])).mean(0)
        shares = [f"{share:.3f}" for share in held]
        lines.append(dict(zip(COLUMNS, (name, count, *shares), strict=True)))
    write_csv(HERE / "intervals.csv", lines)


if __name__ == "__main__":
    with recorded(__file__, worlds=WORLDS):
        main()
