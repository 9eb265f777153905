"""The configured logger: settings at the start of a run, metrics during training and at the end."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from dmin.cli.config.environment import kept
from dmin.runtime.errors import DminError
from dmin.runtime.escape import end_lines_in_lf


def make_logger(cfg: DictConfig, folder: Path) -> Any:
    """Return the configured logger with the settings logged; None if none is configured.

    Args:
        cfg: the composed configuration.
        folder: where it may write.

    Raises:
        DminError: its package is not installed.
    """
    if cfg.logger is None:
        return None
    told, _ = kept(cfg)
    settings = {name: told[name] for name in told if name not in ("logger", "paths", "extras")}
    try:
        logger = instantiate(cfg.logger, _convert_="all")(save_dir=folder)
        logger.log_hyperparams(settings)
    except ModuleNotFoundError as error:
        extra = HydraConfig.get().runtime.choices.get("logger")
        raise DminError(
            f"logger={extra} needs a package that is not installed ({' '.join(str(error).split())})"
            f". Try: pip install 'dmin[{extra}]'. logger=csv needs none."
        ) from error
    return logger


def log_results(logger: Any, results: Mapping[str, Any], folder: Path) -> None:
    """Log the numeric results of a run: counts, bytes, and each measure of a benchmark.

    Args:
        logger: of Lightning; None logs nothing.
        results: as recorded.
        folder: of the logger's files.
    """
    if logger is None:
        return
    if numbers := dict(_numbers(results)):
        logger.log_metrics(numbers)
        logger.save()
    for file in folder.glob("*/metrics.csv"):  # Lightning's
        end_lines_in_lf(file)


def _numbers(results: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{place}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{place}{key}", value
        elif key == "table":  # of a benchmark: task, method, metric, mean, low, high
            yield from ((f"{place}{'/'.join(row[:3])}", row[3]) for row in value)
