"""Putting adapters into a network and the text encoders beside it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmin.gradients.factors import wide
from dmin.models.adapters.formulas import KINDS, MAGNITUDE, difference, rank
from dmin.models.adapters.layers import Adapted, Change, Magnitude, Place, built, weight_of
from dmin.models.adapters.loaded import Loaded, adapters_of
from dmin.models.adapters.names import base_of, flat, places
from dmin.models.adapters.reading import AdapterFile, FileModule, read
from dmin.models.adapters.words import Embeddings, add_words, read_words


def load_adapters(
    network: nn.Module,
    paths: str | Path | Sequence[str | Path],
    pipeline: Any = None,
    embeddings: Embeddings | None = None,
) -> None:
    """Load adapters into a network and the text encoders of its pipeline.

    Each adapted layer becomes :class:`~dmin.models.adapters.layers.Adapted`, with the factors of
    the file as its parameters. Adapters are named ``default``, ``default_1``, … and their changes
    are added. Parameter names, and thus the sketch, do not depend on names used in training.

    Args:
        network: receives the adapters; must not have any yet.
        paths: a ``.safetensors`` file or a folder with one; several are added up.
        pipeline: a diffusers pipeline; its text encoders receive their part of a file.
        embeddings: files of learned words, in addition to those in the adapter files.

    Raises:
        DminError: there is no such file, it has an unsupported tensor, or a module does not exist
            in this network or has another size.
    """
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    names = ["default", *(f"default_{n}" for n in range(1, len(several)))]
    components = getattr(pipeline, "components", {})
    encoders = {
        key: part
        for key, part in components.items()
        if key.startswith("text_encoder") and isinstance(part, nn.Module)
    }
    files = [read(Path(path)) for path in several]
    for file, name in zip(files, names, strict=False):
        _load(file, name, network, encoders)
    for part in (network, *encoders.values()):
        part.eval()
    words = [word for file in files for word in file.words()]
    if words := words + ([] if embeddings is None else read_words(embeddings)):
        add_words(pipeline, words)


def _load(file: AdapterFile, name: str, network: nn.Module, encoders: dict[str, Any]) -> None:
    modules = file.modules()
    if not modules:
        return  # it has only learned words
    if file.config.get("use_dora") and not any(MAGNITUDE in module.tensors for module in modules):
        raise file.error("its adapter_config.json says use_dora, but it has no magnitudes")
    if any(module.text is not None for module in modules) and not encoders:
        raise file.error("it adapts a text encoder, but this model has none")
    targets = [network, *encoders.values()]
    tables = [places(target) for target in targets]
    # kohya's split_qkv=True: joined matrices are block-diagonal.
    told = file.header.get("ss_network_args", "")
    split = re.search(r"split_qkv\W+true", told, re.IGNORECASE) is not None
    fitting: list[tuple[nn.Module, FileModule, list[Place]]] = []
    wrong, taken = [], set()
    for module in modules:
        at = 0 if module.text is None else module.text % len(encoders) + 1
        if module.text is not None and module.text >= len(encoders):
            wrong.append(f"{module.key} (no such text encoder)")
            continue
        target, where = targets[at], tables[at].get(flat(module.name), [])
        if any((at, place.path) in taken for place in where):
            raise file.error(f"{module.key} adapts a layer that another module adapts too")
        taken |= {(at, place.path) for place in where}
        parts = _split(file, module, where) if split and len(where) > 1 else [(module, where)]
        for part, its in parts:
            problem = _misfit(part, [target.get_submodule(place.path) for place in its])
            if problem is None:
                fitting.append((target, part, its))
            else:
                wrong.append(f"{module.key} ({problem})")
    if wrong:
        raise file.error(
            f"{len(wrong)} of its {len(modules)} modules do not fit {type(network).__name__}, such "
            f"as {', '.join(wrong[:3])}; {len(fitting)} do. Give an adapter trained for this model"
        )
    loaded = Loaded(file, {})
    for target, part, its in fitting:
        _place(target, part, its, name, file.scale(part), loaded)
    known: Any = network
    known.dmin_adapters = {**adapters_of(network), name: loaded}


def _split(
    file: AdapterFile, module: FileModule, where: list[Place]
) -> Iterator[tuple[FileModule, list[Place]]]:
    """Yield the adapters of several layers that kohya saved as one block-diagonal pair.

    Each was trained with the scale α/r of its own rank r, not of the joint rank.
    """
    down, up = module.tensors["lora_A"], module.tensors["lora_B"].clone()
    r = len(down) // len(where)
    for n, place in enumerate(where):
        own = slice(n * r, (n + 1) * r)
        block = slice(place.start, place.start + (place.rows or 0)), own
        tensors = {**module.tensors, "lora_A": down[own], "lora_B": up[block].clone()}
        up[block] = 0
        yield replace(module, tensors=tensors), [Place(place.path)]
    if up.any() or r * len(where) != len(down):
        raise file.error(
            f"its header says split_qkv=True, but {module.key} is not made of {len(where)} blocks"
        )


def _misfit(module: FileModule, layers: Sequence[nn.Module]) -> str | None:
    """Return why a module's tensors do not fit the layers; None if they do."""
    if not layers:
        return "no such layer"
    shapes = [base_of(layer).weight.shape for layer in layers]
    wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if "lora_diff" in module.tensors:
        return _misfit_whole(module, layers, wanted)
    if len(wanted) < 2:
        return "a norm, which needs a whole difference"
    factors = {key: value.to("meta") for key, value in module.factors.items()}
    try:
        found = difference(factors, wanted[2:]).shape
    except RuntimeError:
        return "the shapes of its tensors do not match"
    plain = tuple(n for n in found[2:] if n != 1) == tuple(n for n in wanted[2:] if n != 1)
    joined = len(found) == 2 and found.numel() == torch.Size(wanted).numel()
    if found[0] != wanted[0] or not (joined or (found[1] == wanted[1] and plain)):
        return f"{_sizes(found)}, but the layer is {_sizes(wanted)}"
    magnitude = module.tensors.get(MAGNITUDE)
    if magnitude is not None and magnitude.numel() not in wanted[:2]:
        return f"{magnitude.numel()} magnitudes, but the layer is {_sizes(wanted)}"
    return None


def _misfit_whole(
    module: FileModule, layers: Sequence[nn.Module], wanted: Sequence[int]
) -> str | None:
    found, bias = module.tensors["lora_diff"].shape, module.tensors.get("lora_diff_b")
    if tuple(found) != tuple(wanted):
        return f"{_sizes(found)}, but the layer is {_sizes(wanted)}"
    held = all(getattr(base_of(layer), "bias", None) is not None for layer in layers)
    if bias is not None and (bias.shape != found[:1] or not held):
        return f"a difference of {_sizes(bias.shape)} biases, which the layer does not have"
    if MAGNITUDE in module.tensors:
        return "magnitudes together with a whole difference"
    return None


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _place(
    target: nn.Module,
    module: FileModule,
    where: list[Place],
    name: str,
    scale: float,
    loaded: Loaded,
) -> None:
    """Add the changes of a file's module to its layers."""
    layers = [_adapted(target, place.path) for place in where]
    weights = [weight_of(layer.base_layer) for layer in layers]
    like, dim = weights[0], 1 if weights[0].ndim > 2 else -1
    tensors = {k: v.to(like.device, like.dtype) for k, v in module.tensors.items()}
    factors = {k: tensors[k] for k in module.factors}
    delta = built(factors, layers[0].base_layer, scale)
    changes = [Change(delta, place, dim) for place in where]
    if MAGNITUDE in tensors:
        whole = difference(factors, like.shape[2:]).reshape(-1, *like.shape[1:])
        _decompose(changes, tensors[MAGNITUDE], scale * whole, weights, module)
    for layer, change in zip(layers, changes, strict=True):
        layer.add(name, change)
    of = "" if module.text is None else "text_encoder "
    for place in where:
        loaded.scales[of + place.path] = KINDS[frozenset(factors)], rank(factors), scale


def _decompose(
    changes: Sequence[Change],
    magnitude: Tensor,
    delta: Tensor,
    weights: Sequence[Tensor],
    module: FileModule,
) -> None:
    """Add magnitudes, of outputs or inputs according to their shape, to the changes of layers."""
    inputs = weights[0].shape[1]
    of_inputs = (
        "dora_scale" in module.keys[MAGNITUDE]
        and magnitude.ndim > 1
        and magnitude.shape[:2] == (1, inputs)
        and inputs > 1
    )
    shared, dim = nn.Parameter(magnitude), 1 if of_inputs else 0
    new = [
        weight.detach() + change.place.take(delta, 0)
        for change, weight in zip(changes, weights, strict=True)
    ]
    norms = [wide(w.transpose(0, dim).flatten(1)).norm(dim=1) for w in new]
    if of_inputs:
        norms = [torch.stack(norms).norm(dim=0)] * len(norms)
    for change, norm in zip(changes, norms, strict=True):
        place = Place(change.place.path) if of_inputs else change.place
        norm = norm.to(magnitude.dtype)
        change.magnitude = Magnitude(shared, norm, place, change.dim)
        change.of_inputs = of_inputs


def _adapted(network: nn.Module, path: str) -> Adapted:
    """Return the layer at a path, wrapped to hold adapters."""
    layer = network.get_submodule(path)
    if not isinstance(layer, Adapted):
        layer = Adapted(layer)
        above, _, last = path.rpartition(".")
        setattr(network.get_submodule(above), last, layer)
    return layer
