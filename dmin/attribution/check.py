"""Check that a method can compare two feature sets, and say what is missing if it cannot."""

from dmin.attribution.features import FeatureSet
from dmin.attribution.method import Method
from dmin.attribution.methods.at_timesteps import places_of
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.store import Store, check_comparable


def check_pair(queries: FeatureSet, train: FeatureSet, method: Method) -> None:
    """Check that a method can compare queries and training examples.

    Raises:
        DminError: the stores have different weights, schedules or sketches; one is incomplete; a
            readout
            was not collected.
    """
    for side in getattr(queries, "sides", ())[1:]:  # of a Pool, which others are taken off
        check_pair(side, train, method)
    queries.store.require_complete()
    check_train(train, method)
    check_comparable(queries.store, train.store)
    if method.requires.images and getattr(queries.dataset, "part", None) is not None:
        raise DminError(
            f"method={method.name} compares whole pictures, but the query is a part of a picture. "
            f"Leave out queries.region and queries.mask, or choose a method that compares "
            f"gradients."
        )
    if method.requires.images and "without" in queries.store.manifest.dataset:
        raise DminError(
            f"method={method.name} compares pictures, but the query is the difference of two "
            f"prompts. Leave out --concept and --without (model.query_without), or choose a method "
            f"that compares gradients."
        )
    if method.requires.model:
        _check_origin(queries, train, method)
    if method.requires.trajectory:
        _check_trajectory(queries, method)
    for name in method.requires.checkpoints:
        pair = [_checkpoint(side, name, method) for side in (queries, train)]
        check_comparable(pair[0].store, pair[1].store)


def check_train(train: FeatureSet, method: Method) -> None:
    """Check that a method can score the training examples, for any queries.

    Raises:
        DminError: the store is incomplete; a readout was not collected; or the method lacks
            something, such as the models it averages over.
    """
    train.store.require_complete()
    method.check()
    if method.timesteps is not None:
        places_of(method.timesteps, train.store.layout.timesteps)
    missing = set(method.requires.readouts) - set(train.store.layout.readouts)
    if missing:
        raise DminError(
            f"method={method.name} needs the readouts {', '.join(sorted(missing))}; the store has "
            f"{', '.join(train.store.layout.readouts)}. Collect again with "
            f"collect.readouts=[{','.join(sorted({*train.store.layout.readouts, *missing}))}]."
        )


def _check_origin(queries: FeatureSet, train: FeatureSet, method: Method) -> None:
    """Check that the model is the one that the features were collected with."""
    told = queries.store.manifest.dataset
    if asked := {name: told[name] for name in ("guidance", "without") if name in told}:
        ((name, value),) = asked.items()
        spelled = f"{value:g}" if isinstance(value, float) else repr(value)
        raise DminError(
            f"the queries were collected with model.query_{name}={spelled}, but method="
            f"{method.name} computes their gradients again, of the plain loss. Set "
            f"model.query_{name}=null, or choose a method that only reads the store."
        )
    if train.origin is None:
        raise DminError(
            f"method={method.name} runs the model itself, but only a store was given. Also give "
            f"the dataset and the collector that made it: FeatureSet(store, dataset, "
            f"origin=collector)."
        )
    if fingerprint(train.origin.describe()) != fingerprint(train.store.manifest.features):
        raise DminError(
            f"method={method.name} was given a collector with another model, noise or sketch than "
            f"{train.store.path} was collected with. Give the collector that made it."
        )


def _check_trajectory(queries: FeatureSet, method: Method) -> None:
    """Check that the generation of the queries was recorded."""
    if not queries.trajectory:
        raise DminError(
            f"method={method.name} needs the intermediate states of generated queries. Generate "
            f"them with queries=generated queries.trajectory=10 "
            "(FeatureSet(…, trajectory=[…]))."
        )
    for state in queries.trajectory:
        state.store.require_complete()
        check_comparable(state.store, queries.store)
        _check_ids(state.store, queries.store)


def _checkpoint(side: FeatureSet, name: str, method: Method) -> FeatureSet:
    """Return the examples' features under a checkpoint."""
    if name not in side.checkpoints:
        raise DminError(
            f"method={method.name} reads the checkpoint {name!r}, which {side.store.path} does not "
            f"have (only: {', '.join(side.checkpoints) or 'none'}). Collect it, and give "
            f"FeatureSet(store, checkpoints={{{name!r}: FeatureSet(…)}})."
        )
    other = side.checkpoints[name]
    other.store.require_complete()
    _check_ids(other.store, side.store)
    return other


def _check_ids(other: Store, store: Store) -> None:
    if other.ids != store.ids:
        raise DminError(
            f"{other.path} and {store.path} do not hold the same examples in the same order. "
            f"Collect both from one dataset."
        )
