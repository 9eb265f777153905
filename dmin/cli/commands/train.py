"""``dmin train``: train a model on the dataset, or on a subset of it."""

import json
import shutil
from pathlib import Path
from typing import Any

from dmin.cli.commands.command import Command
from dmin.cli.config.environment import kept
from dmin.cli.config.renamed import complete, rename
from dmin.cli.workspace.built import build
from dmin.cli.workspace.made_of import note_data
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.files import naming
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.runtime.progress import titled


@Command
def train(work: Workspace, results: dict[str, Any]) -> None:
    """Train a model and save it at ``model.path``, unless it exists."""
    path = Path(work.cfg.model.path)
    settings = {name: work.resolved(name) for name in ("train", "data")}
    results["model"], results["figures"] = str(path), {"model": str(path)}
    with work.lock(path, done=path.exists()):
        if _trained(path, settings):
            work.console.print(titled("model", f": found {path}"))
            return
        recipe = work.need("train")
        note_data(work)
        partial = path.with_name(f"{path.name}.partial")
        if work.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            with naming("save a model at", path):  # before it is trained
                partial.mkdir(parents=True)
        trainer = work.trainer()
        told, read = kept(work.cfg)
        told = {name: told[name] for name in settings}
        trainer.logger = work.logger
        model = build(recipe)(dataset=work.data, trainer=trainer)
        if not work.is_main:
            return
        if read:  # values from the environment are not written, but the fingerprint covers them
            told["fingerprint"] = fingerprint(settings)
        model.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(told, indent=2) + "\n")
        with naming("put the model at", path):  # fails if another user's run was first
            partial.rename(path)
    work.console.print(titled("model", f": saved {path}"))


def _trained(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether a model trained with these settings exists; refuse to replace another."""
    if not path.exists():
        return False
    record = path / "training.json"
    if not record.is_file():
        raise DminError(
            f"model.path={path} exists and was not made by `dmin train`. Choose another path."
        )
    try:
        found = json.loads(record.read_text())
        rename(found)
        complete(found)
        known = found.pop("fingerprint", None) or fingerprint(found)
    except (OSError, ValueError, AttributeError) as error:
        raise DminError(
            f"model.path={path}: its training.json is damaged ({error}). Choose another model.path."
        ) from error
    if known == fingerprint(settings):
        return True
    raise DminError(
        f"model.path={path} holds a model trained with other settings: "
        f"{'; '.join(differences(settings, found))}. Choose another model.path, or delete it."
    )
