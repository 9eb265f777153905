"""Import what a ``_target_`` names, or explain why it cannot be imported and what to do."""

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from dmin.cli.config.groups import did_you_mean
from dmin.runtime.errors import DminError

# What to install, where it has not the name of the module.
_INSTALL = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "peft": "'dmin[lora]'",
    "sklearn": "scikit-learn",
}


def load(name: str, key: str) -> Any:
    """Import the class, function or class method of a dotted name.

    Args:
        name: the dotted name, such as ``dmin.models.DDPM.from_pretrained``.
        key: the dotted key of the configuration that contains it, for messages.

    Raises:
        DminError: the name does not exist, or importing it failed.
    """
    first, *rest = name.split(".")
    path, found = first, _module(first, name, key)
    for part in rest:
        inside, path = found, f"{path}.{part}"
        try:
            found = getattr(inside, part)
        except AttributeError:
            if not isinstance(inside, ModuleType):
                raise DminError(_absent(inside, part, name, key)) from None
            found = _module(path, name, key, inside)
        except Exception as error:
            raise DminError(_failed(error, name, key)) from error
    return found


def _module(path: str, name: str, key: str, parent: ModuleType | None = None) -> ModuleType:
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        # `a.b` where `a` is a module and no package reads the same as where there is no `a.b`.
        if error.name == path and parent is not None:
            raise DminError(_absent(parent, path.rpartition(".")[2], name, key)) from None
        raise DminError(_failed(error, name, key)) from error
    except Exception as error:
        raise DminError(_failed(error, name, key)) from error


def _absent(inside: Any, part: str, name: str, key: str) -> str:
    names = {entry for entry in dir(inside) if not entry.startswith("_")}
    names |= {module.name for module in pkgutil.iter_modules(getattr(inside, "__path__", ()))}
    first = f"{key} is {name}, but {inside.__name__} has no {part}."
    return " ".join(filter(None, (first, did_you_mean(part, names))))


def _failed(error: Exception, name: str, key: str) -> str:
    first = f"{key} is {name}, which cannot be imported"
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    own = name.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package == own == error.name:
        return (
            f"{first}: there is no module {own}. If it is your own file, run dmin in its folder, "
            f"or add that folder to PYTHONPATH. Otherwise: pip install {_INSTALL.get(own, own)}."
        )
    if isinstance(error, ModuleNotFoundError) and package and package != own:
        return (
            f"{first}: it needs {error.name}, which is not installed. "
            f"Try: pip install {_INSTALL.get(package, package)}."
        )
    return (
        f"{first}: {type(error).__name__}: {error}. HYDRA_FULL_ERROR=1 shows where it was raised."
    )
