"""Representations of objects: one line in a terminal, a table in a notebook."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from dmin.runtime.escape import printable


class Shown:
    """An object that is shown by its facts; :meth:`facts` says what these are."""

    def facts(self) -> Mapping[str, Any]:
        """Return what it is, by names, as a reader wants it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.facts().items())
        return printable(f"{type(self).__name__}({facts})")

    def _repr_html_(self) -> str:
        return table([(type(self).__name__, ""), *self.facts().items()])


class ShownModel(Shown):
    """A model, which is shown by its network and timesteps in place of all its layers."""

    def facts(self) -> dict[str, Any]:
        """Return the network, its parameters, encoders and timesteps."""
        model: Any = self
        return {
            "network": type(getattr(model, "network", None)).__name__,
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "encoders": ", ".join(model.encoders) or "none",
            "timesteps": len(model.timesteps),
        }


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows of cells as HTML, the first of them the head; nothing in them is code."""
    cells = [[escape(printable(str(cell))) for cell in row] for row in rows]
    head, *body = ("".join(f"<td>{cell}</td>" for cell in row) for row in cells)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return (
        f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{lines}</tbody></table>"
    )
