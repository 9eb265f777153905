"""Validate a composed configuration against the signatures of its targets, before building them.

A mapping with a ``_target_`` is a call: its keys must be arguments of the target, and its values
must fit their annotations. The root of the configuration and its sections are treated in the same
way: their arguments are the `settings` of `sections`.

Missing values are ``???``, absent required arguments and interpolations without a target. Only the
parts that the command reads are validated (`subtrees.prune`), so that no other module is imported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from dmin.cli.config.annotations import fits, parameters, spell
from dmin.cli.config.groups import did_you_mean, groups
from dmin.cli.config.sections import settings
from dmin.cli.config.targets import load
from dmin.runtime.errors import DminError

# What Hydra's `instantiate` reads of a call, besides the arguments.
_CALL_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def validate(cfg: DictConfig, needed: Iterable[str] = ()) -> None:
    """Refuse unknown keys, values of the wrong type and missing values.

    Args:
        cfg: a composed configuration, without Hydra's own node.
        needed: the dotted names of required subtrees.

    Raises:
        DminError: with the dotted key, what is wrong and what is allowed.
    """
    walk = _Walk()
    walk.call(cfg, "", settings())
    for name in needed:
        walk.expect(cfg, name)
    if walk.missing:
        choices = [
            f"Choices of {name}: {', '.join(options)}."
            for name, options in groups().items()
            if name in walk.missing
        ]
        wanted = f"No value for {', '.join(walk.missing)}. Set {' '.join(walk.missing.values())}."
        raise DminError(" ".join([wanted, *choices]))


@dataclass
class _Walk:
    """One walk over a configuration. Missing values are collected and reported together."""

    missing: dict[str, str] = field(default_factory=dict)  # dotted key -> the override to write
    stands_at: dict[str, str] = field(default_factory=dict)  # of what another place is said to be

    def place(self, path: str) -> str:
        """Return the key where a setting is set: elsewhere, if its section is an interpolation."""
        for section, real in self.stands_at.items():
            if path.startswith(f"{section}."):
                return real + path.removeprefix(section)
        return path

    def expect(self, cfg: DictConfig, path: str) -> None:
        """Record a required subtree that is absent; null is allowed."""
        parent, _, key = path.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if isinstance(node, DictConfig) and key not in node.keys():  # noqa: SIM118
            is_group = path in groups()
            self.missing[path] = f"{path}=<choice>" if is_group else f"+{path}=<value>"

    def call(self, node: DictConfig, path: str, arguments: Sequence[Parameter]) -> None:
        """Check a mapping as arguments of a call, or as settings of a section."""
        is_call = "_target_" in node
        name = str(node["_target_"]) if is_call else path or "dmin"
        named = {
            p.name: p for p in arguments if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        takes_any = any(p.kind is p.VAR_KEYWORD for p in arguments)
        for key in node:
            allowed = [*named, *(_CALL_KEYS if is_call else ())]
            if key not in allowed and not (takes_any and not str(key).startswith("_")):
                place = self.place(f"{path}.")[:-1]
                raise DminError(_unknown(str(key), place, name, list(named), allowed))
        if is_call and not node.get("_partial_"):
            placed = len(node.get("_args_") or ())
            for p in arguments[placed:]:
                is_given = p.name in node.keys()  # noqa: SIM118
                if p.name in named and p.default is p.empty and not is_given:
                    place = self.place(f"{path}.{p.name}")
                    self.missing[place] = f"+{place}=<value>"
        for key, child, value in self.children(node, path):
            if key not in named:
                self.value(value, child)
                continue
            annotation = named[key].annotation
            section = [] if path else settings(child)
            if section and isinstance(value, DictConfig):
                self.call(value, child, section)
                continue
            plain = _plain(value)
            if not fits(plain, annotation):
                given = f"{plain!r} ({type(plain).__name__})"
                raise DminError(
                    f"{self.place(child)} is {given}, but {name} takes {spell(annotation)}."
                )
            self.value(value, child)

    def value(self, value: Any, path: str) -> None:
        """Check the calls inside a value."""
        if isinstance(value, DictConfig) and "_target_" in value:
            target = self.target(value, path)
            # None for a builtin that does not tell its signature.
            if target is not None and (arguments := parameters(target)) is not None:
                self.call(value, path, arguments)
                return
        for _, child, each in self.children(value, path) if OmegaConf.is_config(value) else ():
            self.value(each, child)

    def children(self, node: DictConfig | ListConfig, path: str) -> Iterator[tuple[Any, str, Any]]:
        """Yield key, dotted path and value of children; record those without a value."""
        keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            child = f"{path}.{key}" if path else str(key)
            is_missing = OmegaConf.is_missing(node, key)
            try:
                value = None if is_missing else node[key]
            except InterpolationToMissingValueError:
                is_missing = True
            except OmegaConfBaseException as error:
                reason, say = str(error).partition("\n")[0], f"say {child}=<value>."
                if "SLURM_" in reason:
                    say = f"SLURM sets it in the tasks of a job; elsewhere {say}"
                reason = f"{child} cannot be resolved: {reason}. {say[0].upper()}{say[1:]}"
                raise DminError(reason) from error
            if not is_missing:
                if OmegaConf.is_config(value) and OmegaConf.is_interpolation(node, key):
                    self.stands_at[child] = str(value._get_full_key(None))  # type: ignore[union-attr]
                yield key, child, value
            else:
                place = self.place(child)
                self.missing[place] = f"{place}=<value>"

    def target(self, node: DictConfig, path: str) -> Callable[..., Any] | None:
        """Return the target of a call; None if missing."""
        try:
            name = node["_target_"]
        except OmegaConfBaseException:
            return None  # reported with the other values
        if not isinstance(name, str):
            raise DminError(f"{path}._target_ is {name!r}, not the dotted name of a class.")
        found: Any = load(name, f"{path}._target_")
        if not callable(found):
            raise DminError(f"{path}._target_ is {name}, which is not a class or a function.")
        return found


def _plain(value: Any) -> Any:
    """Return a value without OmegaConf's containers; missing if it cannot be resolved."""
    if not isinstance(value, DictConfig | ListConfig):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return "???"


def _unknown(key: str, path: str, name: str, named: list[str], allowed: list[str]) -> str:
    first = f"{path}.{key}".lstrip(".") + f" is not a setting of {name}."
    takes = f"Allowed: {', '.join(named)}." if named else "It takes none."
    return " ".join(filter(None, (first, did_you_mean(key, allowed), takes)))
