"""Filters for log messages of transformers, diffusers and Lightning."""

import logging
import re
import warnings
from typing import Any

# Logger -> the beginning of records that need no action by the user.
_LEFT_OUT = {
    # Pillow scales images instead.
    "transformers.utils.import_utils": r"`\w+ImageProcessor` requires torchvision",
    # The pipeline itself reports that such captions are truncated.
    "transformers.tokenization_utils_base": r"Token indices sequence length is longer",
    # Unavailable devices, advertisements, and the regular end of training.
    "lightning.pytorch.utilities.rank_zero": r"[A-Z]PU available|💡|`Trainer.fit` stopped: `max_",
}


class _Once(logging.Filter):
    """Reports once per pipeline that captions are truncated, instead of for each caption."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is printed."""
        if "truncated" not in str(record.msg):
            return True
        told, self.said = self.said, True
        cut = re.sub(r"<[^<>]*>", "", str(record.msg).partition(": ")[2])[:200]
        record.msg = f"Captions that are too long for the text encoder are cut, such as: {cut}"
        record.args = ()
        return not told


def filter_logging() -> None:
    """Suppress messages of the libraries that need no action by the user."""
    for name, beginning in _LEFT_OUT.items():

        def wanted(record: logging.LogRecord, beginning: str = beginning) -> bool:
            return not re.match(beginning, str(record.msg))

        logging.getLogger(name).addFilter(wanted)
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # internal to Lightning


def hide_bars() -> None:
    """Disable the libraries' progress bars while they load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for each in (of_diffusers, of_transformers):
        each.disable_progress_bar()


def say_once(pipeline: Any) -> None:
    """Have a pipeline report captions that are too long only once."""
    logger = logging.getLogger(type(pipeline).__module__)
    if not any(isinstance(known, _Once) for known in logger.filters):
        logger.addFilter(_Once())
