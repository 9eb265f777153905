"""The map of a store: its rows in a plane, and their nearest neighbours."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from dmin.attribution.features import FeatureSet
from dmin.gallery.columns import text
from dmin.gallery.pictures import data_uri, to_picture
from dmin.runtime.colours import method_colours
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly

BYTES = 1 << 28  # most bytes of rows in memory
NEAR, KINDS = 12, 12  # neighbours shown; most values of a column that is shown by colours


class StoreMap:
    """The rows of a store, or evenly spaced ones, as many as fit into ``BYTES``.

    Args:
        train: the store, with the examples for their pictures.
    """

    def __init__(self, train: FeatureSet) -> None:
        store, self.train = train.store, train
        readout, width = store.layout.readouts[0], 4 * int(np.prod(store.layout.row_shape))
        self.shown = evenly(len(store), max(2, BYTES // width), ends=True)
        self.rows = store.rows(readout, self.shown).reshape(len(self.shown), -1)
        self.rows /= np.maximum(np.linalg.norm(self.rows, axis=1, keepdims=True), 1e-12)
        self.loss = store.losses()[self.shown].mean((1, 2))
        self.influence = (store.norms(readout)[self.shown] ** 2).sum(3).mean((1, 2))

    def plane(self) -> dict[str, Any]:
        """Return each row's first two principal components, and its columns of metadata."""
        pca = PCA(min(2, len(self.rows)), svd_solver="randomized", random_state=0)
        found = pca.fit_transform(self.rows)
        facts = [self.train.store.metadata[row] for row in self.shown]
        columns: dict[str, list[str]] = {}
        for key in dict.fromkeys(key for each in facts for key in each):
            values = [text(each.get(key, "none")) for each in facts]
            if 1 < len({*values}) <= KINDS:
                columns[str(key)] = values
        numbers = {"loss": self.loss.tolist(), "self-influence ‖g‖²": self.influence.tolist()}
        return {
            "points": found.tolist(),
            "explained": pca.explained_variance_ratio_.tolist(),
            "of": len(self.train),
            "ids": [self.train.store.ids[row] for row in self.shown],
            "columns": columns,
            "colours": {
                k: method_colours(dict.fromkeys(sorted({*columns[k]}), "")) for k in columns
            },
            "numbers": numbers,
        }

    def near(self, place: int) -> list[tuple[int, float]]:
        """Return the shown rows with the largest cosines with row ``place``, and these cosines."""
        cosines = self.rows @ self.rows[place]
        order = np.argsort(-cosines, kind="stable")
        return [(int(n), float(cosines[n])) for n in order if n != place][:NEAR]

    def picture(self, place: int) -> str:
        """Return the picture of row ``place`` as a ``data:`` address."""
        id = self.train.store.ids[self.shown[place]]
        return data_uri(to_picture(self.train.image(id).numpy(), id), 160)


def asker(examples: Callable[[], FeatureSet]) -> Callable[[Any], dict[str, Any]]:
    """Return the function that answers the browser; it makes the map at its first call."""
    lock = Lock()
    made: list[StoreMap] = []

    def map_of_store(asked: Any) -> dict[str, Any]:
        what, place = asked if isinstance(asked, list) and len(asked) == 2 else (None, None)
        try:
            with lock:
                made.extend([] if made else [StoreMap(examples())])
            if what == "plane":
                return {"found": made[0].plane()}
            if what in ("near", "picture") and place in range(len(made[0].shown)):
                return {"found": getattr(made[0], what)(place)}
        except DminError as error:
            return {"told": str(error)}
        return {"told": "There is no such example on the map."}

    return map_of_store
