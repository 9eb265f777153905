"""Check a configuration value against a type annotation; complex annotations accept anything."""

import collections.abc
import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_LISTS = (
    list,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_MAPPINGS = (dict, collections.abc.Mapping)
_SPELLED: dict[Any, str] = {type(None): "null", Path: "path", os.PathLike: "path"}


def parameters(target: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the parameters of a callable with evaluated annotations; None if unknown."""
    try:
        found = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = getattr(function, "__globals__", {})
    return [p.replace(annotation=_evaluated(p.annotation, names)) for p in found]


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        # One at a time: a name imported for type checkers alone must not spoil the others.
        return eval(annotation, names)
    except Exception:
        return Any


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a plain value (scalars, lists, dicts) fits an annotation.

    A boolean is no int, an int is a float, a list is any sequence. Values not known yet fit:
    missing values, and mappings with a ``_target_``.
    """
    if value == "???" or (isinstance(value, dict) and "_target_" in value):
        return True
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return fits(value, inner[0])
    if kind in (Union, types.UnionType):
        return any(fits(value, member) for member in inner)
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if kind in (None, type(None)):
        return value is None
    if kind in (str, bool):
        return isinstance(value, kind)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (Path, os.PathLike):
        return isinstance(value, str | Path)
    if kind in _LISTS:
        return isinstance(value, list) and all(fits(item, *inner[:1] or (Any,)) for item in value)
    if kind is tuple:
        return isinstance(value, list) and _fits_tuple(value, inner)
    if kind in _MAPPINGS:
        return isinstance(value, dict)
    return True


def _fits_tuple(value: list[Any], inner: tuple[Any, ...]) -> bool:
    if not inner:
        return True
    if inner[-1] is ...:
        inner = inner[:1] * len(value)
    return len(value) == len(inner) and all(map(fits, value, inner))


def spell(annotation: Any) -> str:
    """Describe an annotation in the terms of YAML."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return spell(inner[0])
    if kind in (Union, types.UnionType):
        return " or ".join(spell(member) for member in inner)
    if kind is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if kind is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)}: {', '.join(map(spell, inner))}"
    if kind in _LISTS or kind is tuple:
        return f"a list of {spell(inner[0])}" if inner else "a list"
    if kind in _MAPPINGS:
        return "a mapping"
    if kind is None:
        return "null"
    return _SPELLED.get(kind) or str(getattr(kind, "__name__", kind))
