"""Write the captioned shapes as two folders of images that say where each is from.

``python experiments/dmin_paper/folder.py OUT`` makes ``OUT/train`` and ``OUT/heldout``, the images
and captions of ``experiment=shapes``, as somebody's own data would lie: PNG files, and a
``metadata.jsonl`` with ``text`` and ``source``.
"""

import sys
from pathlib import Path

import torch

from dmin.data.image_folder import save_images
from dmin.data.shapes import Shapes


def main(out: Path) -> None:
    """Write both folders."""
    for split, count, minority in (("train", 500, 0.1), ("heldout", 100, 0.5)):
        examples = list(Shapes(split, count, size=16, minority=minority))
        rows = [{"text": e.caption, "source": e.metadata["source"]} for e in examples]
        images = torch.stack([e.image for e in examples])
        save_images(out / split, images, [f"{e.id}.png" for e in examples], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
