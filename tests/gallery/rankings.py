"""Rankings of digits to be shown."""

from dataclasses import replace

import numpy as np
from sklearn.datasets import load_digits

from dmin.attribution.ranking import Ranking

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES / 16).reshape(-1, 1, 8, 8)
TIMESTEPS = (950, 750, 550, 350, 150)
EVIL = "</script><img src=x onerror=document.title='owned'>{{DATA}}<!--\u2028"


def query_image(name: str) -> np.ndarray:
    return IMAGES[1000 + int(name.split("-")[1])]


def train_image(name: str) -> np.ndarray:
    return IMAGES[int(name.split("-")[1])]


def ranking(queries: int = 3, k: int = 12) -> Ranking:
    """Rank digits by the cosine of their pixels, split over the timesteps with one negative."""
    rows, scores = [], []
    unit = IMAGES.reshape(len(IMAGES), -1)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    for query in range(1000, 1000 + queries):
        similar = unit[:1000] @ unit[query]
        rows.append(np.argsort(-similar)[:k])
        scores.append(similar[rows[-1]])
    contributions = np.array(scores)[:, :, None] * [-0.1, 0.1, 0.3, 0.5, 0.2]
    return Ranking(
        method="dmin",
        timesteps=TIMESTEPS,
        query_ids=[f"query-{query}" for query in range(queries)],
        query_metadata=[{"label": int(LABELS[1000 + i]), "seed": i} for i in range(queries)],
        train_rows=np.array(rows),
        train_ids=[[f"digit-{row}" for row in line] for line in rows],
        train_metadata=[
            [{"label": int(LABELS[row]), "file": f"{row}.png"} for row in line] for line in rows
        ],
        scores=np.array(scores),
        contributions=contributions,
    )


def with_captions(plain: Ranking, caption: str) -> Ranking:
    metadata = [[{**one, "caption": caption} for one in row] for row in plain.train_metadata]
    return replace(plain, train_metadata=metadata)


def told(queries: int = 3, k: int = 12, method: str = "dmin") -> Ranking:
    """The same with all that may be known: scale, error, tiers, copies, rights, blind timesteps."""
    some = with_captions(ranking(queries, k), "a digit, written by hand in two strokes")
    shape = some.scores.shape
    rights = {"artist": "Ann Other", "licence": "CC BY 4.0", "source_url": "https://example.org/a"}
    rows = [[{**one, **rights} for one in row] for row in some.train_metadata]
    copy_of, tiers = np.tile(np.arange(k), (queries, 1)), np.tile(np.arange(k), (queries, 1)) // 4
    copy_of[:, 2] = 1
    contributions = 0.1 * some.contributions
    contributions[:, :, 2] += 0.9 * some.scores
    return replace(
        some,
        method=method,
        train_metadata=rows,
        contributions=contributions,
        sketch_errors=np.full(shape, 0.003),
        total_errors=np.full(shape, 0.004),
        stability=np.linspace(0.99, 0.5, k)[None].repeat(queries, 0),
        about={
            "model": "models/digits",
            "adapter": "none",
            "weights": "EMA, 0.995",
            "store": "outputs/stores/train-0123abcd",
            "examples": "1,797",
            "sketch": "auto, k = 4,096",
            "date": "2026-11-29 07:00 UTC",
        },
        candidates=1797,
        maximum=np.full(queries, 1.0),
        typical=np.full(queries, 0.62),
        at_least=np.arange(1, k + 1)[None].repeat(queries, 0),
        tiers=tiers,
        tier_goes_on=np.full(queries, True),
        blind=(950,),
        copy_of=copy_of,
        tied_copies=[[["digit-elsewhere"] if r == 1 else [] for r in range(k)]] * queries,
        same_as=[[some.train_ids[0][0]], *[[] for _ in range(queries - 1)]],
    )


def side_by_side() -> list[Ranking]:
    """Three methods that agree in part; one of them splits no score and has no largest one."""
    first, second = told(), told(method="blend")
    turned = second.first(8)
    plain = replace(
        told(method="pixel_l2").first(6),
        contributions=None,
        timesteps=(),
        maximum=None,
        sketch_errors=None,
        total_errors=None,
        stability=None,
        tiers=None,
        blind=None,
    )
    return [first, turned, plain]
