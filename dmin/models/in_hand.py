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
    """Return the model of a loaded pipeline with its current weights, including adapters and EMA.

    The model has its own modules with the same weights, so that modes, flags and devices of the
    pipeline do not change. Stores identify it by its weights.

    >>> model = dmin.from_pipeline(pipe)
    >>> store = dmin.GradientCollector(model).collect(images, "outputs/train")

    Args:
        pipeline: a diffusers pipeline with all its components.
        settings: settings of its family, as in ``conf/model/<family>.yaml``.

    Raises:
        DminError: no family supports it, a component is missing, or it uses offloading or other
            hooks of diffusers.
    """
    family = all_families()[of_pipeline(kind_in_hand(pipeline), "the pipeline")]
    parts: dict[str, Any] = {}
    for name, component in pipeline.components.items():
        if component is None and name in ("unet", "transformer", "vae", "scheduler"):
            raise DminError(f"the pipeline has no {name}. Load it with all of its components.")
        is_module = isinstance(component, nn.Module)
        if is_module and any(hasattr(module, "_hf_hook") for module in component.modules()):
            raise DminError(
                f"the pipeline's {name} is moved between devices while it runs "
                "(enable_model_cpu_offload and the like). Call pipe.remove_all_hooks() first."
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
    """Return a pipeline with other parts; a variant for sampling becomes the family's pipeline."""
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
    """Return a copy of a module's structure that shares its tensors."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        # Other classes belong to quantised layers, and have further attributes.
        plain = type(parameter) is nn.Parameter
        same = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
        shared[id(parameter)] = same
    return copy.deepcopy(module, shared)
