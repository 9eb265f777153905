"""Filters for log messages of transformers, diffusers and Lightning."""

import logging
import re
import warnings
from typing import Any

# Logger -> the beginning of records that ask nothing of whoever runs dmin.
_LEFT_OUT = {
    # Images are then scaled by Pillow instead.
    "transformers.utils.import_utils": r"`\w+ImageProcessor` requires torchvision",
    # Of such captions the pipeline says itself that they are cut.
    "transformers.tokenization_utils_base": r"Token indices sequence length is longer",
    # What there is not, what to install, and that a training ended where it was to end.
    "lightning.pytorch.utilities.rank_zero": r"[A-Z]PU available|💡|`Trainer.fit` stopped: `max_",
}


class _Once(logging.Filter):
    """Lets a pipeline say once that captions are cut, instead of printing each."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is to be printed."""
        if "truncated" not in str(record.msg):
            return True
        told, self.said = self.said, True
        cut = re.sub(r"<[^<>]*>", "", str(record.msg).partition(": ")[2])[:200]
        record.msg = f"Captions that are too long for the text encoder are cut, such as: {cut}"
        record.args = ()
        return not told


def filter_logging() -> None:
    """Have the libraries keep quiet about what asks nothing of the user."""
    for name, beginning in _LEFT_OUT.items():

        def wanted(record: logging.LogRecord, beginning: str = beginning) -> bool:
            return not re.match(beginning, str(record.msg))

        logging.getLogger(name).addFilter(wanted)
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning's own affair


def hide_bars() -> None:
    """Have the libraries show no bars while they load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for each in (of_diffusers, of_transformers):
        each.disable_progress_bar()


def say_once(pipeline: Any) -> None:
    """Have a pipeline tell of captions that are too long only once."""
    logger = logging.getLogger(type(pipeline).__module__)
    if not any(isinstance(known, _Once) for known in logger.filters):
        logger.addFilter(_Once())
