"""Signatures that name the settings which constructors hand on as ``**settings``."""

from __future__ import annotations

import functools
import inspect
from typing import Any, get_type_hints


def name_settings(family: type, base: type, method: str) -> None:
    """Give a class method of a base its own signature in a family: with all the family's settings.

    The base's method ends in ``**settings`` and passes them to the constructor, and each
    constructor keeps its own and passes the others on. So no signature would tell what a family
    takes; but ``help()`` and the check of configurations ask signatures.

    Args:
        family: gets the method.
        base: defines the method; its constructor and those of its subclasses are read.
        method: name of the class method.
    """
    function = vars(base)[method].__func__
    hints = get_type_hints(function)
    own = [
        p.replace(annotation=hints.get(p.name, p.annotation))
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    settings: dict[str, inspect.Parameter] = {}
    for parent in family.__mro__:
        if issubclass(parent, base) and "__init__" in vars(parent):
            constructor: Any = vars(parent)["__init__"]
            hints = get_type_hints(constructor)
            for p in inspect.signature(constructor).parameters.values():
                if p.kind is p.KEYWORD_ONLY:
                    settings.setdefault(p.name, p.replace(annotation=hints[p.name]))

    @functools.wraps(function)
    def with_settings(cls: type, *args: Any, **given: Any) -> Any:
        return function(cls, *args, **given)

    signature = inspect.Signature([*own, *settings.values()])
    with_settings.__signature__ = signature  # type: ignore[attr-defined]
    setattr(family, method, classmethod(with_settings))
