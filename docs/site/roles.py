"""Docstrings say :class:`Store`; pages show that as code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
_AXES = re.compile(r"(?<!`)(\[\w\]\[\w\])")  # Markdown takes two in brackets for a link


class Roles(griffe.Extension):
    """Shows the roles of docstrings as the names in them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            value = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _AXES.sub(r"`\1`", value)
