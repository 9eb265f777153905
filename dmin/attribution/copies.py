"""Copies: examples and queries with identical decoded pixels, whatever their ids."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from dmin.attribution.features import FeatureSet
from dmin.attribution.ranking import Ranking

Images = Callable[[str], np.ndarray]
TIED = 1e-5  # of the score: copies are scored alike to rounding


def pixel_digest(image: np.ndarray) -> str:
    """Return a digest of an image ``[C, H, W]`` in [0, 1]: of its size and its 8-bit pixels."""
    pixels = (np.asarray(image, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def namesakes(queries: FeatureSet, train: FeatureSet) -> dict[str, list[str]]:
    """Return, for each query, the training examples with its id or with an identical file.

    Args:
        queries: the queries; of a pool those of each of its pictures.
        train: the training examples.
    """
    if sides := getattr(queries, "sides", ()):
        (name,) = cast(Any, queries).ids
        return {
            name: [id for side in sides for ids in namesakes(side, train).values() for id in ids]
        }
    there = set(train.store.ids)
    digests: list[dict[str, str]] = [
        getattr(side.dataset, "file_digests", dict)() for side in (queries, train)
    ]
    by_digest: dict[str, list[str]] = {}
    for id, digest in digests[1].items():
        by_digest.setdefault(digest, []).append(id)
    return {
        id: [each for each in (id, *by_digest.get(digests[0].get(id, ""), [])) if each in there]
        for id in queries.store.ids
    }


def with_copies(
    ranking: Ranking,
    query_images: Images,
    train_images: Images,
    wider: Ranking | None = None,
    maybe: Mapping[str, Collection[str]] = MappingProxyType({}),
    members: Collection[np.ndarray] = (),
) -> Ranking:
    """Add to a ranking which of its examples, and queries, have the same pixels.

    Ranks, ids and k do not change: k counts examples, some of which may be the same picture.

    Args:
        ranking: as it is shown.
        query_images: id of a query -> its image.
        train_images: the same for training examples. Only those that are shown, those after them
            with equal scores, and those of ``maybe`` are decoded.
        wider: the same with more examples per query, to find those of equal score.
        maybe: id of a query -> training examples that may be identical to it, see
            :func:`namesakes`.
        members: the images of the query, if it is a pool.
    """
    wider = ranking if wider is None else wider
    digest, asked = cache(lambda id: pixel_digest(train_images(id))), ranking.query_ids
    copy_of = np.zeros(ranking.scores.shape, np.int64)
    tied: list[list[list[str]]] = []
    same_as = []
    for query, ids in enumerate(ranking.train_ids):
        first: dict[str, int] = {}
        for rank, id in enumerate(ids):
            copy_of[query, rank] = first.setdefault(digest(id), rank)
        tied.append([[] for _ in ids])
        for place in range(len(ids), wider.scores.shape[1]):
            gap = np.abs(wider.scores[query, place] - ranking.scores[query])
            alike = gap <= TIED * np.abs(ranking.scores[query])
            id = wider.train_ids[query][place]
            rank = first.get(digest(id), -1) if alike.any() else -1
            if rank >= 0 and alike[copy_of[query] == rank].any():
                tied[query][rank].append(id)
        mine = {pixel_digest(image) for image in members or [query_images(asked[query])]}
        looked = dict.fromkeys([*ids, *maybe.get(asked[query], [])])
        found = [id for id in looked if digest(id) in mine]
        same_as.append(found + [id for m in mine & {*first} for id in tied[query][first[m]]])
    return replace(ranking, copy_of=copy_of, tied_copies=tied, same_as=same_as)
