"""Several methods side by side in one answer, and its header."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dmin.cli.config.groups import did_you_mean
from dmin.cli.config.validate import validate
from dmin.cli.help import release
from dmin.cli.workspace.benchmark import with_method
from dmin.cli.workspace.built import build
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError

if TYPE_CHECKING:
    from dmin.attribution import FeatureSet, Method


def methods_of(work: Workspace) -> dict[str, Method]:
    """Return the method chosen, and those asked for beside it, by what they are called.

    Each is less an example's popularity if ``retrieve.popularity`` is true.

    Raises:
        DminError: a method is unknown or lacks a setting, or several are combined with
            options for one: shards, an index, a minimum score, a required split.
    """
    found = {name: at_timesteps(work, method) for name, method in _chosen(work).items()}
    if not work.cfg.retrieve.get("popularity", False):
        return found
    from dmin.attribution.methods.popularity import PopularityCorrected

    return {name: PopularityCorrected(method) for name, method in found.items()}


def at_timesteps(work: Workspace, method: Method) -> Method:
    """Return a method restricted to the chosen timesteps.

    Raises:
        DminError: timesteps are chosen, but the method uses none.
    """
    from dmin.attribution import AtTimesteps

    asked = work.cfg.retrieve.get("timesteps")  # old records have none
    return method if asked is None else AtTimesteps(method, list(asked))


def _chosen(work: Workspace) -> dict[str, Method]:
    own = build(work.cfg.method)
    beside = list(dict.fromkeys(work.cfg.retrieve.get("beside", [])))  # old records have none
    if not beside:
        return {own.name: own}
    if work.share.shards > 1:
        raise DminError(
            f"retrieve.beside=[{','.join(beside)}] with shard.num={work.share.shards}: shards rank "
            f"by one method at a time. Run one command for each method."
        )
    asked = {"index": work.cfg.index, **work.resolved("retrieve")}
    if alone := [
        n for n in ("index", "min_score", "split") if not (asked[n] is None or asked[n] is False)
    ]:
        name = alone[0] if alone[0] == "index" else f"retrieve.{alone[0]}"
        raise DminError(
            f"{name} works for one method at a time: leave it out with "
            f"retrieve.beside=[{','.join(beside)}], or run one command for each method."
        )
    known = GlobalHydra.instance().config_loader().get_group_options("method")
    chosen = HydraConfig.get().runtime.choices.get("method") or own.name
    found = {str(chosen): own}
    for name in beside:
        if name not in known:
            near = did_you_mean(name, known) or f"Choices: {', '.join(known)}."
            raise DminError(f"method={name}: there is no such method. {near}")
        cfg = with_method(work, name, {})
        if missing := sorted(OmegaConf.missing_keys(cfg.method)):
            raise DminError(
                f"method={name} needs {', '.join(missing)}, and "
                f"only the first method can be configured. Put it first, or run it alone."
            )
        validate(cfg)
        found.setdefault(name, build(cfg.method))
    return found


def about(work: Workspace, train: FeatureSet) -> dict[str, str]:
    """Return the origin of an answer: model, adapter, weights, store, examples, date."""
    model = work.cfg.model
    adapter, ema = model.get("adapter"), model.get("ema")
    names = [str(each) for each in adapter] if OmegaConf.is_list(adapter) else [str(adapter)]
    said = {
        "model": str(model.get("path") or type(work.model).__name__),
        "adapter": ", ".join(names) if adapter else "none" if "adapter" in model else None,
        "weights": f"EMA, {ema}" if ema else "as saved",
        "store": str(train.store.path),
        "examples": f"{len(train):,}",
        "sketch": f"{work.collector.sketch.family}, k = {work.collector.sketch.dim:,}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "dmin": release(),
    }
    return {name: text for name, text in said.items() if text is not None}
