"""``model=auto``: replaced by the family that is detected from the checkpoint."""

from collections.abc import Sequence

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

TARGET = "dmin.models.auto"


def opened(settings: Sequence[str]) -> list[str]:
    """Prepare overrides of the model for ``auto``, which declares no settings.

    Args:
        settings: overrides and options of Hydra.
    """
    others = ("experiment=", "model=", "model@")
    if any(word.startswith(others) and word != "model=auto" for word in settings):
        return list(settings)
    return [f"++{word}" if word.startswith("model.") else word for word in settings]


def resolve(cfg: DictConfig) -> str | None:
    """Put the family's settings in the place of ``model=auto``, what the user said on top.

    What is run, recorded and kept beside a store then names the family.

    Args:
        cfg: a composed configuration; modified.

    Returns:
        What was found, in a line; None where there was nothing to find.

    Raises:
        DminError: the checkpoint is of no family.
    """
    node = cfg.get("model")
    if node is None or node.get("_target_") != TARGET or OmegaConf.is_missing(node, "path"):
        return None
    from dmin.models.recognition import recognise, where  # imports torch

    said = {str(name): value for name, value in node.items() if name != "_target_"}
    found = recognise(str(said["path"]), **where(said))
    own = OmegaConf.to_container(compose(overrides=[f"+model={found.family}"]).model)
    with open_dict(cfg):
        cfg.model = OmegaConf.merge(own, said)
    return f"model: {found.evidence} → model={found.family}"
