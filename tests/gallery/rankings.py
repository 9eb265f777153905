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
