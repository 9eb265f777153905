"""A model from an already loaded pipeline, which is left unchanged."""

import copy
import inspect
from typing import Any

from torch import nn

from dmin.models.base import DiffusionModel
from dmin.models.recognition import of_pipeline
from dmin.models.relatives import all_families, kind_in_hand, pipeline_of
from dmin.runtime.errors import DminError


def from_pipeline(pipeline: Any, **settings: Any) -> DiffusionModel:
    """Return the model of a pipeline in hand: its weights as they are, adapters and EMA included.

    The model has modules of its own around the same weights, so that neither modes, flags nor
    places of the pipeline change. Stores know it by its weights.

    >>> model = dmin.from_pipeline(pipe)
    >>> store = dmin.GradientCollector(model).collect(images, "outputs/train")

    Args:
        pipeline: of diffusers, with all its components.
        settings: of its family, as ``conf/model/<family>.yaml`` has them.

    Raises:
        DminError: no family is it, a component is missing, or it is being moved in and out of a
            device.
    """
    family = all_families()[of_pipeline(kind_in_hand(pipeline), "the pipeline")]
    parts: dict[str, Any] = {}
    for name, component in pipeline.components.items():
        if component is None and name in ("unet", "transformer", "vae", "scheduler"):
            raise DminError(f"the pipeline has no {name}. Load it with all of its components.")
        is_module = isinstance(component, nn.Module)
        if is_module and any(hasattr(module, "_hf_hook") for module in component.modules()):
            raise DminError(
                f"the pipeline's {name} is moved in and out of the device while it runs "
                f"(enable_model_cpu_offload and the like). Call pipe.remove_all_hooks() first."
            )
        if is_module and any(hasattr(module, "_diffusers_hook") for module in component.modules()):
            raise DminError(
                f"layers of the pipeline's {name} are called through hooks of diffusers "
                f"(enable_layerwise_casting, caches, group offloading), which a copy would share. "
                f"Load the pipeline again without them; base_dtype of from_pretrained rounds "
                f"weights to float8 in the same way."
            )
        parts[name] = _around(component) if is_module else copy.copy(component)
    model: DiffusionModel = family.of_pipeline(_with(parts, pipeline, family), **settings).eval()
    return model


def _with(parts: dict[str, Any], pipeline: Any, family: Any) -> Any:
    """Return a pipeline with other parts; of those that only sample otherwise, the family's own."""
    if kind_in_hand(pipeline) in (family.claims.pipelines[0], *family.claims.own):
        own = copy.copy(pipeline)
        for name, part in parts.items():
            setattr(own, name, part)
        return own
    kind = pipeline_of(family.family)
    known = {**pipeline.config, **parts, **getattr(family, "components", {})}
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{name: known[name] for name in taken if name in known})


def _around(module: nn.Module) -> nn.Module:
    """Return a copy of a module's structure around the same memory."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        # Others than torch's own are of quantised layers, and carry more than their numbers.
        plain = type(parameter) is nn.Parameter
        same = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
        shared[id(parameter)] = same
    return copy.deepcopy(module, shared)
