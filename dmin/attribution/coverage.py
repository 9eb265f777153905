"""The error bars that are shown: those that covered a known true value 92 to 98 times in 100."""

from collections.abc import Mapping
from typing import Any

# Bar -> method -> sketch families, each with high and low cosines: experiments/coverage, whose
# table tests/test_claims.py holds this to.
_MEASURED = frozenset({"auto", "block_cyclic", "tensor_sketch"})
COVERED: dict[str, dict[str, frozenset[str]]] = {
    "sketch": dict.fromkeys(("dmin", "dmin_unnormalised", "grad_dot", "grad_cos"), _MEASURED),
    "total": dict.fromkeys(("dmin", "dmin_unnormalised"), _MEASURED),
}


def bars_of(method: str, features: Mapping[str, Any]) -> set[str]:
    """Return which error bars of a method are valid, of ``sketch`` and ``total``.

    Args:
        method: its name.
        features: of the store's manifest.
    """
    family = features.get("sketch", {}).get("family")
    return {bar for bar, found in COVERED.items() if family in found.get(method, ())}


def why_none(method: str, features: Mapping[str, Any], sketched: bool = True) -> str:
    """Explain why no error bar is shown; `sketched`: the method reads sketched gradients."""
    if not sketched:
        return f"not shown, as they are of sketched gradients, of which {method} reads none"
    family = features.get("sketch", {}).get("family", "unknown")
    return (
        f"not shown, as those of {method} with sketch={family} were not measured to cover the "
        f"truth 92 to 98 times in 100 (docs/evaluation.md)"
    )
