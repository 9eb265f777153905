"""How often do 95 % intervals hold the true mean of few and of skewed values?

python experiments/coverage/intervals.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmin.evaluation.metrics import bootstrap, resampled_means
from dmin.runtime.escape import write_csv
from experiments.record import recorded

HERE, WORLDS = Path(__file__).parent, 2000
VALUES = {  # and their mean
    "normal": (lambda generator, count: generator.normal(size=count), 0.0),
    "exponential": (lambda generator, count: generator.exponential(size=count), 1.0),
    "precision, mostly low": (lambda generator, count: generator.beta(0.5, 2, size=count), 0.2),
}


def main() -> None:
    """Simulate, and write the table."""
    lines = []
    for name, (draw, mean) in VALUES.items():
        for count in (4, 8, 10, 20, 40, 100):
            held = np.zeros(2)
            for seed in range(WORLDS):
                values = draw(np.random.default_rng([seed, count]), count)
                found = bootstrap(values, 400)
                low, high = np.quantile(resampled_means(values, 400), [0.025, 0.975])
                held += low <= mean <= high, found.low <= mean <= found.high
            each = dict(zip(("percentiles", "as here"), held / WORLDS, strict=True))
            told = {how: f"{share:.3f}" for how, share in each.items()}
            lines.append({"values": name, "how many": count, **told})
    write_csv(HERE / "intervals.csv", lines)


if __name__ == "__main__":
    with recorded(__file__, worlds=WORLDS):
        main()
