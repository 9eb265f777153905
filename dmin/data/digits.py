"""scikit-learn's 1,797 real handwritten digits: data for the demo that needs no download."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits

from dmin.data.base import Example, Examples
from dmin.runtime.errors import DminError


class Digits(Examples):
    """Handwritten digits of 8 × 8 pixels, 10 classes (Alpaydin & Kaynak 1998, UCI).

    Args:
        split: ``train`` (1,500), ``heldout`` (297) or ``all``. The split is drawn with a fixed
            seed, so a digit always has the same id and split.
    """

    TRAIN = 1500

    def __init__(self, split: Literal["train", "heldout", "all"] = "train") -> None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        parts = {"train": order[: self.TRAIN], "heldout": order[self.TRAIN :], "all": order}
        super().__init__(
            [
                Example(
                    id=f"digit-{index:04d}",
                    image=torch.from_numpy(images[index].reshape(1, 8, 8) / 16).float(),
                    label=int(labels[index]),
                )
                for index in sorted(parts[split])
            ]
        )


class PlantedDigits(Examples):
    """A thousand digits with planted examples that an attribution method must find.

    ``train`` has 936 unchanged digits, 40 *transposed* ones (mirrored along the diagonal, with
    their own ``source``) and 24 *mislabelled* ones: eight 3s labelled 8, eight 1s labelled 7, eight
    9s labelled 4 (with ``mislabelled`` set, and labels in ``flip``). The other parts are queries.
    None of them is in ``train``, and no two parts share a digit:

    - ``heldout``: 50 unchanged digits;
    - ``sources_tune``, ``sources_test``: 40 and 60 transposed digits, and as many unchanged ones. A
      method that ignores the query has one ranking for all, so only one source can be right;
    - ``mislabelled``: 24 digits with the wrong labels that were planted.

    Args:
        part: name of the part.

    Raises:
        DminError: there is no such part.
    """

    NATIVE, FOREIGN, EACH = 936, 40, 8
    FLIPS = ((3, 8), (1, 7), (9, 4))
    PARTS = ("train", "heldout", "sources_tune", "sources_test", "mislabelled")

    def __init__(self, part: str = "train") -> None:
        if part not in self.PARTS:
            raise DminError(f"part={part!r}: choose one of {', '.join(self.PARTS)}.")
        if part == "train":
            digits = Digits("train").examples
            end = self.NATIVE + self.FOREIGN
            native, foreign = _native(digits[: self.NATIVE]), _transposed(digits[self.NATIVE : end])
            super().__init__(native + foreign + self._flipped(digits[end:]))
            return
        digits, spare = Digits("heldout").examples, Digits("train").examples[1400:]
        super().__init__(
            {
                "heldout": lambda: _native(digits[:50]),
                "sources_tune": lambda: _transposed(digits[100:140]) + _native(spare[:40]),
                "sources_test": lambda: _transposed(digits[140:200]) + _native(spare[40:]),
                "mislabelled": lambda: self._flipped(digits[50:100] + digits[200:]),
            }[part]()
        )

    def _flipped(self, digits: list[Example]) -> list[Example]:
        """Return the first eight digits of each flip, with their wrong labels."""
        found = []
        for true, wrong in self.FLIPS:
            for e in [e for e in digits if e.label == true][: self.EACH]:
                facts = {"source": "digits", "flip": f"{true}→{wrong}", "mislabelled": True}
                found.append(Example(f"flipped-{e.id}", e.image, wrong, None, facts))
        return found


def _native(digits: list[Example]) -> list[Example]:
    return [replace(e, metadata={"source": "digits", "flip": "none"}) for e in digits]


def _transposed(digits: list[Example]) -> list[Example]:
    facts = {"source": "transposed", "flip": "none"}
    return [
        Example(f"transposed-{e.id}", e.image.transpose(1, 2).contiguous(), e.label, None, facts)
        for e in digits
    ]
