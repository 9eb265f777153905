"""What is planted among the digits, and what is asked about it."""

import itertools
from collections import Counter

from dmin.data.digits import PlantedDigits


def test_no_two_parts_have_a_digit_in_common_and_sources_are_asked_about_alike():
    parts = {name: PlantedDigits(name) for name in PlantedDigits.PARTS}
    ids = {n: {e.id[e.id.index("digit-") :] for e in part.examples} for n, part in parts.items()}
    for one, other in itertools.combinations(ids, 2):
        assert ids[one].isdisjoint(ids[other])
    for name, each in (("sources_tune", 40), ("sources_test", 60)):
        found = Counter(e.metadata["source"] for e in parts[name].examples)
        assert found == {"digits": each, "transposed": each}
    assert Counter(e.metadata["source"] for e in parts["train"].examples)["transposed"] == 40
